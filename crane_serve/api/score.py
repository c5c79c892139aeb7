"""POST /score: log-probabilities of given texts under a mask."""

from itertools import takewhile

from fastapi import APIRouter

from crane_serve.api.concurrency import Seat, admitted, run_all
from crane_serve.api.dependencies import Context, Engine, MaskQuery, TheGate, asked_masks, choose_mask
from crane_serve.api.errors import ANY_ROUTE, responses
from crane_serve.api.schemas import ContinuationScore, MaskUsed, Score, ScoreAnswer, ScoreRequest, Usage
from crane_serve.engine.service import EngineService
from crane_serve.masks import MaskLibrary, ResolvedMask

router = APIRouter()


@router.post("/score", response_model=ScoreAnswer, responses=responses(400, 404, 409, *ANY_ROUTE))
async def score(body: ScoreRequest, engine: Engine, gate: TheGate, context: Context, query: MaskQuery) -> ScoreAnswer:
    """Score whole texts, or continuations of a context.

    A text is scored from its start, every token after BOS. A continuation's tokens are those after the tokens that
    context and continuation together share with the context alone; white space at the end of the context, and a token
    that reaches across the boundary, count as part of the continuation.
    """
    context.mask = mask_of(engine.library, query, body)
    gate.admit(context, body.sequences)
    return await Scoring(engine, body, await engine.encode(body.texts, from_start=True), context.mask).answer()


def mask_of(library: MaskLibrary, query: MaskQuery, body: ScoreRequest) -> ResolvedMask | None:
    """The mask that query and body name. Raises MaskError, BadRequest if they differ."""
    return choose_mask(library, asked_masks(query.mask, body.mask))


class Scoring:
    """The texts of one request on their way through the engine. encoded: the token ids of `body.texts`."""

    def __init__(
        self, engine: EngineService, body: ScoreRequest, encoded: list[list[int]], mask: ResolvedMask | None
    ) -> None:
        self._engine = engine
        self._body = body
        self._encoded = encoded
        self._mask = mask

    async def answer(self, seat: Seat = admitted) -> ScoreAnswer:
        """The whole answer; each sequence is run in a `seat`. Raises what EngineService.score does."""
        if self._body.text is not None:
            pairs = zip(self._body.text, self._encoded, strict=True)
            scored = await run_all(self._score_text(text, token_ids, seat) for text, token_ids in pairs)
        else:
            alone, *encoded = self._encoded
            pairs = zip(self._body.continuations or (), encoded, strict=True)
            scored = await run_all(self._score_continuation(alone, text, whole, seat) for text, whole in pairs)
        return ScoreAnswer(
            model=self._engine.model_name,
            mask=MaskUsed.of(self._mask),
            scores=[score for score, _ in scored],
            usage=Usage.of(sum(prompt_tokens for _, prompt_tokens in scored), 0),
        )

    async def _score_text(self, text: str, token_ids: list[int], seat: Seat) -> tuple[Score, int]:
        """The score, and the number of tokens that the engine read."""
        if len(token_ids) == 1:
            return Score(logprob=0.0, tokens=0, bytes=0), 0
        async with seat():
            logprobs = (await self._engine.score(token_ids, self._mask)).logprobs
        return Score(logprob=sum(logprobs), tokens=len(logprobs), bytes=len(text.encode())), len(token_ids)

    async def _score_continuation(
        self, alone: list[int], continuation: str, whole: list[int], seat: Seat
    ) -> tuple[Score, int]:
        """The score, and the number of tokens that the engine read.

        alone: the context; whole: with its continuation.
        """
        # A token that reaches across the boundary is not one of the context's: it is scored with the continuation.
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, alone, strict=False)))
        async with seat():
            result = await self._engine.score(whole, self._mask)
        logprobs, is_greedy = result.logprobs[shared - 1 :], result.is_greedy[shared - 1 :]
        score = ContinuationScore(
            logprob=sum(logprobs), tokens=len(logprobs), bytes=len(continuation.encode()), is_greedy=all(is_greedy)
        )
        return score, len(whole)
