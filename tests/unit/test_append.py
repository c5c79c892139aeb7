"""A line is written whole or not at all, also where the system writes a part of it and then finds the disk full."""

import os
from pathlib import Path

import pytest

from crane_serve.common.atomic import append_whole
from tests.full_disk import room_for


@pytest.mark.parametrize("room", range(8, 16))
def test_what_does_not_fit_is_taken_back(tmp_path: Path, room: int) -> None:
    with (tmp_path / "lines").open("ab", buffering=0) as file:
        append_whole(file, b"first\n")
        with room_for(room), pytest.raises(OSError, match="too large"):
            append_whole(file, b"second line\n")
        assert (tmp_path / "lines").read_bytes() == b"first\n"
        append_whole(file, b"third\n")
    assert (tmp_path / "lines").read_bytes() == b"first\nthird\n"


def test_nothing_follows_what_cannot_be_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(descriptor: int, size: int) -> None:
        raise OSError("stuck")

    monkeypatch.setattr(os, "ftruncate", stuck)
    file = (tmp_path / "lines").open("ab", buffering=0)
    with room_for(8), pytest.raises(OSError, match="too large"):
        append_whole(file, b"second line\n")
    assert file.closed
