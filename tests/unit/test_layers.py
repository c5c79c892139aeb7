"""The contracts on imports in pyproject.toml: they hold, and a wrong import breaks the one it should."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter")
ROOT = Path(__file__).parent.parent.parent


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    """What lint-imports says of the packages in `tree`."""
    program = "import sys; sys.path.insert(0, sys.argv[1]); sys.argv[1:] = ['--no-cache']; "
    program += "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", program, str(tree)], cwd=tree, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the packages and their contracts."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in ("crane_serve", "relevance", "clients"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_imports_run_one_way(tree: Path) -> None:
    result = lint(tree)
    assert result.returncode == 0, result.stdout
    assert "4 kept, 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("module", "wrong", "contract"),
    [
        ("crane_serve/common/atomic.py", "import relevance.scores", "imports run one way"),
        ("relevance/scores.py", "import clients.errors", "imports run one way"),
        ("clients/errors.py", "import relevance.method", "imports run one way"),
        ("crane_serve/engine/table.py", "import relevance.method", "engine processes load no relevance"),
        ("crane_serve/service/logs.py", "import vllm.config", "vLLM's insides"),
        ("crane_serve/engine/table.py", "import crane_serve.engine.plugin", "no circles"),
    ],
)
def test_a_wrong_import_is_refused(tree: Path, module: str, wrong: str, contract: str) -> None:
    path = tree / module
    docstring, rest = path.read_text().split("\n", 1)
    path.write_text(f"{docstring}\n{wrong}\n{rest}")
    result = lint(tree)
    assert result.returncode == 1, result.stdout
    (broken,) = [line for line in result.stdout.splitlines() if "BROKEN" in line and contract in line]
    assert broken
