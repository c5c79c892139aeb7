"""Scores of every neuron and language by each method, with their provenance."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

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
# In the file, tensors with these prefixes belong to fields by method, and those of these names to others.
_BY_METHOD = {"outputs": "outputs/", "spreads": "spread/", "on_random": "random-tokens/"}
_NAMED = {"means": "typical/mean", "medians": "typical/median", "shares": "typical/share"}


class ScoresError(ValueError):
    """A scores file cannot be read, or does not have the requested scores; the message names the file or method."""


class Texts(BaseModel):
    """The texts that scores come from: the digest of a corpus, its split, and its normal form if it was converted to
    one."""

    model_config = ConfigDict(frozen=True)

    corpus_digest: str
    split: str | None
    normalised: Form | None = None


class Search(BaseModel):
    """How a search made its scores.

    intervention: what became of the neurons that it switched off, as `Intervention.of` reads it; target: what the
    language was to lose, as `learning.Target`. neurons: the number that it was made for; seeds: of the runs that the
    scores are the mean of. jaccard, rank_correlation: by language, the agreement of these runs: see `agreement.Agreed`;
    empty for one run.
    """

    model_config = ConfigDict(frozen=True)

    intervention: str = "zero"
    target: str = "loss"
    neurons: int | None = None
    seeds: tuple[int, ...] = ()
    jaccard: dict[str, float] = Field(default_factory=dict)
    rank_correlation: dict[str, float] = Field(default_factory=dict)


class ScoresInfo(BaseModel):
    """The model and the texts that the scores come from. The counts are per language, in the order of `languages`.

    normalised: the form of Unicode that the texts were converted to. text_keys: language -> the 20,000 smallest
    `text_key` of its documents, sorted and concatenated; empty in older files. other_texts: by method, for methods
    whose scores come from other texts than `corpus_digest` and `split` describe. searches: by method, for those that
    are searches; empty in older files.
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
    searches: dict[str, Search] = Field(default_factory=dict)
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
    means, medians: float32 [languages, layers, widest] on the CPU, mean and median activation of each neuron; shares:
    alike, of a mixture of experts, the share of tokens that have the neuron; for `typical`. None in files of earlier
    versions, and where nothing was measured.
    spreads: method name -> float32 [languages, layers, widest] on the CPU, the standard deviation of its scores between
    the seeds of a search. on_random: method name -> float32 [layers, widest] on the CPU, its scores on random tokens.

    Raises ScoresError for a tensor of another shape or dtype, and for outputs, spreads or scores on random tokens of a
    method without scores.
    """

    by_method: Mapping[str, Tensor]
    info: ScoresInfo
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    means: Tensor | None = None
    spreads: Mapping[str, Tensor] = field(default_factory=dict)
    on_random: Mapping[str, Tensor] = field(default_factory=dict)
    medians: Tensor | None = None
    shares: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("by_method", *_BY_METHOD):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        if not self.by_method:
            raise ScoresError("scores of no method")
        for method, scores in self.by_method.items():
            _require(f"scores of {method}", scores, self.shape.tensor)
        for name in _NAMED:
            if getattr(self, name) is not None:
                _require(name, getattr(self, name), self.shape.tensor)
        languages, layers, _ = self.shape.tensor
        for name, what, shape in (
            ("outputs", "output scores", (languages, layers, self.info.fingerprint.hidden_size)),
            ("spreads", "spreads", self.shape.tensor),
            ("on_random", "scores on random tokens", self.shape.tensor[1:]),
        ):
            for method, scores in getattr(self, name).items():
                if method not in self.by_method:
                    raise ScoresError(f"there are {what} of {method}, but none of its neurons")
                _require(f"{what} of {method}", scores, shape)

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

    def on_random_of(self, method: str) -> Tensor:
        """Scores on random tokens, float32 [layers, widest]. Raises ScoresError naming those that exist."""
        scores = self.on_random.get(method)
        if scores is None:
            existing = f"there are of {', '.join(self.on_random)}" if self.on_random else "there are of no method"
            raise ScoresError(
                f"no scores of method {method!r} on random tokens; {existing}. `crane relevance --random-tokens` makes "
                "them, of methods that look at activations alone and at one language at a time"
            )
        return scores

    def typical(self, median: bool = False) -> Tensor:
        """Mean or median activation of each neuron, float32 [languages, layers, widest]; of a neuron of an expert over
        the tokens that have it, and 0 where none has.

        Raises ScoresError where they were not measured.
        """
        if median:
            if self.medians is None:
                raise ScoresError(
                    "these scores come without median activations; `crane relevance --medians` writes them"
                )
            return self.medians
        whole = self.info.fingerprint.experts is None
        if self.means is None or not (whole or self.shares is not None):
            what = "mean activations" if self.means is None else "how many tokens have an expert, for mean activations"
            raise ScoresError(f"these scores come without {what}; `crane relevance` of this version writes them")
        return self.means if self.shares is None else torch.where(self.shares > 0, self.means / self.shares, 0)

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
        both = {
            "other_texts": {**self.info.other_texts, **joined},
            "searches": {**self.info.searches, **other.info.searches},
        }
        of_means = other if self.means is None else self
        return Scores(
            {**self.by_method, **other.by_method},
            self.info.model_copy(update=both),
            {**self.outputs, **other.outputs},
            of_means.means,
            {**self.spreads, **other.spreads},
            {**self.on_random, **other.on_random},
            other.medians if self.medians is None else self.medians,
            of_means.shares,
        )

    def replaced(self, method: str, scores: Tensor, search: Search, spread: Tensor | None = None) -> "Scores":
        """With the scores of a search in the place of those of `method`, if there are any. Both [languages, layers,
        widest]."""
        spreads = {of: values for of, values in self.spreads.items() if of != method}
        return replace(
            self,
            by_method={**self.by_method, method: scores},
            info=self.info.model_copy(update={"searches": {**self.info.searches, method: search}}),
            spreads=spreads if spread is None else {**spreads, method: spread},
        )

    def save(self, path: Path) -> None:
        """Write a safetensors file atomically, making its directory if that is missing."""
        tensors = {method: scores.contiguous() for method, scores in self.by_method.items()}
        for name, prefix in _BY_METHOD.items():
            tensors |= {f"{prefix}{method}": values.contiguous() for method, values in getattr(self, name).items()}
        for name, key in _NAMED.items():
            tensors |= {} if getattr(self, name) is None else {key: getattr(self, name).contiguous()}
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
        fields: dict[str, Any] = {name: tensors.pop(key, None) for name, key in _NAMED.items()}
        for name, prefix in _BY_METHOD.items():
            keys_of = [key for key in tensors if key.startswith(prefix)]
            fields[name] = {key.removeprefix(prefix): tensors.pop(key) for key in keys_of}
        info = ScoresInfo(**{name: getattr(metadata, name) for name in ScoresInfo.model_fields})
        try:
            return cls(tensors, info, **fields)
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
