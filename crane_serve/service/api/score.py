"""POST /score: log-probabilities of given texts under a mask."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter

from crane_serve.common.masks import ResolvedMask
from crane_serve.engine.service import EngineService, TokenScore
from crane_serve.service.api.concurrency import run_all
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

router = APIRouter()


@router.post(
    "/score",
    response_model=ScoreAnswer,
    response_model_exclude_unset=True,
    responses=responses(400, 404, 409, *ANY_ROUTE),
)
async def score(body: ScoreRequest, engine: Engine, gate: TheGate, context: Context, query: MaskQuery) -> ScoreAnswer:
    """Score whole texts, or continuations of one context or of several.

    A text is scored from its start: every token after BOS, or after EOS for a tokenizer without BOS. A continuation's
    tokens are those after the tokens that context and continuation together share with the context alone; white space
    at the end of the context, and a token that reaches across the join, count as part of the continuation.

    What comes before the first scored token is read from the prefix cache, if it is there; the scored tokens never are.
    All one-token continuations of a context are one step of the engine.
    """
    context.mask = choose_mask(engine.library, named_masks(query.mask, body.mask))
    gate.admit(context, body.sequences)
    return await Scoring(engine, body, await engine.encode(body.texts), context.mask).answer()


class Scoring:
    """Runs the texts of one request. Sequences that differ in their last token only are one request to the engine.

    encoded: the token ids of `body.texts` without special tokens. Raises BadRequest if there is nothing to score.
    """

    def __init__(
        self, engine: EngineService, body: ScoreRequest, encoded: list[list[int]], mask: ResolvedMask | None
    ) -> None:
        self._engine = engine
        self._sequences = sequences_of(body, encoded, engine.start_tokens, engine.tokenizer)
        self._are_texts = body.text is not None
        self._mask = mask
        self._return_tokens = body.return_tokens
        self._return_prompts = body.return_prompts

    async def answer(self) -> ScoreAnswer:
        """The whole answer. Raises what EngineService.score does."""
        asked: dict[_Prompt, dict[int, None]] = {}  # the last tokens of each, in order
        for sequence in self._sequences:
            if sequence.tokens:
                asked.setdefault(_prompt(sequence), {})[sequence.token_ids[-1]] = None
        results = await run_all(
            self._engine.score(list(prompt), tuple(last), self._mask, first=first)
            for (prompt, first), last in asked.items()
        )
        by_prompt = {
            prompt: (scores.tokens, dict(zip(last, scores.candidates, strict=True)))
            for (prompt, last), scores in zip(asked.items(), results, strict=True)
        }

        def tokens_of(sequence: ScoredSequence) -> Sequence[TokenScore]:
            if not sequence.tokens:
                return ()
            tokens, last = by_prompt[_prompt(sequence)]
            return *tokens, last[sequence.token_ids[-1]]

        return ScoreAnswer(
            model=self._engine.model_name,
            mask=MaskUsed.of(self._mask),
            scores=[await self._score(sequence, tokens_of(sequence)) for sequence in self._sequences],
            usage=ScoreUsage.of_scored(
                sum(len(sequence.token_ids) for sequence in self._sequences if sequence.tokens),
                sum(scores.computed for scores in results),
                sum(scores.cached for scores in results),
            ),
            **({"prompts": [list(prompt) for prompt, _ in asked]} if self._return_prompts else {}),
        )

    async def _score(self, sequence: ScoredSequence, tokens: Sequence[TokenScore]) -> Score:
        logprobs = [token.logprob for token in tokens]
        fields: dict[str, Any] = {"logprob": sum(logprobs), "tokens": len(logprobs), "bytes": sequence.bytes}
        if self._return_tokens:
            fields["token_logprobs"] = await self._tokens(sequence, logprobs)
        if self._are_texts:
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
        return [Token(token_id=token_id, token=text, logprob=logprob) for token_id, text, logprob in tokens]


_Prompt = tuple[tuple[int, ...], int]


def _prompt(sequence: ScoredSequence) -> _Prompt:
    """What the engine reads for a sequence: all tokens but the last, and where its scored tokens begin."""
    return tuple(sequence.token_ids[:-1]), sequence.first
