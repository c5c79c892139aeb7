"""POST /score: log-probabilities of given texts under a mask."""

from itertools import takewhile

from fastapi import APIRouter

from crane_serve.api.concurrency import run_all
from crane_serve.api.dependencies import Context, Engine, MaskQuery, TheGate, asked_masks, choose_mask
from crane_serve.api.errors import ANY_ROUTE, responses
from crane_serve.api.schemas import ContinuationScore, MaskUsed, Score, ScoreAnswer, ScoreRequest, Usage
from crane_serve.engine.service import EngineService
from crane_serve.masks import ResolvedMask

router = APIRouter()


@router.post("/score", response_model=ScoreAnswer, responses=responses(400, 404, 409, *ANY_ROUTE))
async def score(body: ScoreRequest, engine: Engine, gate: TheGate, context: Context, query: MaskQuery) -> ScoreAnswer:
    """Score whole texts, or continuations of a context.

    A text is scored from its start, every token after BOS. A continuation's tokens are those after the tokens that
    context and continuation together share with the context alone; white space at the end of the context, and a token
    that reaches across the boundary, count as part of the continuation.
    """
    context.mask = choose_mask(engine.library, asked_masks(query.mask, body.mask))
    gate.admit(context, len(body.text or body.continuations or ()))
    if body.text is not None:
        encoded = await engine.encode(body.text, from_start=True)
        pairs = zip(body.text, encoded, strict=True)
        scored = await run_all(_score_text(engine, text, token_ids, context.mask) for text, token_ids in pairs)
    else:
        start, continuations = body.context or "", body.continuations or []
        texts = [start.rstrip(), *(start + continuation for continuation in continuations)]
        alone, *encoded = await engine.encode(texts, from_start=True)
        pairs = zip(continuations, encoded, strict=True)
        scored = await run_all(_score_continuation(engine, alone, text, whole, context.mask) for text, whole in pairs)
    return ScoreAnswer(
        model=engine.model_name,
        mask=MaskUsed.of(context.mask),
        scores=[score for score, _ in scored],
        usage=Usage.of(sum(prompt_tokens for _, prompt_tokens in scored), 0),
    )


async def _score_text(
    engine: EngineService, text: str, token_ids: list[int], mask: ResolvedMask | None
) -> tuple[Score, int]:
    """The score, and the number of tokens that the engine read."""
    if len(token_ids) == 1:
        return Score(logprob=0.0, tokens=0, bytes=0), 0
    logprobs = (await engine.score(token_ids, mask)).logprobs
    return Score(logprob=sum(logprobs), tokens=len(logprobs), bytes=len(text.encode())), len(token_ids)


async def _score_continuation(
    engine: EngineService, alone: list[int], continuation: str, whole: list[int], mask: ResolvedMask | None
) -> tuple[Score, int]:
    """The score, and the number of tokens that the engine read. alone: the context; whole: with its continuation."""
    # A token that reaches across the boundary is not one of the context's: it is scored with the continuation.
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, alone, strict=False)))
    result = await engine.score(whole, mask)
    logprobs, is_greedy = result.logprobs[shared - 1 :], result.is_greedy[shared - 1 :]
    score = ContinuationScore(
        logprob=sum(logprobs), tokens=len(logprobs), bytes=len(continuation.encode()), is_greedy=all(is_greedy)
    )
    return score, len(whole)
