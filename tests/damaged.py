"""Copies of checkpoints in which something is missing, renamed, or of another form."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
DOWN = "model.layers.1.mlp.down_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def copied(checkpoint: Path, to: Path) -> Path:
    return Path(shutil.copytree(checkpoint, to))


def change_config(checkpoint: Path, **changes: Any) -> Path:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return checkpoint


def change_tensors(checkpoint: Path, change: Callable[[Tensors], Tensors]) -> Path:
    file = checkpoint / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in change(load_file(file)).items()}, file, {"format": "pt"})
    return checkpoint


def without(checkpoint: Path, *names: str) -> Path:
    return change_tensors(checkpoint, lambda held: {name: held[name] for name in held if name not in names})


def sharded(checkpoint: Path, shards: int = 2, *, suffix: str = ".safetensors", stem: str = "model") -> list[Path]:
    """Cut the one file of weights into shards with an index, in the form that `suffix` names."""
    single = checkpoint / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    names, weight_map, files = sorted(tensors), {}, []
    for number in range(shards):
        file = checkpoint / f"{stem}-{number + 1:05}-of-{shards:05}{suffix}"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, file, {"format": "pt"}) if suffix == ".safetensors" else torch.save(part, file)
        weight_map |= dict.fromkeys(part, file.name)
        files.append(file)
    (checkpoint / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def pickled(checkpoint: Path) -> Path:
    """The weights as one `pytorch_model.bin`."""
    single = checkpoint / "model.safetensors"
    torch.save(load_file(single), checkpoint / "pytorch_model.bin")
    single.unlink()
    return checkpoint
