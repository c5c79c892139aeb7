"""A revision of a hub id: what is named is what is fingerprinted, scored and served; no engine is started."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer.main
from safetensors.torch import save_file
from typer.testing import CliRunner

from crane_serve.cli import app
from crane_serve.common.masks import Fingerprint
from crane_serve.common.models.errors import CheckpointError
from crane_serve.common.models.resolve import resolve_checkpoint
from crane_serve.engine.flags import engine_arguments, serving_arguments
from crane_serve.engine.weights import require_own_config
from crane_serve.service import process
from crane_serve.service.settings import load_settings
from crane_serve.sizing import ModelSizes
from tests.damaged import UP, copied
from tests.engines import random_masks
from tests.hub import cached, offline
from tests.tiny import tiny_model

MODEL = "some/model"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("revisions")
    return {
        "main": tiny_model("llama", directory / "main"),
        "v2": tiny_model("llama", directory / "v2", layers=2, seed=1),
    }


@pytest.fixture
def commits(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """By branch the commits of the hub id, which this process finds in a cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cached(tmp_path / "cache", MODEL, checkpoints)


def test_a_revision_is_the_one_that_is_named(commits: dict[str, str], checkpoints: dict[str, Path]) -> None:
    for revision, branch in ((None, "main"), ("main", "main"), ("v2", "v2"), (commits["v2"], "v2")):
        resolved = resolve_checkpoint(MODEL, revision)
        assert resolved.name == commits[branch]
        assert Fingerprint.of(resolved) == Fingerprint.of(checkpoints[branch])
    with pytest.raises(CheckpointError, match=r"some/model \(revision v3\) is not a local directory, and could not"):
        resolve_checkpoint(MODEL, "v3")


def test_a_directory_has_no_revisions(checkpoints: dict[str, Path]) -> None:
    place = checkpoints["main"]
    with pytest.raises(CheckpointError, match=f"{place} is no hub id, so it has no revision 'v2'"):
        resolve_checkpoint(str(place), "v2")
    for model in (place, place / "config.json"):
        with pytest.raises(CheckpointError, match="so it has no revision 'v2'"):
            ModelSizes.of(model, "v2")


def test_the_size_is_that_of_the_revision(commits: dict[str, str], checkpoints: dict[str, Path]) -> None:
    assert ModelSizes.of(MODEL) == ModelSizes.of(checkpoints["main"])
    assert ModelSizes.of(MODEL, "v2") == ModelSizes.of(checkpoints["v2"]) != ModelSizes.of(MODEL)


def test_crane_serve_serves_the_revision(
    commits: dict[str, str], checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Path] = []

    def configure_engine(model: Path, *_: object, **__: object) -> None:
        served.append(model)
        raise CheckpointError("enough")

    monkeypatch.setattr(process, "configure_engine", configure_engine)
    monkeypatch.setenv("CRANE_MASKS", str(tmp_path))
    result = CliRunner().invoke(app, ["serve", MODEL, "--revision", "v2"])
    assert "enough" in result.output
    monkeypatch.setenv("CRANE_REVISION", "v2")
    with pytest.raises(CheckpointError, match="enough"):
        process.serve(load_settings({"model": MODEL}).settings)
    assert [model.name for model in served] == [commits["v2"]] * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--revision", "v2"), "--revision: an option of crane itself"),
        (("--tokenizer-revision", "v2"), "--tokenizer-revision belongs to --tokenizer"),
    ],
)
def test_a_revision_among_vllms_flags_is_refused(flags: tuple[str, ...], message: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError, match=message):
        serving_arguments(Path("x"), flags, program="crane")
    with pytest.raises(ValueError, match=message):
        engine_arguments(EngineArgs, Path("x"), flags, program="crane")


def commands(command: Any, path: str = "") -> Iterator[tuple[str, list[Any]]]:
    """The parameters of each command of the program."""
    yield path, command.params
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, f"{path} {name}".strip())


def test_every_command_that_takes_a_hub_id_takes_its_revision() -> None:
    """By the options themselves, so that a new command is noticed."""
    of_hub = (
        "relevance",
        "refine",
        "learn",
        "validate",
        "serve",
        "verify",
        "size",
        "masks bake",
        "masks import-lape",
        "masks push",
        "masks transfer",
    )
    takes = {
        path: {"revision" in parameter.name for parameter in parameters if "hub id" in (parameter.help or "")}
        for path, parameters in commands(typer.main.get_command(app))
    }
    assert {path for path, kinds in takes.items() if False in kinds} == set(of_hub)
    two_models = {"masks compare", "transfer"}
    assert {path for path, kinds in takes.items() if True in kinds} == {*of_hub, *two_models}


# --- vLLM's own server

CONFIGURE = """
import json, sys
from huggingface_hub import constants
from vllm.engine.arg_utils import EngineArgs
from crane_serve.engine.config import mask_config
from crane_serve.engine.plugin import install
install()
for flags in json.loads(sys.argv[1]):
    try:
        constants.HF_HUB_OFFLINE = False  # else vLLM replaces the id by the directory in the cache
        arguments = EngineArgs(**flags)
        constants.HF_HUB_OFFLINE = True
        config = arguments.create_engine_config()
        print("\\nsays: usable", *sorted(mask_config(config).library().masks), "at", config.model_config.revision)
    except ValueError as error:
        print("\\nsays: refused", error)
"""


def configured(cache: Path, masks: Path, *flags: dict[str, str]) -> list[str]:
    """What a process says that configures engines as vLLM's own server does, one after another."""
    run = subprocess.run(
        [sys.executable, "-c", CONFIGURE, json.dumps(flags)],
        env={**offline(cache), "CRANE_MASKS": str(masks)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = [line.removeprefix("says: ") for line in run.stdout.splitlines() if line.startswith("says: ")]
    assert len(said) == len(flags), run.stderr
    return said


@pytest.fixture
def masks(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    random_masks(checkpoints["v2"], tmp_path / "masks", share=0.1)
    return tmp_path / "masks"


def test_vllms_own_server_fingerprints_the_revision_that_it_serves(
    checkpoints: dict[str, Path], masks: Path, tmp_path: Path
) -> None:
    commits = cached(tmp_path / "cache", MODEL, checkpoints)
    of_v2, of_main, of_directory = configured(
        tmp_path / "cache",
        masks,
        {"model": MODEL, "revision": "v2"},
        {"model": MODEL},
        {"model": str(checkpoints["v2"]), "revision": "v3"},
    )
    assert of_v2.startswith("usable attnlrp-")
    assert of_v2.endswith(f"at {commits['v2']}")
    assert of_main == f"usable at {commits['main']}"
    assert of_directory.startswith("usable attnlrp-")


def test_weights_beside_the_models_own_are_found_in_a_repository_too(
    checkpoints: dict[str, Path], masks: Path, tmp_path: Path
) -> None:
    more = copied(checkpoints["v2"], tmp_path / "more")
    save_file({UP: torch.ones(3)}, more / "adapter_model.safetensors")
    cached(tmp_path / "cache", MODEL, {"main": more})
    (said,) = configured(tmp_path / "cache", masks, {"model": MODEL})
    assert said.startswith(f"refused {MODEL}: vLLM would also read adapter_model.safetensors")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"model": MODEL, "hf_config_path": "elsewhere"}, "--hf-config-path elsewhere: "),
        ({"model": MODEL, "hf_config_path": None}, f"{MODEL}: masks belong to the model on the Hugging Face Hub"),
    ],
)
def test_a_model_from_elsewhere_is_refused(
    model: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    with pytest.raises(CheckpointError, match=message):
        require_own_config(SimpleNamespace(**model))


def test_a_models_own_config_is_no_other(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    require_own_config(SimpleNamespace(model=str(checkpoint), hf_config_path=str(checkpoint)))
