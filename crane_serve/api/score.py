"""POST /score: log-probabilities of given texts under a mask."""

from itertools import takewhile

from fastapi import APIRouter

from crane_serve.api.concurrency import run_all
from crane_serve.api.dependencies import Engine, MaskQuery, choose_mask
from crane_serve.api.errors import RESPONSES
from crane_serve.api.schemas import ContinuationScore, MaskUsed, Score, ScoreAnswer, ScoreRequest, Usage
from crane_serve.checkpoints.prefix import encode_from_start
from crane_serve.engine.service import EngineService
from crane_serve.masks import ResolvedMask

router = APIRouter()


@router.post("/score", response_model=ScoreAnswer, responses=RESPONSES)
async def score(body: ScoreRequest, engine: Engine, query: MaskQuery) -> ScoreAnswer:
    """Score whole texts, or continuations of a context.

    A text is scored from its start, every token after BOS. A continuation's tokens are those after the tokens that
    context and continuation together share with the context alone; white space at the end of the context, and a token
    that reaches across the boundary, count as part of the continuation.
    """
    resolved = choose_mask(engine.library, query, body.mask)
    if body.text is not None:
        scored = await run_all(_score_text(engine, text, resolved) for text in body.text)
    else:
        context, continuations = body.context or "", body.continuations or []
        scored = await run_all(_score_continuation(engine, context, text, resolved) for text in continuations)
    return ScoreAnswer(
        model=engine.model_name,
        mask=MaskUsed.of(resolved),
        scores=[score for score, _ in scored],
        usage=Usage.of(sum(prompt_tokens for _, prompt_tokens in scored), 0),
    )


async def _score_text(engine: EngineService, text: str, mask: ResolvedMask | None) -> tuple[Score, int]:
    """The score, and the number of tokens that the engine read."""
    token_ids = encode_from_start(engine.tokenizer, text)
    if len(token_ids) == 1:
        return Score(logprob=0.0, tokens=0, bytes=0), 0
    logprobs = (await engine.score(token_ids, mask)).logprobs
    return Score(logprob=sum(logprobs), tokens=len(logprobs), bytes=len(text.encode())), len(token_ids)


async def _score_continuation(
    engine: EngineService, context: str, continuation: str, mask: ResolvedMask | None
) -> tuple[Score, int]:
    """The score, and the number of tokens that the engine read."""
    whole = encode_from_start(engine.tokenizer, context + continuation)
    alone = encode_from_start(engine.tokenizer, context.rstrip())
    # A token that reaches across the boundary is not one of the context's: it is scored with the continuation.
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, alone, strict=False)))
    result = await engine.score(whole, mask)
    logprobs, is_greedy = result.logprobs[shared - 1 :], result.is_greedy[shared - 1 :]
    score = ContinuationScore(
        logprob=sum(logprobs), tokens=len(logprobs), bytes=len(continuation.encode()), is_greedy=all(is_greedy)
    )
    return score, len(whole)
