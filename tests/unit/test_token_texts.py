"""What single tokens stand for in a text."""

import pytest

from crane_serve.common.text.tokens import token_texts
from tests.tiny import byte_tokenizer

TEXTS = ["the old bridge", "河上的旧桥", "Cây cầu cũ", "a\ufffdb", "🌉 a", " ", "a\n\n b"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("first", [0, 1, 3])
def test_joined_they_are_the_end_of_the_text(text: str, first: int) -> None:
    tokenizer = byte_tokenizer(merges=[("o", "l"), ("Ġ", "b")])
    token_ids = tokenizer(text).input_ids
    texts = token_texts(tokenizer, token_ids, first)
    assert len(texts) == max(len(token_ids) - first, 0)
    before = tokenizer.decode(token_ids[:first]).rstrip("\ufffd")  # without the beginning of a character
    assert "".join(texts) == tokenizer.decode(token_ids)[len(before) :]


def test_a_character_belongs_to_the_token_that_completes_it() -> None:
    tokenizer = byte_tokenizer()
    assert token_texts(tokenizer, tokenizer("a汉b").input_ids, 1) == ["a", "", "", "汉", "b"]
    assert token_texts(tokenizer, tokenizer("a汉b").input_ids, 3)[-1] == "b"
    assert token_texts(tokenizer, tokenizer("a汉").input_ids[:-1], 1) == ["a", "", "\ufffd"]
