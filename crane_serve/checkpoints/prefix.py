"""How a text becomes token ids that begin with the model's start token."""

from typing import Any


def start_token_id(tokenizer: Any) -> int:
    """The token that stands before a text: BOS, or EOS for models without one.

    Raises ValueError for a tokenizer that has neither.
    """
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ValueError("the tokenizer has neither a BOS nor an EOS token to put before a text")


def encode_from_start(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` after exactly one start token, whether or not the tokenizer adds it by itself."""
    token_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [start_token_id(tokenizer), *token_ids]
