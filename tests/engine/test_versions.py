"""What differs between versions of vLLM, with stand-ins for what only one of them has. No engine is started."""

import asyncio
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import vllm.outputs
from vllm.exceptions import GenerationError, QueueOverflowError, RetryableRequestError, VLLMValidationError
from vllm.v1.engine import FinishReason

from crane_serve.common.masks import MaskError
from crane_serve.engine import plugin
from crane_serve.engine.answers import EngineBusy, FailedRequest, RejectedRequest
from crane_serve.engine.asked_activations import AskedActivations
from crane_serve.engine.service import EngineService
from crane_serve.engine.versions import fail_request, front_end_flags


@dataclass(frozen=True)
class SilentError:
    """vLLM 0.32's RequestError."""

    code: str
    message: str
    retryable: bool = False


class TellingError(SilentError):
    """vLLM 0.33's, which becomes an exception in the client."""

    def to_exception(self) -> Exception:
        return RetryableRequestError(self.message)


def test_flags_are_found_where_either_version_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("BaseFrontendArgs", "FrontendArgs", "validate_parsed_serve_args")
    assert all(each.__name__ == name for each, name in zip(front_end_flags(), names, strict=True))
    for place, value in (("common", "new"), ("launchers", "old")):
        module = ModuleType(place)
        for name in names:
            setattr(module, name, value)
        monkeypatch.setitem(sys.modules, f"vllm.entrypoints.{place}.cli_args", module)
    monkeypatch.setitem(sys.modules, "vllm.entrypoints.common", ModuleType("common"))
    assert front_end_flags() == ("new",) * 3
    monkeypatch.setitem(sys.modules, "vllm.entrypoints.common.cli_args", None)
    assert front_end_flags() == ("old",) * 3


@pytest.mark.parametrize("tells", [False, True])
def test_a_request_that_fails_in_the_engine_core_says_why_if_vllm_can(
    monkeypatch: pytest.MonkeyPatch, tells: bool
) -> None:
    sent: list[tuple[Any, ...]] = []
    core = SimpleNamespace(_send_finish_outputs_to_client=lambda *arguments: sent.append(arguments))
    monkeypatch.setattr(vllm.outputs, "RequestError", TellingError if tells else SilentError)
    fail_request(core, SimpleNamespace(request_id="a", client_index=2), "mask_table_full", "no row")
    told = (TellingError("mask_table_full", "no row", retryable=True),) if tells else ()
    assert sent == [(["a"], 2, FinishReason.ERROR, *told)]


def test_a_mask_that_the_engine_core_refuses_is_an_error_that_0_33_passes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise MaskError("unknown mask 'fr'")

    monkeypatch.setattr(plugin, "require_embeddings", lambda *_: None)
    monkeypatch.setattr(plugin, "admit", refuse)
    request = SimpleNamespace(sampling_params=None, resumable=False, prompt_token_ids=[1], prompt_embeds=None)
    with pytest.raises(VLLMValidationError, match="unknown mask 'fr'"):
        plugin._preprocess_add_request(lambda *_: None, SimpleNamespace(vllm_config=None), request)


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (RetryableRequestError("Generation is paused. Please retry."), EngineBusy, "Generation is paused"),
        (QueueOverflowError(), EngineBusy, "currently busy"),
        (GenerationError("KV load failed"), FailedRequest, "failed at this request: KV load failed"),
        (VLLMValidationError("too long"), RejectedRequest, "too long"),
    ],
)
def test_errors_of_a_generation_are_told_apart(raised: Exception, expected: type[Exception], message: str) -> None:
    class Engine:
        errored = False
        model_config = SimpleNamespace(max_model_len=3)
        vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))

        async def generate(self, *_: Any, **__: Any) -> Any:
            raise raised
            yield

    service = object.__new__(EngineService)
    nothing: Any = None
    service._engine, service._activations = Engine(), AskedActivations(nothing, nothing, nothing)

    async def score() -> None:
        await service.score([1, 2], [3], None)

    with pytest.raises(expected, match=message):
        asyncio.run(score())
