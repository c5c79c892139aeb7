"""The token ids that a model has embedding rows for: a tokenizer may have tokens, added later, that the model lacks."""

from collections.abc import Sequence
from typing import Any


class UnknownTokenError(ValueError):
    """A text holds a token that the model's vocabulary does not have; the message names both and the text."""


def require_known(tokenizer: Any, token_ids: Sequence[int], vocabulary: int, where: str) -> None:
    """Raise UnknownTokenError, which begins with `where`, for a token id outside of 0 to `vocabulary` - 1.

    vocabulary: number of rows of the model's embedding.
    """
    for token_id in token_ids:
        if not 0 <= token_id < vocabulary:
            token = tokenizer.convert_ids_to_tokens(token_id)
            raise UnknownTokenError(
                f"{where} holds the token {token!r} with the id {token_id}, but the model's vocabulary has "
                f"{vocabulary} tokens: the tokenizer is of another model, or the token was added to it later"
            )
