"""schemathesis on the OpenAPI document: what it allows is answered as it says, and nothing by a 5xx."""

import schemathesis
from hypothesis import HealthCheck, settings

from crane_serve.api.app import create_app
from tests.api.fake_engine import FakeEngine


async def _start() -> FakeEngine:
    return FakeEngine()


APP = create_app(_start)
# A schema cannot say that two parameters contradict each other, or that a text is too long: that is a 400.
ACCEPTED = ["2xx", "3xx", "400", "403", "404", "409", "429"]
CONFIG = schemathesis.Config.from_dict({"checks": {"positive_data_acceptance": {"expected-statuses": ACCEPTED}}})
# schemathesis cannot write lines of JSON; tests/api/test_batch_api.py has the batches.
schema = schemathesis.openapi.from_asgi("/openapi.json", APP, config=CONFIG).exclude(path_regex="/batch$")


@schema.parametrize()
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_documented(case: schemathesis.Case) -> None:
    case.call_and_validate()
