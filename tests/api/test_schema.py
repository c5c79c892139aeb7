"""schemathesis on the OpenAPI document of our own routes: they answer as it says, and nothing by a 5xx."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.core import NOT_SET

from crane_serve.common.masks import ResolvedMask
from crane_serve.engine.answers import RejectedRequest, Sampling, Step
from crane_serve.service.api.app import create_app
from crane_serve.service.settings import ApiSettings
from tests.api.fake_engine import FakeEngine

KEY = "an-administrators-key"


class _Engine(FakeEngine):
    """Refuses what its model has no room for, as a real one does; takes masks in the body."""

    def __init__(self) -> None:
        super().__init__()
        self.library.allows_inline = True

    async def generate(
        self, prompt_ids: list[int], sampling: Sampling, mask: ResolvedMask | None, **options: Any
    ) -> AsyncGenerator[Step]:
        if len(prompt_ids) + sampling.max_tokens > self.max_model_tokens:
            raise RejectedRequest("longer than the model")
        async with aclosing(super().generate(prompt_ids, sampling, mask, **options)) as steps:
            async for step in steps:
                yield step


async def _start() -> FakeEngine:
    return _Engine()


# A schema cannot say that two parameters contradict each other, or that a text is too long: that is a 400.
ACCEPTED = ["2xx", "3xx", "400", "403", "404", "409", "412", "429"]
# Nor can it say which bytes are a mask file, or that a name of 64 hexadecimal digits is a digest; and schemathesis
# sends conditions, If-None-Match: 0, that do not have the pattern they are described with.
ACCEPTED_OF_MASKS = [*ACCEPTED, "413", "422"]
REFUSED = ["400", "401", "403", "404", "405", "409", "413", "415", "422"]
CONFIG = {
    "generation": {"with-security-parameters": False},
    "checks": {
        "positive_data_acceptance": {"expected-statuses": ACCEPTED},
        # 413: a list that is too long may be of too many values to be read.
        "negative_data_rejection": {
            "expected-statuses": ["400", "401", "403", "404", "405", "409", "413", "415", "422"]
        },
    },
    "operations": [
        {
            "include-path-regex": "^/masks",
            "checks": {"positive_data_acceptance": {"expected-statuses": ACCEPTED_OF_MASKS}},
        },
    ],
}
SETTINGS = settings(
    max_examples=40, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


@schemathesis.serializer("application/x-safetensors")
def as_it_is(context: schemathesis.SerializationContext, value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def described(app: Any, **headers: str) -> Any:
    config = schemathesis.Config.from_dict(CONFIG)
    return schemathesis.openapi.from_asgi("/openapi.json", app, config=config, headers=headers)


def without_unwanted_body(case: schemathesis.Case) -> schemathesis.Case:
    """Of a GET, the body: the service refuses it before it looks whether there is such a route."""
    if case.method.upper() in ("GET", "HEAD"):
        case.body = NOT_SET
    return case


open_service = described(create_app(_start))  # type: ignore[arg-type]
closed_service = described(create_app(_start, ApiSettings(admin_key=KEY)), **{"x-api-key": KEY})  # type: ignore[arg-type]


@open_service.parametrize()
@SETTINGS
def test_every_answer_is_as_documented(case: schemathesis.Case) -> None:
    without_unwanted_body(case).call_and_validate()


@closed_service.parametrize()
@settings(SETTINGS, max_examples=5)
def test_with_keys_every_answer_is_as_documented(case: schemathesis.Case) -> None:
    without_unwanted_body(case).call_and_validate(headers={"x-api-key": KEY})
