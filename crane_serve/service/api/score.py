"""POST /score: log-probabilities of given texts under a mask."""

from collections.abc import Sequence

from fastapi import APIRouter

from crane_serve.common.masks import ResolvedMask
from crane_serve.engine.service import EngineService, PromptLogprobs
from crane_serve.service.api.concurrency import run_all
from crane_serve.service.api.dependencies import Context, Engine, MaskQuery, TheGate, choose_mask, named_masks
from crane_serve.service.api.errors import ANY_ROUTE, responses
from crane_serve.service.api.schemas import (
    ContinuationScore,
    MaskUsed,
    Score,
    ScoreAnswer,
    ScoreRequest,
    Token,
    Usage,
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
    """Score whole texts, or continuations of a context.

    A text is scored from its start: every token after BOS, or after EOS for a tokenizer without BOS. A continuation's
    tokens are those after the tokens that context and continuation together share with the context alone; white space
    at the end of the context, and a token that reaches across the join, count as part of the continuation.
    """
    context.mask = choose_mask(engine.library, named_masks(query.mask, body.mask))
    gate.admit(context, body.sequences)
    return await Scoring(engine, body, await engine.encode(body.texts), context.mask).answer()


class Scoring:
    """Runs the texts of one request.

    encoded: the token ids of `body.texts` without special tokens. Raises BadRequest if there is nothing to score.
    """

    def __init__(
        self, engine: EngineService, body: ScoreRequest, encoded: list[list[int]], mask: ResolvedMask | None
    ) -> None:
        self._engine = engine
        self._sequences = sequences_of(body, encoded, engine.start_tokens, engine.tokenizer)
        self._score = self._score_text if body.text is not None else self._score_continuation
        self._mask = mask
        self._return_tokens = body.return_tokens

    async def answer(self) -> ScoreAnswer:
        """The whole answer. Raises what EngineService.score does."""
        scores = await run_all(self._score(sequence) for sequence in self._sequences)
        return ScoreAnswer(
            model=self._engine.model_name,
            mask=MaskUsed.of(self._mask),
            scores=scores,
            usage=Usage.of(sum(len(sequence.token_ids) for sequence in self._sequences if sequence.tokens), 0),
        )

    async def _score_text(self, text: ScoredSequence) -> Score:
        if not text.tokens:
            return Score(logprob=0.0, tokens=0, bytes=0, **({"token_logprobs": []} if self._return_tokens else {}))
        logprobs = (await self._run(text)).logprobs
        tokens = await self._tokens(text, logprobs)
        return Score(logprob=sum(logprobs), tokens=len(logprobs), bytes=text.bytes, **tokens)

    async def _score_continuation(self, continuation: ScoredSequence) -> Score:
        result = await self._run(continuation)
        start = continuation.first - 1  # a sequence's first token has no log-probability
        logprobs, is_greedy = result.logprobs[start:], result.is_greedy[start:]
        return ContinuationScore(
            logprob=sum(logprobs),
            tokens=len(logprobs),
            bytes=continuation.bytes,
            is_greedy=all(is_greedy),
            **await self._tokens(continuation, logprobs),
        )

    async def _tokens(self, sequence: ScoredSequence, logprobs: Sequence[float]) -> dict[str, list[Token]]:
        """The field of a score with the last tokens of a sequence, if they are asked for."""
        if not self._return_tokens:
            return {}
        first = len(sequence.token_ids) - len(logprobs)
        texts = await self._engine.token_texts(sequence.token_ids, first)
        tokens = zip(sequence.token_ids[first:], texts, logprobs, strict=True)
        return {
            "token_logprobs": [
                Token(token_id=token_id, token=text, logprob=logprob) for token_id, text, logprob in tokens
            ]
        }

    async def _run(self, sequence: ScoredSequence) -> PromptLogprobs:
        return await self._engine.score(sequence.token_ids, self._mask)
