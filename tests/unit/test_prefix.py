"""encode_from_start: one start token, whatever the tokenizer does by itself."""

import pytest
from tokenizers.processors import TemplateProcessing

from crane_serve.checkpoints.prefix import encode_from_start, start_token_id
from tests.tiny import byte_tokenizer


@pytest.mark.parametrize("template", ["<s> $A", "$A", "<s> $A </s>"])
@pytest.mark.parametrize("text", ["hi", "", " hi\n", "汉语"])
def test_exactly_one_start_token(template: str, text: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    token_ids = encode_from_start(tokenizer, text)
    assert token_ids[0] == tokenizer.bos_token_id
    assert len(token_ids) == 1 + len(text.encode())
    assert tokenizer.decode(token_ids[1:]) == text


def test_without_bos_a_text_starts_with_eos() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    assert start_token_id(tokenizer) == tokenizer.eos_token_id == 1
    assert encode_from_start(tokenizer, "a")[0] == 1


def test_without_bos_and_eos_there_is_no_start() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a BOS nor an EOS token"):
        encode_from_start(tokenizer, "a")
