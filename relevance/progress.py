"""Progress: the accumulated state on disk, so that a killed run can continue where it stopped."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import crane_serve
from crane_serve.common.atomic import write_atomically
from crane_serve.common.masks import Fingerprint
from relevance.accumulators import GrowingStatistic, StatisticError
from relevance.method import Measured

FORMAT_VERSION = 1
_METADATA_KEY = "crane-progress"


class ProgressError(ValueError):
    """The progress is of another run, or cannot be read; the message names the file and says what to do."""


class ScoringPlan(BaseModel):
    """Everything that determines what is accumulated. Runs with equal plans may continue each other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: Fingerprint
    corpus_digest: str
    languages: tuple[str, ...]
    methods: tuple[str, ...]
    output_dimensions: bool
    max_tokens: int
    batch_tokens: int
    dtype: str
    device: str
    shards: int
    format_version: int = FORMAT_VERSION
    created_by: str = f"crane-serve {crane_serve.__version__}, torch {torch.__version__}"

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the plan."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class Done(BaseModel):
    """The progress of one shard of one language: numbers of batches and documents in its state, and of pieces beside
    it."""

    model_config = ConfigDict(frozen=True)

    batches: int = 0
    documents: int = 0
    pieces: int = 0


class _Metadata(Done):
    plan: str  # digest


class Progress:
    """A directory with the state of every shard and language after its last batch.

    `{language}-{shard}-of-{shards}.safetensors` is replaced after every batch. Before that, growing statistics write a
    piece `....piece-{n}.safetensors`, which is valid once the state counts it. All files are written atomically.
    """

    def __init__(self, directory: Path, plan: ScoringPlan) -> None:
        self.directory = directory
        self.plan = plan

    @classmethod
    def open(cls, directory: Path, plan: ScoringPlan, restart: bool = False) -> "Progress":
        """The progress of `plan`, continued from an earlier run with the same plan; with `restart` it begins empty.

        Raises ProgressError when the directory holds the progress of another plan, naming the differences.
        """
        if restart:
            shutil.rmtree(directory, ignore_errors=True)
        file = directory / "plan.json"
        if file.exists():
            try:
                before = ScoringPlan.model_validate_json(file.read_bytes())
            except ValidationError as error:
                raise _unreadable(file, "not the plan of a run") from error
            if different := [name for name in ScoringPlan.model_fields if getattr(before, name) != getattr(plan, name)]:
                raise ProgressError(
                    f"{directory} holds the progress of another run ({', '.join(different)} differ); finish that run, "
                    "or pass --restart to discard it"
                )
        else:
            write_atomically(file, plan.model_dump_json(indent=1).encode())
        return cls(directory, plan)

    def save(self, shard: int, language: str, done: Done, methods: Sequence[Measured]) -> Done:
        """Write the state of `methods` after so many batches; returns `done` with its pieces."""
        if news := _tensors(methods, growing=True):
            write_atomically(self._piece(shard, language, done.pieces), save(news))
            done = done.model_copy(update={"pieces": done.pieces + 1})
        metadata = _Metadata(**dict(done), plan=self.plan.digest)
        content = save(_tensors(methods, growing=False), metadata={_METADATA_KEY: metadata.model_dump_json()})
        write_atomically(self._state(shard, language), content)
        return done

    def load(self, shard: int, language: str, methods: Sequence[Measured]) -> Done:
        """Load the last saved state into `methods`, which must be empty. Raises ProgressError."""
        file = self._state(shard, language)
        if not file.exists():
            return Done()
        done, tensors = self._read(file)
        pieces = [_tensors_of(self._piece(shard, language, number)) for number in range(done.pieces)]
        for method in methods:
            for name, statistic in method.statistics.items():
                prefix = f"{method.name}/{name}/"
                try:
                    if isinstance(statistic, GrowingStatistic):
                        for piece in pieces:
                            if part := _under(prefix, piece):
                                arrived = statistic.empty()
                                arrived.load(part)
                                statistic.merge(arrived)
                    else:
                        statistic.load(_under(prefix, tensors))
                except StatisticError as error:
                    raise _unreadable(file, f"{prefix}: {error}") from error
        return done

    def documents(self) -> int:
        """Number of documents that all shards together have done."""
        states = (path for path in self.directory.glob("*.safetensors") if ".piece-" not in path.name)
        return sum(self._read(path, state=False)[0].documents for path in states if not path.name.startswith("."))

    def remove(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _state(self, shard: int, language: str) -> Path:
        return self.directory / f"{language}-{shard}-of-{self.plan.shards}.safetensors"

    def _piece(self, shard: int, language: str, number: int) -> Path:
        return self._state(shard, language).with_suffix(f".piece-{number:06}.safetensors")

    def _read(self, path: Path, state: bool = True) -> tuple[Done, dict[str, Tensor]]:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = _Metadata.model_validate_json((file.metadata() or {}).get(_METADATA_KEY, ""))
                tensors = {key: file.get_tensor(key) for key in file.keys()} if state else {}  # noqa: SIM118
        except (OSError, SafetensorError, ValidationError) as error:
            raise _unreadable(path, "not the state of a run") from error
        if metadata.plan != self.plan.digest:
            raise _unreadable(path, "the state of another run")
        return Done(**{name: getattr(metadata, name) for name in Done.model_fields}), tensors


def _tensors(methods: Sequence[Measured], growing: bool) -> dict[str, Tensor]:
    """The state of all statistics by `{method}/{statistic}/{tensor}`; of growing statistics, only the new rows."""
    state: dict[str, Tensor] = {}
    for method in methods:
        for name, statistic in method.statistics.items():
            if isinstance(statistic, GrowingStatistic):
                parts = statistic.news() if growing else {}
            else:
                parts = {} if growing else statistic.tensors()
            state |= {f"{method.name}/{name}/{part}": tensor.contiguous() for part, tensor in parts.items()}
    return state


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _tensors_of(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, "not a piece of a state") from error


def _unreadable(path: Path, why: str) -> ProgressError:
    return ProgressError(f"{path}: {why}; pass --restart to begin again")
