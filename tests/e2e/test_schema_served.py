"""schemathesis on the OpenAPI document of a real server: also vLLM's routes answer as it says, and nothing by a 5xx."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks

from crane_serve.service.api.openai import ROUTES
from tests.engines import Server

pytestmark = pytest.mark.engine

TIMEOUT_S = 60
# vLLM accepts more than its schemas say, and refuses what they cannot say: its routes are held to their answers.
CHECKS = (
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
)
MOST = {"max_tokens": 8, "max_completion_tokens": 8, "max_output_tokens": 8, "n": 2, "min_tokens": 4, "best_of": 2}
OWN = {"/generate": "POST", "/score": "POST", "/masks": "GET", "/ready": "GET"}
SETTINGS = settings(
    max_examples=20, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def document(tiny_server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{tiny_server.url}/openapi.json")


def reach(body: Any) -> None:
    """Name the model that there is, so that a case gets to the engine, and lower what makes an answer long."""
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        body["model"] = "tiny"
    for place in (body, body.get("sampling_params") if isinstance(body, dict) else None):
        if isinstance(place, dict):
            place |= {name: most for name, most in MOST.items() if _is_more(place.get(name), most)}
            if {"prompt", "messages"} & set(place):
                place.setdefault("max_tokens", MOST["max_tokens"])


def _is_more(value: Any, most: int) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > most


def test_the_document_describes_every_route(document: Any) -> None:
    described = document.raw_schema["paths"]
    assert {path for path in ROUTES if not path.startswith("/inference")} <= set(described)
    assert {*OWN, "/masks/{name}", "/metrics", "/health"} <= set(described)
    completion = described["/v1/completions"]["post"]
    assert {"mask", "positions"} <= {parameter["name"] for parameter in completion["parameters"]}
    assert {"400", "404", "409", "413", "422", "429", "503", "504"} <= set(completion["responses"])


CASES = [
    pytest.param(path, method, mode, id=f"{method} {path} {mode.value}")
    for path, method in (OWN | ROUTES).items()
    for mode in schemathesis.GenerationMode
    if method == "POST" or mode is schemathesis.GenerationMode.POSITIVE  # a GET has nothing that could be wrong
]


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_every_answer_is_as_documented(
    document: Any, path: str, method: str, mode: schemathesis.GenerationMode
) -> None:
    operation = document[path][method]

    @SETTINGS
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        reach(case.body)
        case.call_and_validate(checks=CHECKS, timeout=TIMEOUT_S)

    run()
