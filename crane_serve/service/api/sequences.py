"""The token sequences that score a text or a continuation, and which of their tokens count."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from crane_serve.common.models.prefix import NoStartToken, StartTokens, token_bytes, whole_characters
from crane_serve.service.api.errors import BadRequest
from crane_serve.service.api.schemas import GenerateRequest, ScoreRequest


@dataclass(frozen=True)
class ScoredSequence:
    """A sequence of token ids, those from `first` on to be scored; bytes: UTF-8 length of the text that they score;
    question: which of several it belongs to."""

    token_ids: list[int]
    first: int
    bytes: int
    question: int | None = None

    @property
    def tokens(self) -> int:
        """How many tokens are scored."""
        return max(len(self.token_ids) - self.first, 0)

    @property
    def prompt(self) -> tuple[tuple[int, ...], int]:
        """What the engine reads for it: all tokens but the last, and where the scored tokens begin."""
        return tuple(self.token_ids[:-1]), self.first


def prompts_of(body: GenerateRequest, encoded: Sequence[list[int]], start: StartTokens) -> list[list[int]]:
    """The prompts as the engine reads them. encoded: their token ids without special tokens. Raises BadRequest."""
    return [_before(start, token_ids, body, from_start=False) for token_ids in encoded]


def sequences_of(
    body: ScoreRequest, encoded: Sequence[list[int]], start: StartTokens, tokenizer: Any
) -> Iterator[ScoredSequence]:
    """The sequences of a request. encoded: token ids of `body.texts` without special tokens. Raises BadRequest."""
    if body.text is not None:
        for text, token_ids in zip(body.text, encoded, strict=True):
            yield _text(body, text, token_ids, start, tokenizer)
        return
    remaining = iter(encoded)
    for number, question in enumerate(body.asked):
        alone = next(remaining)
        for text in question.continuations:
            sequence = _continuation(body, text, alone, next(remaining), start)
            yield sequence if body.questions is None else replace(sequence, question=number)


def _text(body: ScoreRequest, text: str, token_ids: list[int], start: StartTokens, tokenizer: Any) -> ScoredSequence:
    """A text from its start, maybe cut. Its own first token is not scored if nothing stands before it."""
    whole = _before(start, token_ids, body, from_start=True)
    if body.truncate is not None and len(whole) > body.truncate:
        token_ids = token_ids[: max(body.truncate - (len(whole) - len(token_ids)), 0)]
        whole = whole[: body.truncate]
        text = text[: whole_characters(tokenizer, text, len(token_ids))]
    size = len(text.encode())
    if token_ids and len(whole) == len(token_ids):
        size -= token_bytes(tokenizer, token_ids[0])
    scored = ScoredSequence(whole, 1, max(size, 0))
    return scored if scored.tokens else ScoredSequence(whole, 1, 0)


def _continuation(
    body: ScoreRequest, continuation: str, context: list[int], whole: list[int], start: StartTokens
) -> ScoredSequence:
    """A continuation. whole: tokens of context and continuation together; context: tokens of the context alone."""
    alone = _before(start, context, body, from_start=not context)
    together = _before(start, whole, body, from_start=not context)
    if body.join == "length":
        together, first = alone + together[len(alone) :], len(alone)
    else:
        # A token that spans the join does not belong to the context: it is scored with the continuation.
        first = _shared(together, alone)
        if not first and body.add_bos == "auto":  # the first token spans the join
            together, first = _before(start, whole, body, from_start=True), 1
    scored = ScoredSequence(together, first, len(continuation.encode()))
    if not first:
        message = f"continuation {continuation!r}: no token stands before it; with add_bos=false it needs a context"
        raise BadRequest("nothing_to_score", message, "context")
    if not scored.tokens:
        message = f"continuation {continuation!r} has no token of its own behind its context"
        raise BadRequest("nothing_to_score", message, "continuations")
    return scored


def _shared(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with. By halves: there may be a thousand continuations of a long context."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _before(
    start: StartTokens, token_ids: list[int], body: GenerateRequest | ScoreRequest, *, from_start: bool
) -> list[int]:
    try:
        return start.before(token_ids, body.add_bos, from_start=from_start)
    except NoStartToken as error:
        raise BadRequest("no_start_token", str(error), "add_bos") from error
