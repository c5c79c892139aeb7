"""A completion's text without its prompt, also where the prompt's tokens end inside a character.

vLLM 0.32 decodes a request's tokens with the `DecodeStream` of tokenizers, which begins with those of the prompt and
returns what is new. It takes a text that ends in U+FFFD for an unfinished one: if that of the prompt does, because a
character is cut in two or because it really ends so, nothing counts as old, and the first text it returns begins with
the whole prompt. Stop strings are looked for in it, too.
"""

from collections.abc import Callable
from typing import Any

from crane_serve.engine.wrapping import wrap

_REPLACEMENT = "\ufffd"  # for bytes that are no character, or not yet
_LAST_TOKENS = 8  # a character has at most four bytes, and a token at least one
_PROMPT = "_crane_prompt"


def without_prompt(text: str, prompt: str) -> str:
    """What is new in `text`, decoded from the tokens of a prompt and those behind it. prompt: decoded alone.

    A character that was cut at the end of the prompt is new.
    """
    shared = next((index for index, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), len(prompt))
    return text[shared:]


def mend_detokenizer() -> None:
    """Have vLLM's detokenizer return no text of a prompt. Of this process; once is enough, and more does no harm."""
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    wrap(FastIncrementalDetokenizer, "__init__", _init)
    wrap(FastIncrementalDetokenizer, "decode_next", _decode_next)


def _init(original: Callable[..., Any], self: Any, tokenizer: Any, request: Any) -> None:
    original(self, tokenizer, request)
    setattr(self, _PROMPT, _unfinished(self, request.prompt_token_ids or []))


def _unfinished(detokenizer: Any, prompt_ids: list[int]) -> str:
    """The text of a prompt that looks unfinished, "" for any other."""

    def decode(token_ids: list[int]) -> str:
        return str(detokenizer.tokenizer.decode(token_ids, skip_special_tokens=detokenizer.skip_special_tokens))

    end = decode(prompt_ids[-_LAST_TOKENS:])
    if end and not end.endswith(_REPLACEMENT):
        return ""
    text = decode(prompt_ids)
    return text if text.endswith(_REPLACEMENT) else ""


def _decode_next(original: Callable[..., Any], self: Any, next_token_id: int) -> str:
    text: str = original(self, next_token_id)
    prompt: str = getattr(self, _PROMPT)
    if not text or not prompt:
        return text
    setattr(self, _PROMPT, "")
    return without_prompt(text, prompt)
