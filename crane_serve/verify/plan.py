"""The input and the results of the processes of a verification, as JSON files."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter

from crane_serve.common.atomic import append_whole, write_atomically
from crane_serve.common.masks import Fingerprint
from crane_serve.engine.offline import Answer, EngineFacts
from crane_serve.verify.checks import Check
from crane_serve.verify.generated import TrialMasks

_T = TypeVar("_T")


@dataclass(frozen=True)
class Plain:
    """Results of vLLM without the plugin: the unmasked batch, the same batch again, and tokens per second if they are
    measured."""

    batch: tuple[Answer, ...]
    again: tuple[Answer, ...]
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Reference:
    """Log-probabilities by transformers: [masks][texts][tokens after the first]; mask None is unmasked.

    rounded: the same in the low precision that the engine computes in, if `dtype` is float32 and the engine's is not.
    """

    dtype: str
    texts: tuple[tuple[int, ...], ...]
    masks: tuple[str | None, ...]
    logprobs: tuple[tuple[tuple[float, ...], ...], ...]
    rounded: tuple[tuple[tuple[float, ...], ...], ...] | None = None


class ProcessPlan(BaseModel):
    """The input of a process. outcome: the file for its results; plain, reference: the result files of earlier
    processes, if any."""

    model_config = ConfigDict(frozen=True)

    model: Path
    flags: tuple[str, ...]
    fingerprint: Fingerprint
    outcome: Path
    throughput: bool
    float32: bool  # whether the engine was asked for float32
    trust_remote_code: bool
    directory: Path  # of the masks
    masks: TrialMasks | None  # None for an engine without the plugin
    plain: Path
    reference: Path

    @classmethod
    def load(cls, path: Path) -> "ProcessPlan":
        """The plan in a file. Raises pydantic's ValidationError, a ValueError, for anything else."""
        return cls.model_validate_json(path.read_text())

    def save(self, path: Path) -> None:
        """Write it to a file, as JSON."""
        write_atomically(path, self.model_dump_json().encode())


class Outcome:
    """A file of results, written one by one, so that the results of a process that died are not lost."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def record(self, **results: Any) -> None:
        """Append results by name: facts, check, plain, reference or error."""
        plain = {name: asdict(value) if is_dataclass(value) else value for name, value in results.items()}  # type: ignore[arg-type]
        with self._path.open("ab", buffering=0) as file:
            append_whole(
                file, json.dumps(plain).encode() + b"\n"
            )  # Python's own JSON keeps numbers that are not finite

    @property
    def error(self) -> str | None:
        """What ended the process early, if anything."""
        return next(iter(self._read("error", str)), None)

    @property
    def facts(self) -> EngineFacts | None:
        """What the engine says of itself, if it started."""
        return next(iter(self._read("facts", EngineFacts)), None)

    @property
    def plain(self) -> Plain | None:
        """The answers of vLLM without the plugin, if it gave them."""
        return next(iter(self._read("plain", Plain)), None)

    @property
    def reference(self) -> Reference | None:
        """The log-probabilities of transformers, if they were computed."""
        return next(iter(self._read("reference", Reference)), None)

    @property
    def checks(self) -> list[Check]:
        """The checks that were made."""
        return self._read("check", Check)

    def _read(self, name: str, kind: type[_T]) -> list[_T]:
        lines = (
            self._path.read_bytes().split(b"\n")[:-1] if self._path.exists() else []
        )  # a process may die in the last
        records: list[Mapping[str, Any]] = [json.loads(line) for line in lines]
        return [TypeAdapter(kind).validate_python(record[name]) for record in records if name in record]


def describe(error: BaseException) -> str:
    """An error as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
