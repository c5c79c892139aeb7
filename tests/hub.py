"""A cache of the Hugging Face Hub, written by hand: revisions of a model, without the network."""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path


def cached(cache: Path, model: str, revisions: Mapping[str, Path]) -> dict[str, str]:
    """Put checkpoints into `cache` as revisions of a hub id. revisions: branch or tag -> checkpoint; the commits."""
    store = cache / f"models--{model.replace('/', '--')}"
    commits = {}
    for number, (name, checkpoint) in enumerate(revisions.items(), start=1):
        commits[name] = f"{number:040x}"
        shutil.copytree(checkpoint, store / "snapshots" / commits[name])
        (store / "refs").mkdir(exist_ok=True)
        (store / "refs" / name).write_text(commits[name])
    return commits


def offline(cache: Path) -> dict[str, str]:
    """The environment of a process that knows the Hub by this cache only."""
    return {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
