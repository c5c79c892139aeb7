"""The fields of vLLM's request models: what `crane serve` lets through, and what the clients of others send."""

from types import SimpleNamespace
from typing import Any, get_type_hints

import httpx
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from openai.types import completion_create_params as completion
from openai.types.chat import completion_create_params as chat
from openai.types.responses import response_create_params as responses

from crane_serve.engine.admission import looks_like_ours
from crane_serve.engine.openai_app import assemble, request_fields
from crane_serve.service.api.openai import ROUTES
from crane_serve.service.api.openai_body import IGNORED

ARGUMENTS = SimpleNamespace(
    enable_tokenizer_info_endpoint=True, enable_scale_out=True, tokens_only=False, log_error_stack=False
)


@pytest.fixture(scope="module")
def fields() -> Any:
    return request_fields(assemble(ARGUMENTS))


def test_every_route_with_a_body_is_known(fields: Any) -> None:
    assert {path for path, method in ROUTES.items() if method == "POST"} <= set(fields)
    assert {"prompt", "suffix", "vllm_xargs"} <= fields["/v1/completions"][""]
    assert {"messages", "best_of", "vllm_xargs", "top_k"} <= fields["/v1/chat/completions/batch"][""]
    assert {"prompt", "messages"} <= fields["/tokenize"][""]  # of two models
    assert {"n", "extra_args", "seed"} <= fields["/inference/v1/generate"]["sampling_params"]


def test_no_field_of_vllms_looks_like_a_mask(fields: Any) -> None:
    for of_route in fields.values():
        for names in of_route.values():
            assert not [name for name in (*names, *IGNORED) if looks_like_ours(name)]


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("/v1/completions", completion.CompletionCreateParamsNonStreaming),
        ("/v1/chat/completions", chat.CompletionCreateParamsNonStreaming),
        ("/v1/responses", responses.ResponseCreateParamsNonStreaming),
        ("/v1/messages", message_create_params.MessageCreateParamsNonStreaming),
        ("/v1/messages/count_tokens", message_count_tokens_params.MessageCountTokensParams),
    ],
)
def test_whatever_their_packages_send_passes(fields: Any, path: str, parameters: Any) -> None:
    sent = set(get_type_hints(parameters)) - {"best_of"}
    assert sent <= fields[path][""] | IGNORED


@pytest.mark.parametrize("value", ["x", 3, ["regex"], True])
async def test_a_value_that_vllms_validators_take_for_an_object_is_refused(value: Any) -> None:
    transport = httpx.ASGITransport(assemble(ARGUMENTS), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        answer = await client.post("/v1/completions", json={"prompt": "a", "structured_outputs": value})
    assert answer.status_code == 400
