"""ResultLog: the answers of a run, appended to a file as they come, and found there when the run is taken up again."""

import fcntl
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter, ValidationError

import crane_serve
from clients.errors import EvaluationError
from clients.evaluation import PlannedMask
from clients.task import Answer, Generate, Item, Question, Request, ScoreContinuations, ScoreText
from crane_serve.common.atomic import write_atomically

RUN_FILE = "run.json"
RESULTS_FILE = "results.jsonl"
ITEMS_FILE = "items.jsonl"

_REQUESTS: dict[str, type[Request]] = {
    "text": ScoreText,
    "continuations": ScoreContinuations,
    "generate": Generate,
}


class Settings(BaseModel):
    """What a run asks, of which server.

    plan: as in a plan file; fingerprint: of the model; masks: by name, `none` first; task_masks: task -> the names of
    the masks that it is asked under; prompt_start, text_start: the tokens before contexts and before texts, as of
    Readiness.
    """

    model_config = ConfigDict(frozen=True)

    plan: dict[str, Any]
    model: str
    fingerprint: dict[str, JsonValue]
    server_version: str | None
    masks: dict[str, PlannedMask]
    task_masks: dict[str, tuple[str, ...]]
    prompt_start: tuple[int, ...] | None = None
    text_start: int | None = None
    created_by: str = f"crane-serve {crane_serve.__version__}"

    def differences(self, earlier: "Settings") -> list[str]:
        """What makes results of the `earlier` run unusable in this one, a phrase for each."""
        differences = []
        changed = changed_keys(earlier.fingerprint, self.fingerprint)
        if changed:
            differences.append(f"the model (its {', '.join(changed)}; then {earlier.model}, now {self.model})")
        then, now = earlier._before_contexts(self), self._before_contexts(earlier)
        if then != now:
            differences.append(f"the tokens that stand before a context (then {then}, now {now})")
        for name, mask in self.masks.items():
            before = earlier.masks.get(name)
            if before is not None and before.digest != mask.digest:
                differences.append(f"mask {name!r} (digest {short(before.digest)}; now {short(mask.digest)})")
        return differences

    def _before_contexts(self, other: "Settings") -> list[int] | None:
        """The tokens before a context. A server that does not say puts there what stands before whole texts."""
        if self.prompt_start is not None:
            return list(self.prompt_start)
        return None if other.text_start is None else [other.text_start]


class ItemResult(BaseModel):
    """One line of the file: the answer to one item under one mask.

    item_digest: of what was asked; tokens: read and written by the model for it; session, elapsed_s: which start of the
    run asked for it, and how many seconds after that start the answer came.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    language: str
    item: str
    mask: str
    mask_digest: str | None
    item_digest: str
    answer: Answer
    tokens: int
    session: int
    elapsed_s: float

    @property
    def question(self) -> Question:
        """What this is the answer to."""
        return Question(self.task, self.language, self.item, self.mask)


class ResultLog:
    """The results in `directory`, opened for one writer.

    `results` holds what is there already. Every append is one write of one whole line, so a process that is killed
    leaves at most one torn line at the end, which opening removes. `digest_of` says how the item of a question is asked
    now, None if it is not asked any more.

    Raises EvaluationError if the directory's results belong to other settings, are not such results, or are being
    written by another process.
    """

    def __init__(self, directory: Path, settings: Settings, digest_of: Callable[[Question], str | None]) -> None:
        self.results: dict[Question, ItemResult] = {}
        self.session = 1
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / RESULTS_FILE
        self._file = self._path.open("a+b", buffering=0)
        try:
            self._lock()
            self._settle(directory / RUN_FILE, settings)
            self._read(settings.masks, digest_of)
        except BaseException:
            self._file.close()
            raise

    def append(self, result: ItemResult) -> None:
        """Add a result; once this returns it survives the death of the process."""
        self._file.write(result.model_dump_json().encode() + b"\n")
        self.results[result.question] = result

    def close(self) -> None:
        """Close the file and let other processes write."""
        self._file.close()

    def __enter__(self) -> "ResultLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EvaluationError(f"{self._path} is being written by another evaluation") from error

    def _settle(self, path: Path, settings: Settings) -> None:
        if path.exists():
            differences = settings.differences(read_settings(path))
            if differences:
                raise EvaluationError(
                    f"{path.parent} holds results of another run, which differs in {'; '.join(differences)}; "
                    "choose another output directory"
                )
        elif self._path.stat().st_size:
            raise EvaluationError(f"{self._path} has no {RUN_FILE} beside it; choose another output directory")
        write_atomically(path, settings.model_dump_json(indent=1).encode() + b"\n")

    def _read(self, masks: Mapping[str, PlannedMask], digest_of: Callable[[Question], str | None]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._file.fileno(), whole)
        for result in parse_results(content[:whole], self._path):
            self.session = max(self.session, result.session + 1)
            digest = digest_of(result.question)
            mask = masks.get(result.mask)
            if digest is None or mask is None:
                continue
            if digest != result.item_digest:
                raise EvaluationError(
                    f"{self._path.parent} holds results of another run: there item {result.item!r} of task "
                    f"{result.task!r} in {result.language!r} asked something else; choose another output directory"
                )
            if mask.digest != result.mask_digest:
                raise EvaluationError(
                    f"{self._path.parent} holds results of another run: there mask {result.mask!r} had digest "
                    f"{short(result.mask_digest)}, now {short(mask.digest)}; choose another output directory"
                )
            self.results[result.question] = result


def parse_results(content: bytes, path: Path) -> list[ItemResult]:
    """The results in whole lines of a file. Raises EvaluationError naming the line that holds none."""
    results = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            results.append(ItemResult.model_validate_json(line))
        except ValidationError as error:
            raise EvaluationError(f"{path}:{number} is not a result: {first_problem(error)}") from error
    return results


def read_settings(path: Path) -> Settings:
    """The settings in a file. Raises EvaluationError if there are none."""
    try:
        return Settings.model_validate_json(path.read_bytes())
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read; expected the settings of a run: {error.strerror}") from error
    except ValidationError as error:
        raise EvaluationError(f"{path} does not hold the settings of a run: {first_problem(error)}") from error


def write_items(directory: Path, items: Mapping[str, Mapping[str, tuple[Item, ...]]]) -> Path:
    """Write what is asked to `items.jsonl`, so that the results can be read without the texts' sources."""
    lines = [
        json.dumps(
            {
                "task": task,
                "language": language,
                "item": item.id,
                "request": {"kind": _kind(item.request), **asdict(item.request)},
                "reference": dict(item.reference),
            },
            ensure_ascii=False,
        )
        for task, of_task in items.items()
        for language, of_language in of_task.items()
        for item in of_language
    ]
    path = directory / ITEMS_FILE
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
    return path


def read_items(path: Path) -> dict[str, dict[str, tuple[Item, ...]]]:
    """What `write_items` wrote: task -> language -> items. Raises EvaluationError."""
    items: dict[str, dict[str, list[Item]]] = {}
    try:
        for line in path.read_bytes().split(b"\n"):
            if line:
                fields = json.loads(line)
                request_fields = fields["request"]
                request = TypeAdapter(_REQUESTS[request_fields.pop("kind")]).validate_python(request_fields)
                item = Item(fields["item"], fields["language"], request, fields["reference"])
                items.setdefault(fields["task"], {}).setdefault(item.language, []).append(item)
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read; expected the items of a run: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(f"{path} does not hold the items of a run: {error}") from error
    return {task: {language: tuple(of) for language, of in languages.items()} for task, languages in items.items()}


def changed_keys(first: Mapping[str, JsonValue], second: Mapping[str, JsonValue]) -> list[str]:
    """The keys whose values differ, in the order of both."""
    return [key for key in dict.fromkeys([*first, *second]) if first.get(key) != second.get(key)]


def first_problem(error: ValidationError) -> str:
    """What pydantic found first, and where."""
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc'])) or 'line'}: {problem['msg']}"


def short(digest: str | None) -> str:
    """The beginning of a digest, for messages."""
    return "absent" if digest is None else digest[:16]


def _kind(request: Request) -> str:
    return next(kind for kind, of in _REQUESTS.items() if isinstance(request, of))
