"""Write a file, or a line of one, completely or not at all."""

import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path, content: bytes) -> Iterator[Callable[[], None]]:
    """Write `content` to the disk beside `path`, making its directory if that is missing.

    Yields a function that moves the file into place; if it is not called, nothing is left or changed. Raises OSError;
    on a full disk before the function is yielded.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    scratch = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.chmod(0o644)

        def put_in_place() -> None:
            scratch.replace(path)
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)  # so that the new name survives a power cut, too
            finally:
                os.close(directory)

        yield put_in_place
    finally:
        scratch.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path`, making its directory if that is missing; on an error nothing is left or changed."""
    with written_aside(path, content) as put_in_place:
        put_in_place()


def append_whole(file: io.FileIO, content: bytes) -> None:
    """Write `content` at the end of an unbuffered file. Raises OSError if it does not fit; then the file is as before.

    A system may write a part and report the full disk only for the rest. Should that part be impossible to remove, the
    file is closed, so that nothing follows it.
    """
    size, written = os.fstat(file.fileno()).st_size, 0
    try:
        while written < len(content):
            written += file.write(content[written:])
    except OSError:
        try:
            file.truncate(size)
        except OSError:
            file.close()
        raise
