"""Matrix: how much worse the model predicts each language under each mask."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

import crane_serve
from clients.errors import EvaluationError
from clients.plan import UNMASKED, Item, Plan, PlannedMask
from clients.results import ItemResult
from crane_serve.statistics import CONFIDENCE, RESAMPLES, Estimate, change_per_token

MATRIX_FILE = "matrix.json"
TABLE_FILE = "matrix.csv"

_COLUMNS = (
    *("mask", "language", "mean", "low", "high", "nats_per_token", "perplexity", "bits_per_byte"),
    *("documents", "tokens", "mask_language", "method", "budget", "neurons", "mask_digest"),
)

Value = TypeVar("Value")


class CorpusInfo(BaseModel):
    """The text behind a matrix. split: None for a corpus used whole; limit: documents per language, None for all."""

    model_config = ConfigDict(frozen=True)

    digest: str
    split: str | None
    limit: int | None


class IntervalInfo(BaseModel):
    """How the intervals were made."""

    model_config = ConfigDict(frozen=True)

    method: str = "paired percentile bootstrap over documents"
    confidence: float = CONFIDENCE
    resamples: int = RESAMPLES
    seed: int = 0


class Failure(BaseModel):
    """An item without a result, and why."""

    model_config = ConfigDict(frozen=True)

    mask: str
    language: str
    document: str
    error: str


@dataclass(frozen=True)
class Profile:
    """What a mask does to the language it was made for and, on average, to the others, in nats per token.

    Raising a language's loss by more means more damage. None: there is no such language, or nothing was measured.
    """

    own: Estimate | None
    others: float | None

    @property
    def selectivity(self) -> float | None:
        """Change of the own language minus the mean change of the others."""
        return None if self.own is None or self.others is None else self.own.mean - self.others


class Matrix(BaseModel):
    """Masks x languages.

    delta_nats_per_token: change against `none`, over the documents that were scored under both; nats_per_token,
    perplexity (its exponential) and bits_per_byte: of the masked model itself. A cell is None where no document was
    scored. documents, tokens: per language, scored without a mask; seconds, tokens_per_second: over all scoring, of
    every session of the run; model: name and fingerprint; failed: items without a result.
    """

    model_config = ConfigDict(frozen=True)

    languages: tuple[str, ...]
    masks: tuple[str, ...]
    delta_nats_per_token: dict[str, dict[str, Estimate | None]]
    nats_per_token: dict[str, dict[str, float | None]]
    perplexity: dict[str, dict[str, float | None]]
    bits_per_byte: dict[str, dict[str, float | None]]
    documents: dict[str, int]
    tokens: dict[str, int]
    mask_info: dict[str, PlannedMask]
    model: dict[str, JsonValue]
    corpus: CorpusInfo
    intervals: IntervalInfo
    tokens_per_second: float
    seconds: float
    failed: tuple[Failure, ...] = ()
    created_by: str = f"crane-serve {crane_serve.__version__}"

    @classmethod
    def of(
        cls,
        plan: Plan,
        results: Mapping[Item, ItemResult],
        *,
        model: Mapping[str, JsonValue],
        failed: Sequence[Failure] = (),
        seed: int = 0,
    ) -> "Matrix":
        """The matrix of the planned items that have results. Raises EvaluationError if answers are contradictory."""
        planned = {item: results[item] for item in plan.items() if item in results}
        languages = tuple(plan.documents)
        cells = {
            (mask, language): [
                planned[item]
                for document in plan.documents[language]
                if (item := Item(mask, language, document)) in planned
            ]
            for mask in plan.masks
            for language in languages
        }
        levels = {cell: _Level.of(answers) for cell, answers in cells.items()}
        changes = {
            (mask, language): _change(answers, cells[UNMASKED, language], seed)
            for (mask, language), answers in cells.items()
        }
        seconds = _seconds(planned.values())
        tokens = sum(result.tokens for result in planned.values())
        return cls(
            languages=languages,
            masks=tuple(plan.masks),
            delta_nats_per_token=_nested(changes),
            nats_per_token=_nested({cell: level.nats_per_token if level else None for cell, level in levels.items()}),
            perplexity=_nested({cell: level.perplexity if level else None for cell, level in levels.items()}),
            bits_per_byte=_nested({cell: level.bits_per_byte if level else None for cell, level in levels.items()}),
            documents={language: len(cells[UNMASKED, language]) for language in languages},
            tokens={language: sum(result.tokens for result in cells[UNMASKED, language]) for language in languages},
            mask_info=plan.masks,
            model=dict(model),
            corpus=CorpusInfo(digest=plan.corpus.digest, split=plan.corpus.split, limit=plan.limit),
            intervals=IntervalInfo(seed=seed),
            tokens_per_second=tokens / seconds if seconds else 0.0,
            seconds=seconds,
            failed=tuple(failed),
        )

    @classmethod
    def read(cls, directory: Path) -> "Matrix":
        """The matrix in `directory`/matrix.json. Raises EvaluationError if there is none or it is malformed."""
        path = directory / MATRIX_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise EvaluationError(f"{path} cannot be read; expected the directory of an evaluation: {error}") from error
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise EvaluationError(f"{path} is not a matrix: {where}: {problem['msg']}") from error

    def profile(self, mask: str) -> Profile:
        """Own language against the others, for one of `masks`."""
        changes = self.delta_nats_per_token[mask]
        language = self.mask_info[mask].language
        others = [change.mean for name, change in changes.items() if name != language and change is not None]
        return Profile(changes.get(language) if language else None, float(np.mean(others)) if others else None)

    def write_json(self, directory: Path) -> Path:
        """Write `matrix.json` and return its path."""
        path = directory / MATRIX_FILE
        path.write_text(self.model_dump_json(indent=2) + "\n")
        return path

    def write_csv(self, directory: Path) -> Path:
        """Write `matrix.csv`, one row per mask and language, and return its path. Absent values are empty."""
        path = directory / TABLE_FILE
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._row(mask, language) for mask in self.masks for language in self.languages)
        return path

    def _row(self, mask: str, language: str) -> dict[str, object]:
        info = self.mask_info[mask]
        change = self.delta_nats_per_token[mask][language]
        return {
            "mask": mask,
            "language": language,
            **(change.model_dump() if change else {}),
            "nats_per_token": self.nats_per_token[mask][language],
            "perplexity": self.perplexity[mask][language],
            "bits_per_byte": self.bits_per_byte[mask][language],
            "documents": self.documents[language],
            "tokens": self.tokens[language],
            "mask_language": info.language,
            "method": info.method,
            "budget": info.budget,
            "neurons": info.neurons,
            "mask_digest": info.digest,
        }


@dataclass(frozen=True)
class _Level:
    """Absolute figures of a cell."""

    nats_per_token: float
    bits_per_byte: float

    @classmethod
    def of(cls, answers: Sequence[ItemResult]) -> "_Level | None":
        if not answers:
            return None
        nats = -math.fsum(answer.logprob for answer in answers)
        size_bits = math.log(2) * sum(answer.bytes for answer in answers)
        return cls(nats / sum(answer.tokens for answer in answers), nats / size_bits)

    @property
    def perplexity(self) -> float | None:
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else None  # beyond a float's range


def _change(answers: Sequence[ItemResult], baseline: Sequence[ItemResult], seed: int) -> Estimate | None:
    unmasked = {answer.document: answer for answer in baseline}
    pairs = [(answer, unmasked[answer.document]) for answer in answers if answer.document in unmasked]
    for masked, plain in pairs:
        if masked.tokens != plain.tokens:
            raise EvaluationError(
                f"document {masked.document!r} ({masked.language}) has {masked.tokens} tokens under mask "
                f"{masked.mask!r} and {plain.tokens} without; expected the same number"
            )
    if not pairs:
        return None
    return change_per_token(
        -np.array([masked.logprob for masked, _ in pairs]),
        -np.array([plain.logprob for _, plain in pairs]),
        np.array([plain.tokens for _, plain in pairs], dtype=np.float64),
        seed=seed,
    )


def _seconds(results: Iterable[ItemResult]) -> float:
    last: dict[int, float] = {}
    for result in results:
        last[result.session] = max(last.get(result.session, 0.0), result.elapsed_s)
    return math.fsum(last.values())


def _nested(cells: Mapping[tuple[str, str], Value]) -> dict[str, dict[str, Value]]:
    nested: dict[str, dict[str, Value]] = {}
    for (mask, language), value in cells.items():
        nested.setdefault(mask, {})[language] = value
    return nested
