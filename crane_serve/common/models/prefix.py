"""The tokens that are put before a text when a model reads it. Token ids of texts in this module have no special
tokens."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

AddBos = bool | Literal["auto"]
"""Whether a start token is put before a text; see StartTokens.before."""

Join = Literal["shared", "length"]
"""Where a continuation's tokens begin: after the tokens that the encoded whole shares with the encoded context
("shared"), or after as many tokens as the encoded context has ("length"). The two differ if a token spans the join."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_REPLACEMENT = "\ufffd"  # what a decoder makes of half a character


class NoStartToken(ValueError):
    """A start token is needed, but the model has none."""


def start_token_id(tokenizer: Any) -> int:
    """The token that a text is scored after: BOS, or EOS for tokenizers without one, as in lm-evaluation-harness.

    Raises NoStartToken for a tokenizer that has neither.
    """
    start = _start_of_text(tokenizer)
    if start is None:
        raise NoStartToken("the tokenizer has neither a BOS nor an EOS token to put before a text")
    return start


def encode_from_start(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` after exactly one start token, whether the tokenizer adds it, the text brings it, or neither.

    Raises NoStartToken for a tokenizer that has neither BOS nor EOS.
    """
    token_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return _behind((start_token_id(tokenizer),), token_ids)


@dataclass(frozen=True)
class StartTokens:
    """The tokens that may stand before a text.

    of_prompt: the token that the tokenizer itself puts before a text, such as BOS; of_text: BOS, or EOS for a tokenizer
    without one; trained: BOS, or what the model's config calls so, or EOS. None where there is no such token.
    """

    of_prompt: tuple[int, ...]
    of_text: int | None
    trained: int | None

    @classmethod
    def of(cls, tokenizer: Any, configured: Iterable[int] = ()) -> "StartTokens":
        """Those of a tokenizer. configured: the BOS ids of the model's configs; the first special token counts."""
        special = getattr(tokenizer, "added_tokens_decoder", {})
        of_config = (token_id for token_id in configured if token_id in special)
        bos, of_text = tokenizer.bos_token_id, _start_of_text(tokenizer)
        trained = bos if bos is not None else next(of_config, of_text)
        return cls(_put_by(tokenizer), of_text, trained)

    def before(self, token_ids: Sequence[int], add_bos: AddBos, *, from_start: bool) -> list[int]:
        """Token ids of a text with the tokens before it. A token is not added if the text already begins with it.

        add_bos: True for the one start token that the model was trained with, False for nothing; "auto" for the token
        that lm-evaluation-harness uses: `of_prompt`, or, if the text is scored `from_start`, `of_text`. Raises
        NoStartToken.
        """
        if add_bos is False:
            return list(token_ids)
        if add_bos == "auto" and not from_start:
            return _behind(self.of_prompt, token_ids)
        start = self.trained if add_bos is True else self.of_text
        if start is None:
            raise NoStartToken(
                "the model has neither a BOS nor an EOS token to put before a text; add_bos=false does without"
            )
        return _behind((start,), token_ids)


def token_bytes(tokenizer: Any, token_id: int) -> int:
    """How many bytes of UTF-8 the first token of a text stands for; it may be a part of a character."""
    piece: str = tokenizer.convert_ids_to_tokens([token_id])[0]
    text: str = tokenizer.convert_tokens_to_string([piece])
    if _REPLACEMENT not in text or _REPLACEMENT in piece:
        return len(text.encode())
    # Byte-level vocabularies have a character for each byte, others a token.
    return 1 if _BYTE.fullmatch(piece) else len(piece)


def whole_characters(tokenizer: Any, text: str, tokens: int) -> int:
    """How many characters of `text` its first tokens stand for. One that the next token has a part of does not count.

    Tokens without special ones. A tokenizer that does not say where its tokens are is asked for their text instead:
    slow ones, and vLLM's own for Mistral, which calls itself fast.
    """
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"][:tokens])
        return len(tokenizer.convert_tokens_to_string(pieces).rstrip(_REPLACEMENT))
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    # A composed character may be said to end with its first part, so only where the next token begins is heeded.
    return int(places[tokens][0]) if tokens < len(places) else len(text)


def _start_of_text(tokenizer: Any) -> int | None:
    candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return next((int(token_id) for token_id in candidates if token_id is not None), None)


def _put_by(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that a tokenizer puts before any text; those that it puts after a text are left out."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for place in range(len(whole) - len(bare) + 1):
        if whole[place : place + len(bare)] == bare:
            return tuple(whole[:place])
    raise ValueError(f"special tokens change how the tokenizer encodes a text: {bare}, with them {whole}")


def _behind(start: tuple[int, ...], token_ids: Sequence[int]) -> list[int]:
    there = tuple(token_ids[: len(start)]) == start
    return list(token_ids) if there else [*start, *token_ids]
