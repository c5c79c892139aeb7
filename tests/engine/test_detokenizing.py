"""vLLM's detokenizer with prompts that end inside a character, or in U+FFFD: the text is that of the new tokens."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

from crane_serve.engine.detokenizing import mend_detokenizer
from tests.tiny import byte_tokenizer


@pytest.fixture(autouse=True)
def mended() -> None:
    mend_detokenizer()
    mend_detokenizer()


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Words and bytes, as Llama 2 and Gemma have them: an unfinished character is a U+FFFD for each of its bytes."""
    tokens = ["<s>", "</s>", "▁Hà", "▁Nội", "a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


BYTES, FALLBACK = byte_tokenizer(), fallback_tokenizer()


def of_bytes(text: bytes) -> list[int]:
    """Token ids, with the start token, in the tokenizer of bytes."""
    shown = BYTES.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    alphabet = {byte: shown(bytes([byte]).decode("latin-1"))[0][0] for byte in range(128)}
    # Above ASCII, Latin-1 characters are two bytes; the second says which byte a letter of the alphabet stands for.
    for byte in range(128, 256):
        pair = shown(chr(byte))[0][0]
        alphabet[chr(byte).encode()[1]] = pair[1]
        alphabet[chr(byte).encode()[0]] = pair[0]
    for character in ("ế", "\ufffd", "𝄞"):
        alphabet |= dict(zip(character.encode(), shown(character)[0][0], strict=True))
    return [0, *(BYTES.convert_tokens_to_ids(alphabet[byte]) for byte in text)]


def of_fallback(text: bytes) -> list[int]:
    tokens = [chr(byte) if byte in b"ab" else f"<0x{byte:02X}>" for byte in text]
    return [0, 2, *FALLBACK.convert_tokens_to_ids(tokens)]


def steps(tokenizer: Any, prompt: Sequence[int], generated: Sequence[int], **sampling: Any) -> list[str]:
    """What a stream gets for each token."""
    parameters = SamplingParams(**sampling)
    request = SimpleNamespace(
        sampling_params=parameters, prompt_token_ids=list(prompt), request_id="r", prompt_embeds=None
    )
    detokenizer = FastIncrementalDetokenizer(tokenizer, request)
    texts = []
    for token_id in generated:
        detokenizer.update([token_id], stop_terminated=False)
        texts.append(detokenizer.get_next_output_text(finished=False, delta=True))
    return texts


E = "ế".encode()
CASES = [
    (b"Secret " + E, b"a", "a"),
    (b"Secret " + E[:2], E[2:] + b"a", "ếa"),
    (b"Secret " + E[:1], E[1:] + b"a", "ếa"),
    (b"Secret " + E[:2], b"ab", "ab"),  # the character never comes: its rest in the prompt is the prompt's
    (b"Secret \xef\xbf\xbd", b"ab", "ab"),  # a text that really ends in U+FFFD
    (b"Secret \xef\xbf\xbd" + E[:2], E[2:] + b"a", "ếa"),
    (b"Secret " + "𝄞".encode()[:3], "𝄞".encode()[3:], "𝄞"),
    (E[:2], E[2:], "ế"),
    (E + E[:2], E[2:], "ế"),  # bytes of a row are all replaced while one is missing
    (E + E[:2], b"a", "a"),
    (b"", b"ab", "ab"),
]


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
@pytest.mark.parametrize(("prompt", "generated", "text"), CASES)
def test_no_text_of_the_prompt_comes_back(kind: str, prompt: bytes, generated: bytes, text: str) -> None:
    tokenizer, encode = {"bytes": (BYTES, of_bytes), "fallback": (FALLBACK, of_fallback)}[kind]
    prompt_ids, both = encode(prompt), encode(prompt + generated)
    came = steps(tokenizer, prompt_ids, both[len(prompt_ids) :])
    assert "".join(came) == text
    # Whatever is new, the tokens say; the text of both together ends with it.
    assert tokenizer.decode(both, skip_special_tokens=True).endswith(text)


def test_stop_strings_are_not_looked_for_in_the_prompt() -> None:
    prompt, both = of_bytes(b"Stop. " + E[:2]), of_bytes(b"Stop. " + E + b"abc")
    assert "".join(steps(BYTES, prompt, both[len(prompt) :], stop=["Stop"], include_stop_str_in_output=True)) == "ếabc"


def test_special_tokens_between_do_not_hide_an_unfinished_character() -> None:
    prompt = [*of_bytes(b"Secret " + E[:2]), *[0] * 12]
    assert "".join(steps(BYTES, prompt, of_bytes(b"ab")[1:])) == "ab"
    assert "".join(steps(BYTES, prompt, of_bytes(E[2:] + b"a")[1:])) == "ếa"
