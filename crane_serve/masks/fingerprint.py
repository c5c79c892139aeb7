"""Fingerprint: which model a mask was made for."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

# Written by libraries and users around the model; they do not change what a neuron index means.
_VOLATILE_CONFIG_KEYS = {"transformers_version", "dtype", "torch_dtype", "use_cache"}
_SAMPLE_BYTES = 4096


class FingerprintError(ValueError):
    """A directory is not a checkpoint whose fingerprint can be taken, or two fingerprints differ."""


class Fingerprint(BaseModel):
    """Identity of a checkpoint: architecture, sizes, and digests of its config and weights.

    The weights digest covers every tensor's name, dtype and shape and a 4 KiB sample from its middle, so that a
    fine-tuned checkpoint of the same shape is told apart without reading all weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    layers: int
    hidden_size: int
    intermediate_sizes: tuple[int, ...]
    config_digest: str
    weights_digest: str

    @classmethod
    def of(cls, checkpoint: Path) -> "Fingerprint":
        """Fingerprint of a local Hugging Face checkpoint. Raises FingerprintError if it is not one."""
        from transformers import AutoConfig

        config_file = checkpoint / "config.json"
        try:
            raw = json.loads(config_file.read_text())
            config = AutoConfig.from_pretrained(checkpoint).get_text_config()
            layers, hidden_size = int(config.num_hidden_layers), int(config.hidden_size)
        except Exception as error:  # what transformers raises for a bad config has no common base
            raise FingerprintError(f"{checkpoint} is not a Hugging Face checkpoint: {error}") from error
        return cls(
            architecture=str((raw.get("architectures") or [raw.get("model_type", "unknown")])[0]),
            layers=layers,
            hidden_size=hidden_size,
            intermediate_sizes=intermediate_sizes(config, layers),
            config_digest=_config_digest(raw),
            weights_digest=_weights_digest(checkpoint),
        )

    def require(self, other: "Fingerprint", what: str) -> None:
        """Raise FingerprintError naming the first difference, unless `other` (of `what`) is the same model."""
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise FingerprintError(
                    f"{what} was made for another model: its {name} is {_short(theirs)}, this model has {_short(mine)}"
                )


def _short(value: object) -> str:
    text = f"{value[:3]}... ({len(value)} layers)" if isinstance(value, tuple) and len(value) > 4 else str(value)
    return text[:16] + "..." if len(text) == 64 else text


def intermediate_sizes(config: Any, layers: int) -> tuple[int, ...]:
    """The number of MLP neurons of each layer, from a transformers config of the language model."""
    for key in ("intermediate_size", "ffn_dim", "n_inner"):
        size = getattr(config, key, None)
        if isinstance(size, int):
            return (size,) * layers
        if isinstance(size, list | tuple):
            return tuple(int(value) for value in size)
    return (4 * int(config.hidden_size),) * layers  # BLOOM and GPT-2 leave it implicit


def _config_digest(raw: dict[str, Any]) -> str:
    stable = {key: value for key, value in raw.items() if key not in _VOLATILE_CONFIG_KEYS and not key.startswith("_")}
    return hashlib.sha256(json.dumps(stable, sort_keys=True).encode()).hexdigest()


def _weights_digest(checkpoint: Path) -> str:
    entries: list[bytes] = []
    shards = sorted(checkpoint.glob("*.safetensors"))
    for shard in shards:
        entries += _safetensors_entries(shard)
    if not shards:  # legacy checkpoints: names and sizes are all that can be read without unpickling
        entries = [f"{path.name}:{path.stat().st_size}".encode() for path in checkpoint.glob("*.bin")]
    if not entries:
        raise FingerprintError(f"{checkpoint} holds no weights (*.safetensors or *.bin)")
    digest = hashlib.sha256()
    for entry in sorted(entries):  # by tensor name: how a checkpoint is cut into shards does not matter
        digest.update(entry)
    return digest.hexdigest()


def _safetensors_entries(shard: Path) -> list[bytes]:
    entries = []
    try:
        with shard.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > shard.stat().st_size:
                raise ValueError("header is longer than the file")
            header = json.loads(file.read(header_bytes))
            header.pop("__metadata__", None)
            for name, tensor in header.items():
                start, end = tensor["data_offsets"]
                middle = max(start, (start + end - _SAMPLE_BYTES) // 2)
                file.seek(8 + header_bytes + middle)
                sample = file.read(min(_SAMPLE_BYTES, end - middle))
                entries.append(f"{name}|{tensor['dtype']}|{tensor['shape']}|".encode() + sample)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise FingerprintError(f"{shard} is not a safetensors file: {error}") from error
    return entries
