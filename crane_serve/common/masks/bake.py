"""Baking: a checkpoint whose weights are those of a model under a mask, for programs that know nothing of masks."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crane_serve.common.masks.files import StoredMask
from crane_serve.common.masks.fingerprint import Fingerprint
from crane_serve.common.masks.mask import NeuronMask
from crane_serve.common.models.experts import expert_modules
from crane_serve.common.models.load import load_causal_lm
from crane_serve.common.models.mlps import language_model, require_mlps
from crane_serve.common.models.weights import weight_files

RECORD = "crane-mask.json"
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")  # in any form


class BakeError(ValueError):
    """A mask cannot become a part of the weights, or there is something in the place of the new checkpoint."""


def bake(checkpoint: Path, stored: StoredMask, out: Path) -> None:
    """Write `checkpoint` into the directory `out`, the last projections of its MLPs times the mask's scales.

    Offsets become a bias of the projections. Neurons that are off are off exactly. Other scales are rounded in the
    checkpoint's dtype, and so are not the same to the bit as when served. All other files are copied; RECORD says which
    mask it was. Raises BakeError for a mask of routers, which no weights can express, for offsets where projections
    have no bias, and for an `out` that exists; FingerprintError for a mask of another model; CheckpointError.
    """
    fingerprint = Fingerprint.of(checkpoint)
    fingerprint.require(stored.info.fingerprint, f"mask {stored.name!r}")
    if stored.mask.router is not None:
        raise BakeError(f"mask {stored.name!r} keeps routers from choosing experts; no weights do that")
    if out.exists():
        raise BakeError(f"{out} exists; expected a directory that does not")
    model: Any = load_causal_lm(checkpoint, "auto")
    bake_into(model, stored.mask, fingerprint)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as directory:
        aside = Path(directory) / "checkpoint"
        model.save_pretrained(aside)
        _copy_others(checkpoint, aside)
        record = {"mask": stored.name, "digest": stored.mask.digest, **stored.info.model_dump(mode="json")}
        (aside / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        aside.rename(out)


@torch.no_grad()
def bake_into(model: nn.Module, mask: NeuronMask, fingerprint: Fingerprint) -> None:
    """Change the weights of a model of transformers in place. fingerprint: of the model.

    Raises BakeError for offsets that have no bias to go into, and UnsupportedModelError.
    """
    decoder, dense, experts = language_model(model), fingerprint.dense_sizes, fingerprint.experts
    for layer, mlp in require_mlps(decoder, dense, beside_experts=experts is not None).items():
        weight, bias = mlp.projection.weight, getattr(mlp.projection, "bias", None)
        is_transposed = type(mlp.projection).__name__ == "Conv1D"
        if mask.offset is not None:
            if bias is None:
                raise BakeError(f"{mlp.name}: its projection has no bias, in which the mask's offsets could go")
            columns = weight.T if is_transposed else weight  # [hidden, neurons]
            bias.copy_(bias.float() + columns.float() @ mask.offset[layer, : dense[layer]].to(weight.device))
        _scale(weight, mask.intermediate[layer, : dense[layer]], dim=0 if is_transposed else 1)
        if mask.output is not None:
            _scale(weight, mask.output[layer], dim=1 if is_transposed else 0)
            if bias is not None:
                _scale(bias, mask.output[layer], dim=0)
    if experts is not None:
        if mask.offset is not None:
            raise BakeError("offsets of neurons of experts cannot be baked")
        for layer, module in expert_modules(decoder).items():
            scales = mask.intermediate[layer, experts.columns(layer, mask.intermediate_sizes)]
            held: Any = module
            by_expert = scales.view(experts.count, experts.size).unsqueeze(2 if held.is_transposed else 1)
            held.down_proj.copy_(held.down_proj.float() * by_expert.to(held.down_proj.device))


def _scale(weight: Tensor, scales: Tensor, dim: int) -> None:
    """In place. scales: as many as `weight` has along `dim`."""
    shape = [-1 if place == dim else 1 for place in range(weight.dim())]
    weight.copy_(weight.float() * scales.to(weight.device).view(shape))


def _copy_others(checkpoint: Path, out: Path) -> None:
    """Files that are neither weights nor written already: tokenizer, processor, licence."""
    weights = {path.name for path in weight_files(checkpoint)}
    for path in sorted(checkpoint.iterdir()):
        is_other = path.is_file() and path.name not in weights and not path.name.endswith(_WEIGHTS)
        if is_other and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)
