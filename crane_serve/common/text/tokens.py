"""What single tokens stand for in a text."""

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"  # what a decoder makes of half a character
_CONTEXT = 6  # tokens before the first one, for decoders that treat the beginning of a text in their own way


def token_texts(tokenizer: Any, token_ids: Sequence[int], first: int) -> list[str]:
    """What each token from `first` on adds to the text of all; joined, they are its end.

    A token that ends within a character adds "", and the token that completes the character adds all of it.
    """
    start, read = max(first - _CONTEXT, 0), first
    texts = []
    for end in range(first + 1, len(token_ids) + 1):
        before, whole = (
            tokenizer.decode(token_ids[start:until], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for until in (read, end)
        )
        if read == first:  # where the first token may complete a character
            before = before.rstrip(_REPLACEMENT)
        if whole.endswith(_REPLACEMENT) and end < len(token_ids):
            texts.append("")
            continue
        texts.append(whole[len(before) :])
        start, read = read, end
    return texts
