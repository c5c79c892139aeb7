"""Prometheus's rules and Grafana's dashboard: every expression parses, and every metric and label in it exists."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from crane_serve.service.api.app import create_app
from crane_serve.service.settings import ApiSettings
from tests.api.fake_engine import FakeEngine
from tests.deployment import DEPLOY, ROOT

PROMETHEUS = DEPLOY / "prometheus"
GRAFANA = DEPLOY / "grafana"
BOARD = GRAFANA / "dashboards" / "crane.json"
OF_PROMETHEUS = {"up": set()}
ON_ALL = {"job", "instance"}
VARIABLES = {"$__rate_interval": "1m", "$instance": ".*"}

Labels = Mapping[str, set[str]]


def board() -> dict[str, Any]:
    return json.loads(BOARD.read_text())


def rules() -> list[dict[str, Any]]:
    return [
        rule for group in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"] for rule in group["rules"]
    ]


def expressions() -> Iterator[tuple[str, str]]:
    """Where each expression stands, and the expression as Prometheus gets it."""
    for panel in board()["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            yield panel["title"], expression
    for rule in rules():
        yield rule["alert"], rule["expr"]


def labels_of(document: str) -> dict[str, set[str]]:
    """The labels of each sample of a metrics document."""
    found: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(document):
        for sample in family.samples:
            found[sample.name] |= set(sample.labels)
    return found


@pytest.fixture(scope="module")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Labels:
    """What /metrics has: the service's own after a masked and a refused request, and vLLM's of a new engine."""
    written = tmp_path_factory.mktemp("metrics") / "vllm.txt"
    command = [sys.executable, ROOT / "tests" / "vllm_metrics.py", checkpoint, written]
    subprocess.run(command, capture_output=True, check=True, timeout=300, env={**os.environ, "VLLM_PLUGINS": ""})
    of_vllm = written.read_bytes()
    engine = FakeEngine()
    engine.metrics = lambda: of_vllm  # type: ignore[method-assign]

    async def start() -> FakeEngine:
        return engine

    async def ask() -> str:
        app = create_app(start)  # type: ignore[arg-type]
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://crane") as client,
        ):
            for mask in ("zh", "nowhere"):
                await client.post(f"/generate?mask={mask}", json={"prompt": "a", "max_tokens": 1})
            return (await client.get("/metrics")).text

    return {**labels_of(asyncio.run(ask())), **OF_PROMETHEUS}


def problems(expression: str, served: Labels) -> list[str]:
    """What of an expression is not there. Raises ValueError for one that is none."""
    found: list[str] = []
    selected: set[str] = set(ON_ALL)
    grouped: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            if node.name not in served:
                found.append(f"no metric {node.name}")
                return
            selected.update(served[node.name])
            for matcher in node.matchers.matchers:
                if matcher.name not in served[node.name] | ON_ALL:
                    found.append(f"{node.name} has no label {matcher.name}")
        elif isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            grouped.update(node.modifier.labels)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found + [f"nothing in it has a label {label}" for label in sorted(grouped - selected)]


def test_every_expression_asks_for_what_is_there(served: Labels) -> None:
    found = {place: problems(expression, served) for place, expression in expressions()}
    assert {place: wrong for place, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("rate(crane_token_total[1m])", "no metric crane_token_total"),
        ("vllm:gpu_cache_usage_perc", "no metric vllm:gpu_cache_usage_perc"),
        ('crane_tokens_total{type="prompt"}', "crane_tokens_total has no label type"),
        ("sum by (language) (crane_tokens_total)", "nothing in it has a label language"),
    ],
)
def test_what_is_not_there(served: Labels, expression: str, problem: str) -> None:
    assert problem in problems(expression, served)


def test_an_expression_that_is_none(served: Labels) -> None:
    with pytest.raises(ValueError, match="invalid promql"):
        problems("sum by (mask rate(crane_tokens_total[1m]))", served)


def test_the_dashboard_shows_what_it_should() -> None:
    text = " ".join(expression for _, expression in expressions())
    for metric in (
        "crane_tokens_total", "crane_request_seconds_bucket", "crane_requests_total", "crane_sequences",
        "crane_mask_rows_used", "vllm:kv_cache_usage_perc",
    ):  # fmt: skip
        assert metric in text
    panels = board()["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    assert all(panel["description"] for panel in panels)
    places = [panel["gridPos"] for panel in panels]
    cells = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))  # none lies on another
    assert max(x for x, _ in cells) < 24


def test_grafana_finds_its_source_and_its_dashboard() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "crane.yaml").read_text())["providers"]
    used = re.findall(r'"uid": "(\w+)"', BOARD.read_text())
    assert set(used) == {source["uid"], "crane"}
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
    address = re.fullmatch(r"http://(\w+):(\d+)", source["url"])
    assert address is not None
    assert services[address[1]]["ports"] == [f"127.0.0.1:{address[2]}:{address[2]}"]


def test_prometheus_scrapes_the_service_with_its_key() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert job["authorization"]["credentials_file"].removeprefix("/run/secrets/") in compose["secrets"]
    assert (
        job["authorization"]["credentials_file"].removeprefix("/run/secrets/")
        in (compose["services"]["prometheus"]["secrets"])
    )
    assert job.get("metrics_path", "/metrics") == "/metrics"
    for target in ("gpu", "cpu"):
        aliases = compose["services"][target]["networks"]["default"]["aliases"]
        assert job["static_configs"] == [{"targets": [f"{aliases[0]}:8000"]}]
    assert all((PROMETHEUS / file).is_file() for file in config["rule_files"])
    assert all(rule["annotations"]["summary"] and rule["for"] for rule in rules())
    assert {rule["expr"].split('"')[1] for rule in rules() if rule["expr"].startswith("up")} == {job["job_name"]}


async def test_metrics_need_a_key_where_there_are_keys(tmp_path: Path) -> None:
    """So that the key which Prometheus is given is needed, and a user's is enough."""
    keys = tmp_path / "keys"
    keys.write_text(f"prometheus user {'k' * 20}\n")
    keys.chmod(0o600)

    async def start() -> FakeEngine:
        return FakeEngine()

    app = create_app(start, ApiSettings(api_keys_file=keys))  # type: ignore[arg-type]
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://crane") as client,
    ):
        assert (await client.get("/metrics")).status_code == 401
        answer = await client.get("/metrics", headers={"authorization": f"Bearer {'k' * 20}"})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
