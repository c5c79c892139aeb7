"""What stands before a text: of tokenizers of every kind, by itself, as asked, and if the text brings it."""

import re
import unicodedata
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from crane_serve.common.models.prefix import (
    AddBos,
    NoStartToken,
    StartTokens,
    encode_from_start,
    start_token_id,
    token_bytes,
    whole_characters,
)
from crane_serve.engine.configure import configured_bos
from tests.tiny import byte_tokenizer
from tests.tokenizer_kinds import ENDING, KINDS, Kind

ALL = KINDS | ENDING
OF_KIND = {  # before a prompt, before a text, what the model was trained with
    "llama": ((0,), 0, 0),
    "gemma": ((2,), 2, 2),
    "opt": ((2,), 2, 2),
    "gpt2": ((), 0, 0),
    "qwen": ((), 0, 0),
    "qwen chat": ((), 2, 0),  # EOS is the end of a turn; documents began with <|endoftext|>
    "glm": ((1, 2), 0, 0),
    "bert": ((0,), 0, 0),
    "t5": ((), 1, 1),
}


def starts(kind: Kind) -> StartTokens:
    return StartTokens.of(kind.tokenizer(), () if kind.configured is None else [kind.configured])


@pytest.mark.parametrize("name", ALL)
def test_the_start_tokens_of_a_kind(name: str) -> None:
    found = starts(ALL[name])
    assert (found.of_prompt, found.of_text, found.trained) == OF_KIND[name]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("add_bos", ["auto", True, False])
@pytest.mark.parametrize("from_start", [True, False])
def test_before_a_text(name: str, add_bos: AddBos, from_start: bool) -> None:
    of_prompt, of_text, trained = OF_KIND[name]
    expected: Sequence[int] = (of_text,) if from_start else of_prompt
    if add_bos != "auto":
        expected = (trained,) if add_bos else ()
    found = starts(ALL[name])
    assert found.before([7, 8], add_bos, from_start=from_start) == [*expected, 7, 8]
    assert found.before([], add_bos, from_start=from_start) == [*expected]
    brought = [*expected, 7, 8]
    assert found.before(brought, add_bos, from_start=from_start) == brought


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
    assert encode_from_start(tokenizer, f"<s>{text}") == token_ids


@pytest.mark.parametrize("name", ALL)
def test_corpora_and_server_begin_a_text_alike(name: str) -> None:
    tokenizer = ALL[name].tokenizer()
    token_ids = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert encode_from_start(tokenizer, "ab") == starts(ALL[name]).before(token_ids, "auto", from_start=True)


def test_without_bos_a_text_starts_with_eos() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    assert start_token_id(tokenizer) == tokenizer.eos_token_id == 1
    assert encode_from_start(tokenizer, "a")[0] == 1


def test_without_bos_and_eos_there_is_no_start() -> None:
    tokenizer = Kind(("<x>",), None, None).tokenizer()
    with pytest.raises(NoStartToken, match="neither a BOS nor an EOS token"):
        encode_from_start(tokenizer, "a")
    start = StartTokens.of(tokenizer)
    for add_bos, from_start in ((True, False), (True, True), ("auto", True)):
        with pytest.raises(NoStartToken, match="add_bos=false"):
            start.before([7], add_bos, from_start=from_start)  # type: ignore[arg-type]
    assert start.before([7], "auto", from_start=False) == start.before([7], False, from_start=True) == [7]


@pytest.mark.parametrize("configured", [50, 4000])
def test_what_a_config_calls_bos_counts_only_if_it_is_a_special_token(configured: int) -> None:
    assert StartTokens.of(KINDS["qwen chat"].tokenizer(), [configured]).trained == 2


@pytest.mark.parametrize(
    ("of_model", "of_text", "of_generation", "found"),
    [(7, 7, None, [7, 7]), (None, 8, 9, [8, 9]), (None, None, 9, [9]), ([1, 2], None, None, [])],
)
def test_bos_by_the_configs_of_a_model(of_model: Any, of_text: Any, of_generation: Any, found: list[int]) -> None:
    config = SimpleNamespace(
        hf_config=SimpleNamespace(bos_token_id=of_model),
        hf_text_config=SimpleNamespace(bos_token_id=of_text),
        try_get_generation_config=lambda: {} if of_generation is None else {"bos_token_id": of_generation},
    )
    assert configured_bos(config) == found


def byte_fallback(*, dummy: bool) -> PreTrainedTokenizerFast:
    """As sentencepiece has it: ▁ for a space, <0xE6> for a byte; dummy: a space before every text, as of Llama 2."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "▁h", "\ufffd"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "h")], byte_fallback=True, unk_token="</s>"))
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    back: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if dummy:
        steps.insert(0, normalizers.Prepend("▁"))
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(back)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("tokenizer", "text", "size"),
    [
        (byte_tokenizer(), "hi", 1),
        (byte_tokenizer(), " hi", 1),
        (byte_tokenizer(), "汉", 1),
        (byte_tokenizer([("æ", "±")]), "汉", 2),  # two bytes of three
        (byte_tokenizer(), "\ufffd", 1),
        (byte_tokenizer(), "<s>hi", 3),
        (byte_fallback(dummy=False), "hi", 1),
        (byte_fallback(dummy=False), " hi", 2),
        (byte_fallback(dummy=False), "汉", 1),
        (byte_fallback(dummy=False), "\ufffd", 3),
        (byte_fallback(dummy=False), "\n", 1),
        (byte_fallback(dummy=True), "hi", 1),  # the space before it is not the text's
        (byte_fallback(dummy=True), " hi", 0),  # nor is the first of two
    ],
)
def test_bytes_of_a_first_token(tokenizer: PreTrainedTokenizerFast, text: str, size: int) -> None:
    assert token_bytes(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"][0]) == size


def test_a_tokenizer_whose_special_tokens_change_the_text_is_refused() -> None:
    def odd(text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1, 2] if add_special_tokens else [3]}

    odd.bos_token_id = odd.eos_token_id = 0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=re.escape("[3], with them [1, 2]")):
        StartTokens.of(odd)


_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # what pieces of SentencePiece have for a space


def byte_pieces() -> PreTrainedTokenizerFast:
    """Of SentencePiece's kind: a token for "h", one for a space, and one for each byte of anything else."""
    pieces = ["<unk>", _MARK, "h", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", _MARK)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def composing() -> PreTrainedTokenizerFast:
    """Of Qwen's kind: a token for each byte of the text in NFC."""
    tokenizer = KINDS["qwen"].tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "text", "expected"),
    [
        (KINDS["qwen"].tokenizer(), "a汉b", [0, 1, 1, 1, 2, 3, 3]),
        (KINDS["qwen"].tokenizer(), "a\ufffdb", [0, 1, 1, 1, 2, 3]),
        (KINDS["qwen"].tokenizer(), "abc", [0, 1, 3, 3]),
        (composing(), "ne\u0302\u0301n", [0, 1, 1, 1, 4, 5, 5]),  # one character of three bytes in NFC, three in NFD
        (byte_pieces(), f"h {_MARK}h汉h", [0, 1, 2, 3, 4, 4, 4, 5, 6]),
    ],
    ids=["three bytes", "replacement", "merged", "composed", "pieces"],
)
def test_characters_of_the_first_tokens(tokenizer: Any, text: str, expected: list[int]) -> None:
    assert [whole_characters(tokenizer, text, tokens) for tokens in range(len(expected))] == expected
    tokenizer_without_places = _Slow(tokenizer)
    if "\ufffd" not in text and unicodedata.is_normalized("NFC", text) and _MARK not in text:
        assert [whole_characters(tokenizer_without_places, text, tokens) for tokens in range(len(expected))] == expected


class _Slow:
    """A tokenizer that does not say where its tokens are, as vLLM's for Mistral, which calls itself fast."""

    is_fast = True

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.convert_ids_to_tokens = tokenizer.convert_ids_to_tokens
        self.convert_tokens_to_string = tokenizer.convert_tokens_to_string

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        return self._tokenizer(text, add_special_tokens=add_special_tokens)
