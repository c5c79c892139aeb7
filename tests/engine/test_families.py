"""Every model family under masks, in float32, against transformers with the same neurons scaled."""

import json
from pathlib import Path

import pytest

from crane_serve.common.masks import Fingerprint, MaskLibrary
from tests.architectures import SHORT_LIST
from tests.conftest import Engines
from tests.engines import Oracle, same_shares
from tests.tiny import FAMILIES

pytestmark = pytest.mark.engine

NATS_PER_TOKEN = 1e-4
MIXTURES = ("GptOssForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM")


@pytest.fixture(scope="module")
def families(engines: Engines) -> tuple[Path, dict[str, list[dict] | str]]:
    """The checkpoints, and what one process, with an engine per family one after the other, generated."""
    engines.jobs.wait("families")
    checkpoints = engines.directory / "families"
    return checkpoints, json.loads((checkpoints / "answers.json").read_text())


@pytest.mark.parametrize("family", [*FAMILIES, *(name for name in SHORT_LIST if name not in MIXTURES)])
def test_act_and_up_are_those_of_transformers(families: tuple[Path, dict], family: str) -> None:
    checkpoints, answers = families
    seen = answers["seen"][family]
    act, up = Oracle(checkpoints / family).gates(seen["tokens"], None)
    assert len(seen["layers"]) == len(act)
    for layer, values in seen["layers"].items():
        positive = (act[int(layer)] > 0).double().mean(0)
        assert same_shares(values["act_positive"], positive, len(seen["tokens"]))
        assert values["up_mean_abs"] == pytest.approx(up[int(layer)].abs().mean(0).tolist(), rel=1e-4, abs=1e-5)
        assert len(positive.unique()) > 5


@pytest.mark.parametrize("family", [*FAMILIES, *SHORT_LIST])
def test_masked_logprobs_equal_transformers(families: tuple[Path, dict[str, list[dict] | str]], family: str) -> None:
    checkpoints, answers = families
    generated = answers[family]
    assert isinstance(generated, list), generated
    oracle = Oracle(checkpoints / family)
    masks = checkpoints / f"{family}-masks"
    library = MaskLibrary.load(masks, Fingerprint.of(checkpoints / family), "attnlrp")
    for answer in generated:
        resolved = library.resolve(answer["mask"])
        expected = oracle.logprobs(answer["prompt"] + answer["tokens"], None if resolved is None else resolved.mask)
        logprobs = answer["prompt_logprobs"] + answer["logprobs"]
        assert len(logprobs) == len(expected)
        assert abs(sum(logprobs) - sum(expected)) / len(expected) < NATS_PER_TOKEN
