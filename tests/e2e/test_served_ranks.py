"""`crane serve` over two ranks, as docs/deployment/scale-out.md starts it, with a mask put while it serves."""

import asyncio
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from clients import AsyncCraneClient, CraneClient, CraneError
from crane_serve.common.masks import NeuronMask, write_mask
from tests.conftest import RANKS, TINY_FLAGS, Engines, Tiny
from tests.engines import Oracle, Server

pytestmark = [pytest.mark.engine, pytest.mark.release]  # tests/engine/test_ranks.py has the engines without HTTP

NATS_PER_TOKEN = 1e-4
TEXTS = ("The harbour froze.", "港口结冰了。", "Bến cảng đóng băng.", "A text longer than one chunk of prefill. " * 5)
MASKS = ("none", "en", "zh", "vi", "zh,vi", "en@0.5")


@dataclass
class RankedServer:
    """A server over two ranks of one kind, with a mask directory of its own."""

    kind: str
    server: Server


@pytest.fixture(scope="module", params=("tensor parallel", "data parallel"))
def ranked(request: pytest.FixtureRequest, engines: Engines) -> Iterator[RankedServer]:
    masks = engines.directory / f"{request.param} served masks"
    masks.mkdir()
    for path in engines.tiny.masks.glob("attnlrp-*.safetensors"):
        shutil.copy(path, masks)
    log = engines.directory / f"{request.param} served.log"
    server = Server.of(engines.tiny.checkpoint, masks, log, *TINY_FLAGS, *RANKS[request.param], core="0|1")
    try:
        yield RankedServer(request.param, server.wait())
    finally:
        server.stop()


def scores_at_once(url: str, jobs: Sequence[tuple[str, str]]) -> list[float]:
    """Nats per token of each (text, mask), all asked for together."""

    async def run() -> list[float]:
        async with AsyncCraneClient(url, concurrency=64) as client:
            answers = await asyncio.gather(*(client.score_text(text, mask=mask) for text, mask in jobs))
            return [answer.scores[0].logprob / answer.scores[0].tokens for answer in answers]

    return asyncio.run(run())


def expected_score(oracle: Oracle, text: str, mask: NeuronMask | None) -> float:
    logprobs = oracle.text_logprobs(text, mask)
    return sum(logprobs) / len(logprobs)


def prompt_tokens(url: str) -> dict[str, float]:
    """Tokens of prompts that each engine has had; a data-parallel rank is an engine."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    samples = (sample for family in families for sample in family.samples)
    return {one.labels["engine"]: one.value for one in samples if one.name == "vllm:prompt_tokens_total"}


def test_a_mixed_batch_scores_as_transformers_does(ranked: RankedServer, tiny: Tiny, tiny_oracle: Oracle) -> None:
    jobs = [(text, mask) for text in TEXTS for mask in MASKS] * 3
    for (text, name), score in zip(jobs, scores_at_once(ranked.server.url, jobs), strict=True):
        resolved = tiny.library.resolve(name)
        expected = expected_score(tiny_oracle, text, None if resolved is None else resolved.mask)
        assert score == pytest.approx(expected, abs=NATS_PER_TOKEN), (text, name)


def test_a_mask_put_while_serving_is_the_mask_on_every_rank(
    ranked: RankedServer, tiny: Tiny, tiny_oracle: Oracle, tmp_path: Path
) -> None:
    stored = tiny.library.get("attnlrp-vi")
    flipped = stored.mask.intermediate.flip(1)  # [layers, neurons]: other neurons than those of any mask there
    mask = NeuronMask(flipped, stored.mask.intermediate_sizes)
    path = write_mask(tmp_path, "flipped", mask, stored.info)
    jobs = [(text, name) for text in TEXTS for name in ("flipped", "none")] * 4
    with CraneClient(ranked.server.url) as client:
        client.put_mask("flipped", path)
        before = prompt_tokens(ranked.server.url)
        scores = scores_at_once(ranked.server.url, jobs)
        after = prompt_tokens(ranked.server.url)
        client.delete_mask("flipped")
        with pytest.raises(CraneError, match="unknown mask 'flipped'"):
            client.score_text(TEXTS[0], mask="flipped")
    assert after.keys() == ({"0", "1"} if ranked.kind == "data parallel" else {"0"})
    assert all(after[engine] > before[engine] for engine in after), (before, after)  # each had part of these requests
    for (text, name), score in zip(jobs, scores, strict=True):
        expected = expected_score(tiny_oracle, text, mask if name == "flipped" else None)
        assert score == pytest.approx(expected, abs=NATS_PER_TOKEN), (text, name)
    assert expected_score(tiny_oracle, TEXTS[0], mask) != pytest.approx(
        expected_score(tiny_oracle, TEXTS[0], None), abs=10 * NATS_PER_TOKEN
    )


def test_sigterm_ends_it_with_zero(ranked: RankedServer) -> None:
    ranked.server.process.terminate()
    assert ranked.server.process.wait(timeout=90) == 0
