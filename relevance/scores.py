"""Scores of every neuron and language by each method, with their provenance."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import crane_serve
from crane_serve.common.atomic import write_atomically
from crane_serve.common.masks import Fingerprint, FingerprintError
from crane_serve.common.masks.files import METADATA_KEY, SCORES_KEY
from crane_serve.common.text.corpus import Form
from relevance.method import Shape

FORMAT_VERSION = 1
_OUTPUTS = "outputs/"  # in the file, a tensor with this prefix belongs to `outputs`
_MEANS = "typical/mean"  # in the file, the name of `means`


class ScoresError(ValueError):
    """A scores file cannot be read, or does not have the requested scores; the message names the file or method."""


class Texts(BaseModel):
    """The texts that scores come from: the digest of a corpus, its split, and its normal form if it was converted to
    one."""

    model_config = ConfigDict(frozen=True)

    corpus_digest: str
    split: str | None
    normalised: Form | None = None


class ScoresInfo(BaseModel):
    """The model and the texts that the scores come from. The counts are per language, in the order of `languages`.

    normalised: the form of Unicode that the texts were converted to. text_keys: language -> the 20,000 smallest
    `text_key` of its documents, sorted and concatenated; empty in older files. other_texts: by method, for methods
    whose scores come from other texts than `corpus_digest` and `split` describe.
    """

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
    normalised: Form | None = None
    text_keys: dict[str, str] = Field(default_factory=dict)
    other_texts: dict[str, Texts] = Field(default_factory=dict)
    created_by: str = f"crane-serve {crane_serve.__version__}"

    def texts(self, method: str) -> Texts:
        """The texts that the scores of `method` come from."""
        return self.other_texts.get(method, self.own_texts)

    @property
    def own_texts(self) -> Texts:
        """The texts of the methods that `other_texts` does not list."""
        return Texts(corpus_digest=self.corpus_digest, split=self.split, normalised=self.normalised)


class _Metadata(ScoresInfo):
    format_version: int
    digest: str


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of every neuron by method, and of the MLPs' output dimensions by the methods that have them.

    by_method: method name -> float32 [languages, layers, widest] on the CPU, 0 in padding.
    outputs: method name -> float32 [languages, layers, hidden] on the CPU.
    means: float32 [languages, layers, widest] on the CPU, the mean activation of each neuron; None in files of earlier
    versions, and where nothing was measured.

    Raises ScoresError for a tensor of another shape or dtype, and for outputs of a method without scores.
    """

    by_method: Mapping[str, Tensor]
    info: ScoresInfo
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    means: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_method", MappingProxyType(dict(self.by_method)))
        object.__setattr__(self, "outputs", MappingProxyType(dict(self.outputs)))
        if not self.by_method:
            raise ScoresError("scores of no method")
        for method, scores in self.by_method.items():
            _require(f"scores of {method}", scores, self.shape.tensor)
        if self.means is not None:
            _require("mean activations", self.means, self.shape.tensor)
        languages, layers, _ = self.shape.tensor
        for method, scores in self.outputs.items():
            if method not in self.by_method:
                raise ScoresError(f"there are output scores of {method}, but none of its neurons")
            _require(f"output scores of {method}", scores, (languages, layers, self.info.fingerprint.hidden_size))

    @cached_property
    def shape(self) -> Shape:
        """The languages and neurons that are scored."""
        return Shape(self.info.languages, self.info.fingerprint.intermediate_sizes)

    def of(self, method: str) -> Tensor:
        """Scores of `method`, float32 [languages, layers, widest]. Raises ScoresError naming those that exist."""
        scores = self.by_method.get(method)
        if scores is None:
            raise ScoresError(f"no scores of method {method!r}; there are scores of {', '.join(self.by_method)}")
        return scores

    def outputs_of(self, method: str) -> Tensor:
        """Scores of output dimensions, float32 [languages, layers, hidden]. Raises ScoresError as `of` does."""
        scores = self.outputs.get(method)
        if scores is None:
            existing = f"there are of {', '.join(self.outputs)}" if self.outputs else "there are of no method"
            raise ScoresError(f"no scores of output dimensions of method {method!r}; {existing}")
        return scores

    def merged(self, other: "Scores") -> "Scores":
        """The scores of both, which must have no method in common. The counts in `info` remain those of this one.

        Methods of `other` keep the texts they come from (`ScoresInfo.texts`).
        Raises ScoresError for another model, other languages, or a method that both have.
        """
        if other.info.languages != self.info.languages:
            raise ScoresError(
                f"scores of the languages {', '.join(other.info.languages)} cannot join those of "
                f"{', '.join(self.info.languages)}"
            )
        try:
            self.info.fingerprint.require(other.info.fingerprint, "the other scores file")
        except FingerprintError as error:
            raise ScoresError(str(error)) from error
        common = self.by_method.keys() & other.by_method.keys()
        if common:
            raise ScoresError(f"both hold scores of {', '.join(sorted(common))}; expected each method once")
        mine = self.info.own_texts
        joined = {method: texts for method in other.by_method if (texts := other.info.texts(method)) != mine}
        return Scores(
            {**self.by_method, **other.by_method},
            self.info.model_copy(update={"other_texts": {**self.info.other_texts, **joined}}),
            {**self.outputs, **other.outputs},
            other.means if self.means is None else self.means,
        )

    def save(self, path: Path) -> None:
        """Write a safetensors file atomically, making its directory if that is missing."""
        tensors = {method: scores.contiguous() for method, scores in self.by_method.items()}
        tensors |= {f"{_OUTPUTS}{method}": scores.contiguous() for method, scores in self.outputs.items()}
        tensors |= {} if self.means is None else {_MEANS: self.means.contiguous()}
        metadata = _Metadata(**dict(self.info), format_version=FORMAT_VERSION, digest=_digest(tensors))
        content = save(tensors, metadata={SCORES_KEY: metadata.model_dump_json()})
        write_atomically(path, content)

    @classmethod
    def load(cls, path: Path) -> "Scores":
        """Read and verify a scores file. Raises ScoresError for anything else."""
        try:
            with safe_open(path, framework="pt") as file:
                keys = file.metadata() or {}
                raw = keys.get(SCORES_KEY)
                if raw is None:
                    what = " but a mask file" if METADATA_KEY in keys else ""
                    raise ScoresError(f"{path}: no {SCORES_KEY!r} metadata; this is not a scores file{what}")
                metadata = _Metadata.model_validate_json(raw)
                if metadata.format_version != FORMAT_VERSION:
                    raise ScoresError(
                        f"{path}: format version {metadata.format_version}, this program reads {FORMAT_VERSION}"
                    )
                tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            place = f"metadata field {where!r}" if where else f"metadata {SCORES_KEY!r}"
            raise ScoresError(f"{path}: {place}: {problem['msg']}") from error
        except (OSError, SafetensorError) as error:
            raise ScoresError(f"{path}: not a readable scores file: {error}") from error
        if _digest(tensors) != metadata.digest:
            raise ScoresError(f"{path}: the scores do not have the digest that the metadata says")
        means = tensors.pop(_MEANS, None)
        outputs = {key.removeprefix(_OUTPUTS): tensor for key, tensor in tensors.items() if key.startswith(_OUTPUTS)}
        by_method = {key: tensor for key, tensor in tensors.items() if not key.startswith(_OUTPUTS)}
        info = ScoresInfo(**{name: getattr(metadata, name) for name in ScoresInfo.model_fields})
        try:
            return cls(by_method, info, outputs, means)
        except ScoresError as error:
            raise ScoresError(f"{path}: {error}") from error


def _require(what: str, scores: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(scores.shape) != shape or scores.dtype != torch.float32:
        raise ScoresError(f"{what} are {scores.dtype} {list(scores.shape)}, expected torch.float32 {list(shape)}")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    content = hashlib.sha256()
    for key in sorted(tensors):
        content.update(f"{key}{list(tensors[key].shape)}".encode())
        content.update(tensors[key].contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
