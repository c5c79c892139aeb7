"""Another model under the fingerprint of one: in .bin files, and as a revision of a hub id."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.hostile.case import Case, Outcome

CONFIGURE = """
import sys
from huggingface_hub import constants
from vllm.engine.arg_utils import EngineArgs
from crane_serve.engine.config import mask_config
from crane_serve.engine.plugin import install
install()
constants.HF_HUB_OFFLINE = False  # else vLLM replaces the id by the directory in the cache
arguments = EngineArgs(model="some/model", revision="v2")
constants.HF_HUB_OFFLINE = True
print("usable:", *sorted(mask_config(arguments.create_engine_config()).library().masks))
"""
SERVE = """
import sys
from crane_serve.service import process
process.configure_engine = lambda model, *_, **__: sys.exit(f"serves {model}")
from crane_serve.cli import app
app()
"""


def _bin_files() -> Outcome:
    import torch
    from safetensors.torch import load_file

    from crane_serve.common.masks import Fingerprint
    from tests.tiny import tiny_model

    with tempfile.TemporaryDirectory() as directory:
        checkpoint = tiny_model("llama", Path(directory))
        tensors = load_file(checkpoint / "model.safetensors")
        (checkpoint / "model.safetensors").unlink()
        prints = []
        for added in (0.0, 1.0):
            weight = tensors["model.layers.0.mlp.up_proj.weight"]
            weight[len(weight) // 2, 0] += added
            torch.save(tensors, checkpoint / "pytorch_model.bin")
            prints.append(Fingerprint.of(checkpoint).weights_digest[:12])
    return Outcome(f"weights digests {prints[0]} and {prints[1]}", prints[0] != prints[1])


def _said(program: str, directory: Path, *arguments: str) -> str:
    from tests.hub import offline

    environment = {**offline(directory / "cache"), "CRANE_MASKS": str(directory / "masks")}
    command = [sys.executable, "-P", "-c", program, *arguments]
    run = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=240, check=False)
    return (run.stdout.strip() or run.stderr.strip() or "nothing").splitlines()[-1]


def _revisions(directory: Path) -> dict[str, str]:
    """A hub id with two revisions, which masks are made for the second of; its commits."""
    from tests.engines import random_masks
    from tests.hub import cached
    from tests.tiny import tiny_model

    places = {name: tiny_model("llama", directory / name, seed=seed) for seed, name in enumerate(("main", "v2"))}
    random_masks(places["v2"], directory / "masks", share=0.1)
    return cached(directory / "cache", "some/model", places)


def _served_revision() -> Outcome:
    directory = Path(tempfile.mkdtemp())
    try:
        commits = _revisions(directory)
        said = _said(SERVE, directory, "serve", "some/model", "--revision", "v2")
    finally:
        shutil.rmtree(directory)
    which = next((name for name, commit in commits.items() if said.endswith(commit)), said)
    return Outcome(f"served: {which}", which == "v2")


def _vllms_revision() -> Outcome:
    directory = Path(tempfile.mkdtemp())
    try:
        _revisions(directory)
        said = _said(CONFIGURE, directory)
    finally:
        shutil.rmtree(directory)
    usable = len(said.removeprefix("usable:").split()) if said.startswith("usable:") else said
    return Outcome(f"masks of the revision that vLLM runs that are usable: {usable}", usable not in (0, said))


def _load_format() -> Outcome:
    from types import SimpleNamespace

    import torch
    from safetensors.torch import save_file
    from vllm.config import LoadConfig

    from crane_serve.common.models.errors import CheckpointError
    from crane_serve.engine.weights import require_same_weights
    from tests.tiny import tiny_model

    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = tiny_model("llama", Path(directory))
        save_file({"other": torch.ones(3)}, checkpoint / "consolidated.safetensors")
        model = SimpleNamespace(model=str(checkpoint), revision=None)
        try:
            require_same_weights(
                SimpleNamespace(load_config=LoadConfig(load_format="mistral"), model_config=model), checkpoint
            )
        except CheckpointError:
            return Outcome("refused", True)
    return Outcome("served with the fingerprint of other files", False)


CASES = {
    "bin-weights": Case(
        8, "two pytorch_model.bin that differ in one weight of the sample", "two fingerprints", _bin_files
    ),
    "serve-revision": Case(8, "`crane serve HUB_ID --revision v2`", "v2 is served", _served_revision),
    "vllm-revision": Case(
        8, "vLLM's own server with --revision v2, and masks of v2", "the fingerprint is of v2", _vllms_revision
    ),
    "load-format": Case(
        8, "`--load-format mistral` with consolidated.safetensors beside the model's", "refused", _load_format
    ),
}
