"""EvaluationFile: the evaluation that the operator wants shown."""

import logging
from pathlib import Path
from threading import Lock

from clients.errors import EvaluationError
from clients.evaluation import EVALUATION_FILE, Evaluation

_log = logging.getLogger("crane.api")


class EvaluationFile:
    """path: directory or file of an evaluation, None for none."""

    def __init__(self, path: Path | None) -> None:
        self._file = path / EVALUATION_FILE if path is not None and path.is_dir() else path
        self._lock = Lock()
        self._read: tuple[float, Evaluation] | None = None

    def read(self) -> Evaluation | None:
        """The evaluation as it is now, None if there is to be none.

        Raises EvaluationError without the file's path, which is the operator's and goes to the log.
        """
        if self._file is None:
            return None
        with self._lock:
            try:
                changed = self._file.stat().st_mtime
                if self._read is None or self._read[0] != changed:
                    self._read = changed, Evaluation.read(self._file)
            except (EvaluationError, OSError) as error:
                _log.warning("the evaluation cannot be shown: %s", error)
                raise EvaluationError("the evaluation of this server cannot be read; its log says why") from error
            return self._read[1]
