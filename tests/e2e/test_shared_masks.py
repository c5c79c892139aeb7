"""A mask that travelled over the Hub does the same wherever it is used: served, applied, baked into a checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from crane_serve.cli import app
from crane_serve.common.masks import StoredMask, applied, read_mask
from crane_serve.common.models.load import load_causal_lm
from tests.conftest import TINY_FLAGS
from tests.engines import Server, random_masks
from tests.hub import Hub

pytestmark = pytest.mark.engine

TEXT = "The harbour froze in the night, and the ships lay still until noon."
NAME = "hf:some/masks"


@dataclass(frozen=True)
class Shared:
    """A server of masks of the Hub, the directory that they were pulled into, and what was pushed."""

    server: httpx.Client
    pulled: Path
    commit: str
    digests: dict[str, str]


@pytest.fixture(scope="module")
def shared(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    directory = tmp_path_factory.mktemp("shared")
    library = random_masks(checkpoint, directory / "masks", share=0.4)
    with Hub() as hub, pytest.MonkeyPatch.context() as monkeypatch:
        hub.use_here(monkeypatch, directory / "cache")
        commit = crane("masks", "push", directory / "masks", NAME).rpartition("@")[2]
        flags = (*TINY_FLAGS, "--enforce-eager")
        environment = hub.environment(directory / "cache of the server")
        server = Server.of(checkpoint, Path(NAME), directory / "log", *flags, core=0, **environment)
        try:
            crane("masks", "pull", f"{NAME}@{commit}", "--to", directory / "pulled")
            with httpx.Client(base_url=server.wait().url, timeout=120) as client:
                digests = {name: stored.mask.digest for name, stored in library.masks.items()}
                yield Shared(client, directory / "pulled", commit, digests)
        finally:
            server.stop()


def crane(*arguments: object) -> str:
    """The last line that a command prints."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()[-1]


@torch.no_grad()
def logprobs(model: nn.Module, ids: list[int]) -> list[float]:
    rows = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    return rows.gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()


def test_the_server_has_the_masks_of_the_commit(shared: Shared) -> None:
    listed = shared.server.get("/masks").json()
    assert {mask["name"]: mask["digest"] for mask in listed["masks"]} == shared.digests
    assert listed["invalid"] == []


@pytest.mark.parametrize("language", ["en", "zh", "vi"])
def test_it_means_the_same_served_applied_and_baked(
    shared: Shared, checkpoint: Path, tmp_path: Path, language: str
) -> None:
    body = {"text": [TEXT], "mask": language, "return_tokens": True, "return_prompts": True}
    answer = shared.server.post("/score", json=body).raise_for_status().json()
    tokens = answer["scores"][0]["token_logprobs"]
    served = [token["logprob"] for token in tokens]
    ids = [*answer["prompts"][0], tokens[-1]["token_id"]]
    path = shared.pulled / f"attnlrp-{language}.safetensors"
    stored: StoredMask = read_mask(path)
    assert answer["mask"]["digest"] == stored.mask.digest

    model = load_causal_lm(checkpoint, torch.float32)
    with applied(model, stored.mask):
        assert logprobs(model, ids) == pytest.approx(served, abs=1e-3)
    crane("masks", "bake", checkpoint, path, "--out", tmp_path / "baked")
    baked = logprobs(load_causal_lm(tmp_path / "baked", torch.float32), ids)
    assert baked == pytest.approx(served, abs=1e-3)
    assert sum(baked) == pytest.approx(sum(served), abs=1e-4 * len(served))
    assert max(abs(a - b) for a, b in zip(logprobs(model, ids), served, strict=True)) > 0.05, "the mask does something"


def test_a_commit_is_not_changed_while_it_is_served(shared: Shared) -> None:
    file = (shared.pulled / "attnlrp-en.safetensors").read_bytes()
    kind = {"content-type": "application/octet-stream"}
    for refused in (
        shared.server.put("/masks/new", content=file, headers=kind),
        shared.server.delete("/masks/attnlrp-en"),
    ):
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "pinned_masks")
    test_the_server_has_the_masks_of_the_commit(shared)
