"""What CONTRIBUTING.md says is one file: the files on that page are put where it says, and used."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, HyperCLOVAXConfig

from crane_serve.common.masks import read_mask
from tests.tiny import HIDDEN, NEURONS, byte_tokenizer

CHECKOUT = Path(__file__).resolve().parents[2]
PAGE = (CHECKOUT / "CONTRIBUTING.md").read_text()
FILES = dict(re.findall(r"^`([\w/]+\.py)`:\n\n```python\n(.*?)```$", PAGE, re.M | re.S))
LAYERS = 2


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages with the files of the page."""
    places = {"relevance/methods", "crane_serve/common/models/families", "clients/tasks"}
    assert {str(Path(name).parent) for name in FILES} == places
    tree = tmp_path_factory.mktemp("tree")
    for package in ("crane_serve", "relevance", "clients"):
        shutil.copytree(CHECKOUT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, content in FILES.items():
        assert not (tree / name).exists(), f"{name} exists; the page needs another example"
        (tree / name).write_text(content)
    return tree


@pytest.fixture(scope="module")
def hyperclovax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hyperclovax")
    sizes = {"vocab_size": 258, "hidden_size": HIDDEN, "intermediate_size": NEURONS, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "use_post_norm": True}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(HyperCLOVAXConfig(**sizes, **heads, **ids)).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def _run(tree: Path, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_method_and_a_family_are_one_file_each(tree: Path, hyperclovax: Path, tmp_path: Path) -> None:
    """The new method ranks the neurons of the new family's model, and so does one that goes backwards through it."""
    scores, masks = tmp_path / "scores.safetensors", tmp_path / "masks"
    crane = ("-m", "crane_serve")
    _run(
        tree,
        *crane,
        "relevance",
        hyperclovax,
        "--limit",
        2,
        "--max-tokens",
        32,
        "--methods",
        "rms,attnlrp",
        "--out",
        scores,
    )
    for method in ("rms", "attnlrp"):
        _run(tree, *crane, "select", scores, "--method", method, "--budget", 0.05, "--out", masks)
        stored = read_mask(masks / f"{method}-vi.safetensors")
        assert stored.info.fingerprint.architecture == "HyperCLOVAXForCausalLM"
        assert stored.mask.neurons == round(0.05 * LAYERS * NEURONS)


_ASK = """
import json
import sys

from clients.plan import Plan
from clients.task import Generated
from pathlib import Path

plan = Plan.read(Path(sys.argv[1]))
(item,) = plan.load(Path(sys.argv[1]).parent)["opening"]["en"]
answers = [Generated(text=text, tokens=1, finish_reason="stop") for text in (" Four.", "Five")]
worth = [plan.tasks[0].measure(item, answer) for answer in answers]
print(json.dumps({"prompt": item.prompt, "worth": worth}))
"""


def test_a_task_is_one_file(tree: Path, tmp_path: Path) -> None:
    (as_planned,) = re.findall(r"^In a plan: `(.*)`\.$", PAGE, re.M)
    (tmp_path / "plan.yaml").write_text(f"languages: [en]\ntasks:\n  - {as_planned}\n")
    (tmp_path / "en.jsonl").write_text(json.dumps({"id": "1", "question": "Two and two?", "answer": "Four"}))
    found = json.loads(_run(tree, "-c", _ASK, tmp_path / "plan.yaml"))
    assert found["prompt"] == "Two and two?"
    assert found["worth"] == [{"right": [1.0, 1.0]}, {"right": [0.0, 1.0]}]


def test_the_examples_keep_the_style(tree: Path) -> None:
    for tool in (("check",), ("format", "--check")):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *tool, "--config", CHECKOUT / "pyproject.toml", *FILES],
            cwd=tree,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


def test_make_targets_of_the_page_exist() -> None:
    named = set(re.findall(r"make ([\w-]+)", PAGE))
    targets = set(re.findall(r"^([\w-]+):", (CHECKOUT / "Makefile").read_text(), re.M))
    assert named <= targets
