"""Scores: what each method says about every neuron and language, with where it comes from."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import crane_serve
from crane_serve.atomic import write_atomically
from crane_serve.masks import Fingerprint
from relevance.method import Shape

FORMAT_VERSION = 1
_METADATA_KEY = "crane-scores"


class ScoresError(ValueError):
    """A scores file cannot be read, or does not hold what is asked for; the message names the file or method."""


class ScoresInfo(BaseModel):
    """Which model and texts the scores come from. The counts are per language, in the order of `languages`."""

    model_config = ConfigDict(frozen=True)

    languages: tuple[str, ...]
    fingerprint: Fingerprint
    corpus_digest: str
    split: str | None
    documents: tuple[int, ...]
    tokens: tuple[int, ...]  # without start tokens
    truncated: tuple[int, ...]  # documents cut to max_tokens
    skipped: tuple[int, ...]  # documents without a token to predict
    max_tokens: int
    dtype: str
    created_by: str = f"crane-serve {crane_serve.__version__}"


class _Metadata(ScoresInfo):
    format_version: int
    digest: str


@dataclass(frozen=True, eq=False)
class Scores:
    """by_method: method name -> float32 [languages, layers, widest] on the CPU, 0 in padding.

    Raises ScoresError for a tensor of another shape or dtype.
    """

    by_method: Mapping[str, Tensor]
    info: ScoresInfo

    def __post_init__(self) -> None:
        if not self.by_method:
            raise ScoresError("scores of no method")
        for method, scores in self.by_method.items():
            if tuple(scores.shape) != self.shape.tensor or scores.dtype != torch.float32:
                raise ScoresError(
                    f"scores of {method} are {scores.dtype} {list(scores.shape)}, "
                    f"expected torch.float32 {list(self.shape.tensor)}"
                )

    @cached_property
    def shape(self) -> Shape:
        return Shape(self.info.languages, self.info.fingerprint.intermediate_sizes)

    def of(self, method: str) -> Tensor:
        """Scores of `method`, float32 [languages, layers, widest]. Raises ScoresError naming those that exist."""
        scores = self.by_method.get(method)
        if scores is None:
            raise ScoresError(f"no scores of method {method!r}; there are scores of {', '.join(self.by_method)}")
        return scores

    def save(self, path: Path) -> None:
        """Write a safetensors file atomically, making its directory if that is missing."""
        tensors = {method: scores.contiguous() for method, scores in self.by_method.items()}
        metadata = _Metadata(**dict(self.info), format_version=FORMAT_VERSION, digest=_digest(tensors))
        content = save(tensors, metadata={_METADATA_KEY: metadata.model_dump_json()})
        write_atomically(path, content)

    @classmethod
    def load(cls, path: Path) -> "Scores":
        """Read and verify a scores file. Raises ScoresError for anything else."""
        try:
            with safe_open(path, framework="pt") as file:
                raw = (file.metadata() or {}).get(_METADATA_KEY)
                if raw is None:
                    raise ScoresError(f"{path}: no {_METADATA_KEY!r} metadata; this is not a scores file")
                metadata = _Metadata.model_validate_json(raw)
                if metadata.format_version != FORMAT_VERSION:
                    raise ScoresError(
                        f"{path}: format version {metadata.format_version}, this program reads {FORMAT_VERSION}"
                    )
                tensors = {method: file.get_tensor(method) for method in sorted(file.keys())}
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise ScoresError(f"{path}: metadata field {where!r}: {problem['msg']}") from error
        except (OSError, SafetensorError) as error:
            raise ScoresError(f"{path}: not a readable scores file: {error}") from error
        if _digest(tensors) != metadata.digest:
            raise ScoresError(f"{path}: the scores do not have the digest that the metadata says")
        try:
            return cls(tensors, ScoresInfo(**{field: getattr(metadata, field) for field in ScoresInfo.model_fields}))
        except ScoresError as error:
            raise ScoresError(f"{path}: {error}") from error


def _digest(tensors: Mapping[str, Tensor]) -> str:
    content = hashlib.sha256()
    for method in sorted(tensors):
        content.update(f"{method}{list(tensors[method].shape)}".encode())
        content.update(tensors[method].contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
