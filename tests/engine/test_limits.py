"""What is said of prompts that leave no room for a token."""

import sys
from types import SimpleNamespace

import pytest
from vllm.entrypoints.openai.completion import serving
from vllm.entrypoints.serve.utils import api_utils
from vllm.exceptions import VLLMClientError
from vllm.v1.engine.input_processor import InputProcessor

from crane_serve.engine.limits import explain_limits, no_room


@pytest.fixture(autouse=True)
def explained() -> None:
    explain_limits()
    explain_limits()


@pytest.mark.parametrize("length", [512, 513, 9000])
@pytest.mark.parametrize("module", [serving, api_utils])
def test_routes_name_the_prompt_and_not_max_tokens(module: object, length: int) -> None:
    for max_tokens in (None, 5):
        with pytest.raises(VLLMClientError) as raised:
            module.get_max_tokens(512, max_tokens, length, {})
        assert str(raised.value) == no_room(length, 512)
    for number in (str(length), "512", "511"):
        assert number in str(raised.value)


def test_room_is_what_it_was() -> None:
    assert serving.get_max_tokens(512, 5, 511, {}) == 1
    assert serving.get_max_tokens(512, None, 12, {"max_tokens": 7}) == 7
    assert serving.get_max_tokens(512, 0, 512, {}) == 0  # only the prompt is scored
    assert serving.get_max_tokens(512, 5, 600, {}, truncate_prompt_tokens=100) == 5


def test_the_engine_says_the_same() -> None:
    for runner, longest in (("generate", 511), ("pooling", 512)):
        processor = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=512, runner_type=runner),
            skip_prompt_length_check=False,
            supports_mm_inputs=False,
        )
        InputProcessor._validate_prompt_len(processor, longest, "decoder")
        with pytest.raises(VLLMClientError) as raised:
            InputProcessor._validate_prompt_len(processor, longest + 1, "decoder")
        assert str(raised.value) == no_room(longest + 1, 512)
        with pytest.raises(VLLMClientError, match="empty"):
            InputProcessor._validate_prompt_len(processor, 0, "decoder")


def test_no_module_of_the_front_end_is_left_out() -> None:
    from crane_serve.engine.openai_app import assemble  # noqa: F401

    others = [name for name, module in sys.modules.items() if name.startswith("vllm.") and _is_bare(module)]
    assert others == []


def _is_bare(module: object) -> bool:
    limit = getattr(module, "get_max_tokens", None)
    return callable(limit) and not hasattr(limit, "_crane_wrapped")
