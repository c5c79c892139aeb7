"""The whole path on mixtures of experts that have learned two made-up languages: the planted neurons are found, served
and shown to be what each language needs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from crane_serve.common.masks import Fingerprint, MaskLibrary
from tests.engines import Server
from tests.planted import LETTERS, neurons, planted_checkpoint, write_corpus

pytestmark = pytest.mark.engine

FLAGS = (
    "--dtype",
    "float32",
    "--max-model-len",
    "256",
    "--max-num-seqs",
    "16",
    "--block-size",
    "32",
    "--enforce-eager",
)
FOUND = {"magnitude": 0.8, "attnlrp": 0.7}  # share of the neurons of a mask that are planted
OWN, OTHER = 0.5, 0.05  # nats per token


@pytest.fixture(
    scope="module", params=["MixtralForCausalLM", pytest.param("Qwen2MoeForCausalLM", marks=pytest.mark.release)]
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_checkpoint(request.param, tmp_path_factory.mktemp("planted") / "model")


@pytest.fixture(scope="module")
def corpus(model: Path) -> Path:
    return write_corpus(model.parent / "corpus")


@pytest.fixture(scope="module")
def masks(model: Path, corpus: Path) -> Path:
    """Of as many neurons as are planted, by each of the methods, and one of routers."""
    directory, scores = model.parent / "masks", model.parent / "scores.safetensors"
    count = len(planted(model)["aa"])
    crane("relevance", model, "--corpus", corpus, "--methods", ",".join([*FOUND, "routing"]), "--out", scores)
    for method in FOUND:
        crane("select", scores, "--method", method, "--count", count, "--contrast", "share", "--out", directory)
    how = ("--rule", "experts", "--count", 1, "--name", "router-{language}")
    crane("select", scores, "--method", "routing", *how, "--out", directory)
    return directory


@pytest.fixture(scope="module")
def server(model: Path, masks: Path) -> Iterator[Server]:
    core = 1 % (os.cpu_count() or 1)
    server = Server.of(model, masks, model.parent / "server.log", *FLAGS, core=core)
    yield server.wait()
    server.stop()


def crane(*arguments: object) -> None:
    command = [sys.executable, "-m", "crane_serve", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def planted(model: Path) -> dict[str, set[tuple[int, int]]]:
    fingerprint = Fingerprint.of(model)
    assert fingerprint.experts is not None
    return neurons(fingerprint.intermediate_sizes, fingerprint.experts)


@pytest.mark.parametrize("method", FOUND)
def test_planted_neurons_are_found(model: Path, masks: Path, method: str) -> None:
    library = MaskLibrary.load(masks, Fingerprint.of(model), method)
    for language, expected in planted(model).items():
        sets = library.masks[f"{method}-{language}"].mask.neuron_sets()
        found = {(layer, neuron) for layer, of_layer in enumerate(sets) for neuron in of_layer}
        assert len(found) == len(expected)
        assert len(found & expected) / len(found) >= FOUND[method]


@pytest.mark.parametrize("method", FOUND)
def test_masks_take_their_language_and_leave_the_other(
    server: Server, corpus: Path, tmp_path: Path, method: str
) -> None:
    fresh = write_corpus(tmp_path / "corpus", documents=12, seed="fresh")
    crane("eval", "--server", server.url, "--corpus", fresh, "--mask", f"{method}-*", "--out", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    changes = {
        (cell["mask"], cell["language"]): cell["change"]["mean"]
        for cell in results["cells"]
        if cell["metric"] == "nats_per_token" and cell["mask"] != "none"
    }
    for mask in LETTERS:
        for language in LETTERS:
            change = changes[f"{method}-{mask}", language]
            assert change > OWN if mask == language else abs(change) < OTHER, (mask, language, change)
