"""POST /score: log-probabilities of given texts under a mask."""

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
async def score(body: ScoreRequest, engine: Engine, mask: MaskQuery = None) -> ScoreAnswer:
    """Score whole texts, or continuations of a context.

    A text is scored from its start, every token after BOS. A continuation's tokens are those that come after the
    tokens of the context; white space at the end of the context counts as part of the continuation.
    """
    resolved = choose_mask(engine.library, mask, body.mask)
    scores: list[Score] | list[ContinuationScore]
    if body.text is not None:
        scores = await run_all(_score_text(engine, text, resolved) for text in body.text)
    else:
        context = body.context or ""
        continuations = body.continuations or []
        scores = await run_all(_score_continuation(engine, context, text, resolved) for text in continuations)
    usage = Usage.of(sum(item.tokens for item in scores), 0)
    return ScoreAnswer(model=engine.model_name, mask=MaskUsed.of(resolved), scores=list(scores), usage=usage)


async def _score_text(engine: EngineService, text: str, mask: ResolvedMask | None) -> Score:
    token_ids = encode_from_start(engine.tokenizer, text)
    scored = (await engine.score(token_ids, mask)).logprobs if len(token_ids) > 1 else ()
    return Score(logprob=sum(scored), tokens=len(scored), bytes=len(text.encode()))


async def _score_continuation(
    engine: EngineService, context: str, continuation: str, mask: ResolvedMask | None
) -> ContinuationScore:
    trimmed = context.rstrip()
    whole = encode_from_start(engine.tokenizer, context + continuation)
    skipped = len(encode_from_start(engine.tokenizer, trimmed)) - 1  # scored tokens that belong to the context
    scored = await engine.score(whole, mask)
    logprobs, is_greedy = scored.logprobs[skipped:], scored.is_greedy[skipped:]
    return ContinuationScore(
        logprob=sum(logprobs), tokens=len(logprobs), bytes=len(continuation.encode()), is_greedy=all(is_greedy)
    )
