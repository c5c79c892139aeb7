"""POST /score: log-probabilities of given texts under a mask."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastapi import APIRouter
from starlette.responses import Response, StreamingResponse

from crane_serve.common.masks import ResolvedMask
from crane_serve.engine.activations import ActivationRequest, Activations
from crane_serve.engine.answers import TokenScore
from crane_serve.engine.service import EngineService
from crane_serve.service.api.activations import activation_request, activations_seen, require_listable
from crane_serve.service.api.concurrency import paced, run_all
from crane_serve.service.api.dependencies import Context, Engine, MaskQuery, TheGate, choose_mask, named_masks
from crane_serve.service.api.errors import ANY_ROUTE, responses
from crane_serve.service.api.schemas import (
    ContinuationScore,
    MaskUsed,
    Score,
    ScoreAnswer,
    ScoreRequest,
    ScoreUsage,
    Token,
)
from crane_serve.service.api.sequences import ScoredSequence, sequences_of
from crane_serve.service.api.strict_json import StrictJson

router = APIRouter(route_class=StrictJson)


@router.post(
    "/score",
    response_model=ScoreAnswer,
    response_model_exclude_unset=True,
    responses=responses(400, 404, 409, *ANY_ROUTE),
)
async def score(
    body: ScoreRequest, engine: Engine, gate: TheGate, context: Context, query: MaskQuery
) -> ScoreAnswer | Response:
    """Score whole texts, or continuations of one context or of several.

    A text is scored from its start: every token after BOS, or after EOS for a tokenizer without BOS. A continuation's
    tokens are those after the tokens that context and continuation together share with the context alone; white space
    at the end of the context, and a token that reaches across the join, count as part of the continuation.

    What comes before the first scored token is read from the prefix cache, if it is there; the scored tokens never are.
    All one-token continuations of a context are one step of the engine.
    """
    context.mask = choose_mask(engine.library, named_masks(query.mask, body.mask))
    gate.admit(context, body.sequences)
    answer = await Scoring(engine, body, context.mask).answer()
    if body.return_tokens or body.return_prompts:
        return StreamingResponse(paced(answer.pieces()), media_type="application/json")
    return answer


_Prompt = tuple[tuple[int, ...], int]  # as ScoredSequence.prompt


class _Result(NamedTuple):
    """What the engine returned for a prompt; last: by the token that follows it."""

    tokens: tuple[TokenScore, ...]
    last: dict[int, TokenScore]
    computed: int
    cached: int
    seen: Activations | None


class Scoring:
    """Runs the texts of one request. Sequences that differ in their last token only are one request to the engine.

    A request can have a thousand sequences of many tokens; no loop over them keeps the event loop for itself.
    """

    def __init__(self, engine: EngineService, body: ScoreRequest, mask: ResolvedMask | None) -> None:
        self._engine = engine
        self._body = body
        self._mask = mask

    async def answer(self) -> ScoreAnswer:
        """The whole answer. Raises BadRequest if there is nothing to score, ActivationsError for activations that the
        body cannot ask for, and what EngineService.score does."""
        encoded = await self._engine.encode(self._body.texts)
        made = sequences_of(self._body, encoded, self._engine.start_tokens, self._engine.tokenizer)
        sequences = [sequence async for sequence in paced(made)]
        asked: dict[_Prompt, dict[int, None]] = {}  # the last tokens of each, in order
        async for sequence in paced(sequences):
            if sequence.tokens:
                last = asked.setdefault(self._prompt(sequence), {})
                if not self._is_read_whole(sequence):
                    last[sequence.token_ids[-1]] = None
        shown = activation_request(self._body.activations, len(asked))
        require_listable(self._body.activations, shown, self._engine, sum(len(prompt) for prompt, _ in asked))
        results = await run_all(self._run(prompt, tuple(last), shown) for prompt, last in asked.items())
        by_prompt = dict(zip(asked, results, strict=True))
        answer = ScoreAnswer(
            model=self._engine.model_name,
            mask=MaskUsed.of(self._mask),
            scores=[await self._score(sequence, by_prompt) async for sequence in paced(sequences)],
            usage=ScoreUsage.of_scored(
                sum(len(sequence.token_ids) for sequence in sequences if sequence.tokens),
                sum(result.computed for result in results),
                sum(result.cached for result in results),
            ),
        )
        if shown is not None:
            answer.activations = activations_seen(self._body.activations, shown, results[0].seen)
        if self._body.return_prompts:
            answer.prompts = [list(prompt) async for prompt, _ in paced(asked)]
        return answer

    def _is_read_whole(self, sequence: ScoredSequence) -> bool:
        """Whether the last token is read, too: that of a text is, if its neurons are to be shown."""
        wanted = self._body.activations
        if wanted is None or self._body.text is None:
            return False
        return wanted.end is None or wanted.end >= len(sequence.token_ids)

    def _prompt(self, sequence: ScoredSequence) -> _Prompt:
        return (tuple(sequence.token_ids), sequence.first) if self._is_read_whole(sequence) else sequence.prompt

    async def _run(self, prompt: _Prompt, last: tuple[int, ...], shown: ActivationRequest | None) -> _Result:
        token_ids, first = prompt
        scores = await self._engine.score(list(token_ids), last, self._mask, first=first, activations=shown)
        by_last = dict(zip(last, scores.candidates, strict=True))
        return _Result(scores.tokens, by_last, scores.computed, scores.cached, scores.activations)

    async def _score(self, sequence: ScoredSequence, by_prompt: Mapping[_Prompt, _Result]) -> Score:
        tokens: tuple[TokenScore, ...] = ()
        if sequence.tokens:
            result = by_prompt[self._prompt(sequence)]
            tokens = (
                result.tokens
                if self._is_read_whole(sequence)
                else (*result.tokens, result.last[sequence.token_ids[-1]])
            )
        logprobs = [token.logprob for token in tokens]
        fields: dict[str, Any] = {"logprob": sum(logprobs), "tokens": len(logprobs), "bytes": sequence.bytes}
        if self._body.return_tokens:
            fields["token_logprobs"] = await self._tokens(sequence, logprobs)
        if self._body.text is not None:
            return Score(**fields)
        if sequence.question is not None:
            fields["question"] = sequence.question
        return ContinuationScore(**fields, is_greedy=all(token.is_greedy for token in tokens))

    async def _tokens(self, sequence: ScoredSequence, logprobs: Sequence[float]) -> list[Token]:
        """The last tokens of a sequence, with their log-probabilities."""
        if not logprobs:
            return []
        first = len(sequence.token_ids) - len(logprobs)
        texts = await self._engine.token_texts(sequence.token_ids, first)
        tokens = zip(sequence.token_ids[first:], texts, logprobs, strict=True)
        return [
            Token(token_id=token_id, token=text, logprob=logprob) async for token_id, text, logprob in paced(tokens)
        ]
