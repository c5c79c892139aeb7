"""ResultLog: the answers of a run, appended to a file as they come, and found there when the run is taken up again."""

import fcntl
import os
from pathlib import Path
from types import TracebackType

from pydantic import BaseModel, ConfigDict, FiniteFloat, JsonValue, ValidationError

import crane_serve
from clients.errors import EvaluationError
from clients.plan import Item

RUN_FILE = "run.json"
RESULTS_FILE = "results.jsonl"


class Settings(BaseModel):
    """What the results of a directory depend on. Masks may join a run later; a known one must keep its content.

    masks: name -> content digest (None for `none`); split: None for a corpus used whole; fingerprint: of the model.
    """

    model_config = ConfigDict(frozen=True)

    corpus_digest: str
    split: str | None
    languages: tuple[str, ...]
    limit: int | None
    masks: dict[str, str | None]
    model: str
    fingerprint: dict[str, JsonValue]
    server_version: str | None = None
    created_by: str = f"crane-serve {crane_serve.__version__}"

    def differences(self, earlier: "Settings") -> list[str]:
        """What makes results of the `earlier` run unusable in this one, a phrase for each."""
        found = []
        if self.corpus_digest != earlier.corpus_digest:
            found.append(
                f"the corpus (digest {earlier.corpus_digest[:16]}, split {earlier.split!r}; "
                f"now {self.corpus_digest[:16]}, split {self.split!r})"
            )
        keys = [*self.fingerprint, *(key for key in earlier.fingerprint if key not in self.fingerprint)]
        changed = [key for key in keys if self.fingerprint.get(key) != earlier.fingerprint.get(key)]
        if changed:
            found.append(f"the model (its {', '.join(changed)}; then {earlier.model}, now {self.model})")
        for name, digest in self.masks.items():
            if name in earlier.masks and earlier.masks[name] != digest:
                found.append(f"mask {name!r} (digest {_short(earlier.masks[name])}; now {_short(digest)})")
        return found


class ItemResult(BaseModel):
    """One line of the file: the score of one item.

    logprob: nats summed over `tokens` tokens; bytes: the text's length in UTF-8; session, elapsed_s: which start of
    the run asked for it, and how many seconds after that start the answer came.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mask: str
    mask_digest: str | None
    language: str
    document: str
    text_digest: str
    logprob: FiniteFloat
    tokens: int
    bytes: int
    session: int
    elapsed_s: float

    @property
    def item(self) -> Item:
        """What this is the answer to."""
        return Item(self.mask, self.language, self.document)


class ResultLog:
    """The results in `directory`, opened for one writer.

    `results` holds what is there already. Every append is one write of one whole line, so a process that is killed
    leaves at most one torn line at the end, which opening removes. Raises EvaluationError if the directory's results
    belong to other settings, are not such results, or are being written by another process.
    """

    def __init__(self, directory: Path, settings: Settings) -> None:
        self.results: dict[Item, ItemResult] = {}
        self.session = 1
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / RESULTS_FILE
        self._file = self._path.open("a+b", buffering=0)
        try:
            self._lock()
            self._settle(directory / RUN_FILE, settings)
            self._read()
        except BaseException:
            self._file.close()
            raise

    def append(self, result: ItemResult) -> None:
        """Add a result; once this returns it survives the death of the process."""
        self._file.write(result.model_dump_json().encode() + b"\n")
        self.results[result.item] = result

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
        if not path.exists():
            if self._path.stat().st_size:
                raise EvaluationError(f"{self._path} has no {RUN_FILE} beside it; choose another output directory")
        else:
            try:
                earlier = Settings.model_validate_json(path.read_bytes())
            except ValidationError as error:
                raise EvaluationError(f"{path} does not hold the settings of a run: {_first(error)}") from error
            if differences := settings.differences(earlier):
                raise EvaluationError(
                    f"{path.parent} holds results of another run, which differs in {'; '.join(differences)}; "
                    "choose another output directory"
                )
            settings = settings.model_copy(update={"masks": earlier.masks | settings.masks})
        scratch = path.with_suffix(".tmp")
        scratch.write_text(settings.model_dump_json(indent=2) + "\n")
        scratch.replace(path)
        self._digests = settings.masks

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._file.fileno(), whole)
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
            try:
                result = ItemResult.model_validate_json(line)
            except ValidationError as error:
                raise EvaluationError(f"{self._path}:{number} is not a result: {_first(error)}") from error
            if self._digests.get(result.mask) != result.mask_digest:
                raise EvaluationError(f"{self._path}:{number} has another mask {result.mask!r} than {RUN_FILE} names")
            self.results[result.item] = result
            self.session = max(self.session, result.session + 1)


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc'])) or 'line'}: {problem['msg']}"


def _short(digest: str | None) -> str:
    return "absent" if digest is None else digest[:16]
