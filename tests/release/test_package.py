"""The package: what is built, that nothing is missing or too much, and that it works outside of the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from email.parser import BytesParser
from pathlib import Path

import pytest

import crane_serve
from clients import presets
from crane_serve.common.text.corpus import EMBEDDED_CORPUS, Corpus

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGES = ("crane_serve", "relevance", "clients")
OF_THE_SDIST = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "server.py"}
MADE_BY_SETUPTOOLS = {"PKG-INFO", "setup.cfg"}


def _known_to_git() -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, check=True, text=True
    ).stdout.split("\0")
    return {name for name in listed if name and (CHECKOUT / name).is_file()}


@pytest.fixture(scope="module")
def package_files() -> set[str]:
    """Every file of the package, as git has it."""
    return {name for name in _known_to_git() if name.split("/")[0] in PACKAGES or name == "server.py"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`python -m build`: the sdist, and the wheel made from it; in `direct/` the wheel made from the tree."""
    place = tmp_path_factory.mktemp("package")
    tree = place / "tree"  # what git knows, so that leftovers of other builds do not get into this one
    for name in _known_to_git():
        if not name.startswith(("results/", "docs/images/")):
            copy = tree / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((CHECKOUT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--no-isolation", str(tree)]
    for arguments in (["--outdir", str(place)], ["--wheel", "--outdir", str(place / "direct")]):
        done = subprocess.run([*build, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return place


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def _contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _metadata(wheel: Path) -> Message:
    contents = _contents(wheel)
    (name,) = (name for name in contents if name.endswith(".dist-info/METADATA"))
    return BytesParser().parsebytes(contents[name])


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path, package_files: set[str]) -> None:
    assert {name for name in _contents(wheel) if ".dist-info/" not in name} == package_files


def test_the_wheel_holds_the_files_as_they_are(wheel: Path, package_files: set[str]) -> None:
    contents = _contents(wheel)
    assert [name for name in sorted(package_files) if contents[name] != (CHECKOUT / name).read_bytes()] == []


def test_the_sdist_holds_the_package_and_what_it_is_built_from(built: Path, package_files: set[str]) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {name for name in names if ".egg-info/" not in name} == package_files | OF_THE_SDIST | MADE_BY_SETUPTOOLS


def test_the_sdist_builds_the_same_wheel(built: Path, wheel: Path) -> None:
    (direct,) = (built / "direct").glob("*.whl")
    assert direct.name == wheel.name
    assert _contents(direct) == _contents(wheel)


def test_metadata(wheel: Path) -> None:
    metadata = _metadata(wheel)
    assert metadata["Name"] == "crane-serve"
    assert metadata["Version"] == crane_serve.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert {"cpu", "cuda", "hub", "demo"} <= set(metadata.get_all("Provides-Extra", []))
    contents = _contents(wheel)
    (licence,) = (name for name in contents if name.endswith("/licenses/LICENSE"))
    assert contents[licence] == (CHECKOUT / "LICENSE").read_bytes()


def test_the_changelog_has_this_version() -> None:
    assert f"\n## [{crane_serve.__version__}] - " in (CHECKOUT / "CHANGELOG.md").read_text()


_OUTSIDE = """
import importlib.metadata
import json
from importlib.resources import files

import clients, crane_serve, relevance, server
from clients import presets
from crane_serve.common.reports.render import html_page
from crane_serve.common.text.corpus import EMBEDDED_CORPUS, Corpus

(plugin,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="crane")
print(json.dumps({
    "modules": [module.__file__ for module in (crane_serve, clients, relevance, server)],
    "presets": {name: presets.load(name) for name in presets.names()},
    "documents": {language: len(found) for language, found in Corpus.load(EMBEDDED_CORPUS).documents.items()},
    "plugin": [plugin.value, plugin.dist.name, plugin.load().__module__],
    "typed": [files(package).joinpath("py.typed").is_file() for package in (crane_serve, relevance, clients)],
    "page": "A title" in html_page("A title", []),
}))
"""


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin/` of an environment with the wheel, and with the dependencies of this one but not its editable install."""
    place = tmp_path_factory.mktemp("environment")
    venv = place / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (site_packages,) = venv.glob("lib/*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "install", "-qq"]
    subprocess.run([*pip, "--no-index", "--no-deps", "--ignore-installed", str(wheel)], check=True)
    return venv / "bin"


def _outside(installed: Path, *command: str) -> str:
    """What a command of the environment prints, run outside of the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [installed / command[0], *command[1:]],
        cwd=installed.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_command_works_outside_of_the_checkout(installed: Path) -> None:
    assert _outside(installed, "crane", "--version") == f"{crane_serve.__version__}\n"
    shown = _outside(installed, "crane", "--help")
    assert [name for name in ("relevance", "select", "serve", "eval", "verify") if name not in shown] == []


def test_what_is_installed_is_whole(installed: Path) -> None:
    found = json.loads(_outside(installed, "python", "-c", _OUTSIDE))
    assert [file for file in found["modules"] if not Path(file).is_relative_to(installed.parent)] == []
    assert found["presets"] == {name: presets.load(name) for name in presets.names()}
    corpus = Corpus.load(EMBEDDED_CORPUS)
    assert found["documents"] == {language: len(documents) for language, documents in corpus.documents.items()}
    assert found["plugin"] == ["crane_serve.engine.plugin:register", "crane-serve", "crane_serve.engine.plugin"]
    assert found["typed"] == [True, True, True]
    assert found["page"]
