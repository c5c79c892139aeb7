"""A completion's text without its prompt, also where the prompt's tokens end inside a character.

vLLM 0.32 decodes a request's tokens with the `DecodeStream` of tokenizers, which begins with those of the prompt and
returns what is new. It takes a text that ends in U+FFFD for an unfinished one. If the text of the prompt ends so (a
character is cut in two, or the prompt really ends with U+FFFD), the stream treats all of it as new: the first text that
it returns begins with the whole prompt, and stop strings are searched in it, too.
"""

from collections.abc import Callable
from typing import Any

from crane_serve.engine.wrapping import wrap

_REPLACEMENT = "\ufffd"  # for bytes that are not a character, or not a complete one
_UNFINISHED_TOKENS = 3  # a character has at most four bytes, and a token at least one
_LAST_TOKENS = 8
_PROMPT = "_crane_prompt"


def mend_detokenizer() -> None:
    """Have vLLM's detokenizer return no text of a prompt. For this process; calling it again has no effect."""
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    wrap(FastIncrementalDetokenizer, "__init__", _init)
    wrap(FastIncrementalDetokenizer, "decode_next", _decode_next)


def _init(original: Callable[..., Any], self: Any, tokenizer: Any, request: Any) -> None:
    original(self, tokenizer, request)
    prompt_ids = request.prompt_token_ids or []
    # The last tokens suffice, unless they are special tokens, which have no text.
    end = _decode(self, prompt_ids[-_LAST_TOKENS:]) or _decode(self, prompt_ids)
    setattr(self, _PROMPT, prompt_ids if end.endswith(_REPLACEMENT) else None)


def _decode(detokenizer: Any, token_ids: list[int]) -> str:
    return str(detokenizer.tokenizer.decode(token_ids, skip_special_tokens=detokenizer.skip_special_tokens))


def _decode_next(original: Callable[..., Any], self: Any, next_token_id: int) -> str:
    text: str = original(self, next_token_id)
    prompt_ids: list[int] | None = getattr(self, _PROMPT)
    if not text or prompt_ids is None:
        return text
    setattr(self, _PROMPT, None)
    return _without_prompt(self, text, prompt_ids)


def _without_prompt(detokenizer: Any, text: str, prompt_ids: list[int]) -> str:
    """The new part of `text`, which is decoded from a prompt's tokens and the tokens after them.

    If the tokens after the prompt complete a character, that character counts as new.
    """
    for unfinished in range(min(_UNFINISHED_TOKENS, len(prompt_ids)) + 1):
        prompt = _decode(detokenizer, prompt_ids[: len(prompt_ids) - unfinished])
        if text.startswith(prompt):
            return text[len(prompt) :]
    prompt = _decode(detokenizer, prompt_ids)
    shared = next((index for index, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), len(prompt))
    return text[shared:]
