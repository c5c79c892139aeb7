"""Token ids beyond the model's vocabulary: named and refused where they come in, left out where they can never come."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from crane_serve.engine.vocabulary import drop_impossible, require_embeddings, validate_token_ids
from tests.tiny import BEYOND, byte_tokenizer

VOCABULARY = 258
MODEL = SimpleNamespace(get_vocab_size=lambda: VOCABULARY)
CONFIG = SimpleNamespace(model_config=MODEL)


def request(token_ids: list[int] | None, **fields: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"prompt_token_ids": token_ids, "mm_features": None, "prompt_is_token_ids": None, **fields}
    )


def tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [BEYOND]})
    return tokenizer


@pytest.mark.parametrize("token_ids", [[0, VOCABULARY - 1], [], None])
def test_tokens_of_the_model_are_admitted(token_ids: list[int] | None) -> None:
    require_embeddings(CONFIG, request(token_ids))


@pytest.mark.parametrize(("token_id", "token"), [(VOCABULARY, f"'{BEYOND}'"), (-1, ""), (10**6, "")])
def test_another_token_is_named_with_the_vocabulary(token_id: int, token: str) -> None:
    with pytest.raises(VLLMValidationError) as error:
        require_embeddings(CONFIG, request([5, 6, token_id, 7]), tokenizer())
    message = str(error.value)
    assert f"token {token_id}" in message
    assert token in message
    assert "position 2" in message
    assert f"{VOCABULARY} tokens" in message


def test_placeholders_of_images_and_embeddings_are_no_tokens_of_the_text() -> None:
    image = SimpleNamespace(mm_position=SimpleNamespace(offset=1, length=2))
    require_embeddings(CONFIG, request([5, VOCABULARY, VOCABULARY, 6], mm_features=[image]))
    require_embeddings(CONFIG, request([5, VOCABULARY], prompt_is_token_ids=[True, False]))
    with pytest.raises(VLLMValidationError, match="position 3"):
        require_embeddings(CONFIG, request([5, VOCABULARY, VOCABULARY, VOCABULARY], mm_features=[image]))
    with pytest.raises(VLLMValidationError, match="position 1"):
        require_embeddings(CONFIG, request([5, VOCABULARY], prompt_is_token_ids=[False, True]))


def test_what_vllm_itself_refuses_names_the_vocabulary_too() -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise VLLMValidationError("Token id 900 is out of vocabulary")

    renderer = SimpleNamespace(model_config=MODEL, tokenizer=tokenizer())
    with pytest.raises(VLLMValidationError, match=rf"token 900 at position 1 .* {VOCABULARY} tokens"):
        validate_token_ids(refuses, renderer, [5, 900], parameter="prompt")


def test_an_end_token_that_the_model_does_not_have_is_not_looked_for() -> None:
    """vLLM would index the logits with it for min_tokens, which ends the engine."""
    parameters = SamplingParams(min_tokens=2, max_tokens=4, stop_token_ids=[7])
    parameters.update_from_generation_config({"eos_token_id": [1, VOCABULARY + 1]}, VOCABULARY)
    assert parameters.all_stop_token_ids == {1, 7, VOCABULARY, VOCABULARY + 1}
    drop_impossible(CONFIG, parameters)
    assert parameters.all_stop_token_ids == {1, 7}


def test_bad_words_that_can_never_come_are_left_out() -> None:
    parameters = SamplingParams(bad_words=["ab", f"a{BEYOND}", BEYOND])
    parameters.update_from_tokenizer(SimpleNamespace(encode=_encode, max_token_id=VOCABULARY))
    assert [VOCABULARY] in parameters.bad_words_token_ids
    drop_impossible(CONFIG, parameters)
    assert parameters.bad_words_token_ids == [_encode("ab")]


def _encode(text: str, **_: Any) -> list[int]:
    return list(tokenizer().encode(text.strip(), add_special_tokens=False))
