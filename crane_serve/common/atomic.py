"""Write, or remove, a file or a line of one, completely or not at all, on a full disk and when killed, too."""

import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4


@contextmanager
def written_aside(path: Path, content: bytes) -> Iterator[Callable[[], None]]:
    """Write `content` to the disk beside `path`, making its directory if that is missing.

    Yields a function that moves the file into place; if it is not called, nothing is left or changed. Raises OSError;
    on a full disk before the function is yielded. A process that is killed here may leave a file whose name begins with
    a dot, which nothing reads.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    scratch = Path(name)
    try:
        try:
            _write(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        scratch.chmod(0o644)

        def put_in_place() -> None:
            with _named_for_good(path):
                scratch.replace(path)

        yield put_in_place
    finally:
        with suppress(OSError):  # what is left is hidden, and the file is in place or an error under way
            scratch.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path`, making its directory if that is missing; on an error nothing is left or changed."""
    with written_aside(path, content) as put_in_place:
        put_in_place()


def remove_file(path: Path) -> None:
    """Remove the file at `path`, if there is one, for good; on an OSError it is still there."""
    with _named_for_good(path):
        path.unlink(missing_ok=True)


def append_whole(file: io.FileIO, content: bytes) -> None:
    """Write `content` at the end of an unbuffered file. Raises OSError if it does not fit; then the file is as before.

    A system may write a part and report the full disk only for the rest. Should that part be impossible to remove, the
    file is closed, so that nothing follows it.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        _write(file.fileno(), content)
    except OSError:
        try:
            os.ftruncate(file.fileno(), size)
        except OSError:
            file.close()
        raise


def _write(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


@contextmanager
def _named_for_good(path: Path) -> Iterator[None]:
    """Change within it what `path` names: the change then survives a power cut, or, on an OSError, was not made."""
    existed, kept = os.path.lexists(path), path.with_name(f".{path.name}-{uuid4().hex}")
    if existed:
        with suppress(OSError):  # not every file system gives a file two names
            os.link(path, kept, follow_symlinks=False)
    try:
        yield
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError:
        with suppress(OSError):
            if os.path.lexists(kept):
                os.replace(kept, path)
            elif not existed:
                os.unlink(path)
        raise
    finally:
        with suppress(OSError):
            os.unlink(kept)
