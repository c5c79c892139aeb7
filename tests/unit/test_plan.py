"""Plan files: what they say, and one clear message for everything that is wrong with one, before any work."""

import re
from pathlib import Path

import pytest
import yaml

from clients.answers import MaskSummary
from clients.errors import EvaluationError
from clients.plan import MaskChoice, Plan, matching

ROOT = Path(__file__).parents[2]
PLAN = """
name: harbours
languages: [en, vi]
masks: ["attnlrp-*", "zh,vi@0.5", {methods: [lape], budgets: [0.005]}]
tasks:
  - {name: news, kind: perplexity, source: {files: "news/{lang}.txt"}, limit: 2}
  - {kind: perplexity, source: {corpus: embedded, split: test}, languages: [en], masks: ["attnlrp-en"]}
seed: 3
"""


def written(directory: Path, text: str = PLAN) -> Path:
    path = directory / "plan.yaml"
    path.write_text(text)
    return path


def test_a_plan_is_read_and_its_content_makes_the_same_plan(tmp_path: Path) -> None:
    plan = Plan.read(written(tmp_path))
    assert plan.name == "harbours"
    assert plan.languages == ("en", "vi")
    assert plan.masks == ("attnlrp-*", "zh,vi@0.5", MaskChoice(methods=("lape",), budgets=(0.005,)))
    assert [task.name for task in plan.tasks] == ["news", "perplexity"]
    assert plan.matched_effects == {"nats_per_token": 1.0}
    assert Plan.parse(plan.content(), "again") == plan


def test_items_are_loaded_from_the_directory_of_the_plan(tmp_path: Path) -> None:
    (tmp_path / "news").mkdir()
    (tmp_path / "news" / "en.txt").write_text("Ships lay still.\nFog came.\nBells rang.\n")
    (tmp_path / "news" / "vi.txt").write_text("Tàu nằm im.\nSương đến.\nChuông reo.\n")
    items = Plan.read(written(tmp_path)).load(tmp_path)
    assert list(items) == ["news", "perplexity"]
    assert {language: len(of) for language, of in items["news"].items()} == {"en": 2, "vi": 2}
    assert list(items["perplexity"]) == ["en"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("languages: [en, vi]", "languages: []"), "languages: "),
        (("name: harbours", "nme: harbours"), "nme: unknown field; a plan has name, languages, masks, budgets"),
        (("kind: perplexity, source: {files", "kind: perplexty, source: {files"), "task 1.*'perplexty'.*perplexity"),
        (("limit: 2", "limt: 2"), "task 1.*limt"),
        (("limit: 2", "limit: 0"), "task 1.*limit"),
        (("[en], masks", "[fr], masks"), "task 'perplexity' has language 'fr'; the plan has en, vi"),
        (("name: news", "name: perplexity"), "tasks: 'perplexity' is given twice"),
        (("[en, vi]", "[en, en]"), "languages: 'en' is given twice"),
        (("seed: 3", "seed: -1"), "seed: "),
        (("seed: 3", "seed: 3\nbeta: 0"), "beta: "),
        (("budgets: [0.005]", "budgets: [5]"), "masks"),
        (("seed: 3", "seed: [3"), r"is not YAML in line \d+"),
        (("tasks:", "tasks: 3\nrest:"), "tasks: expected a list"),
    ],
)
def test_what_is_wrong_with_a_plan_is_said_in_one_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in PLAN
    path = written(tmp_path, PLAN.replace(*change))
    with pytest.raises(EvaluationError, match=message) as caught:
        Plan.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="expected a plan"):
        Plan.read(tmp_path / "nowhere.yaml")
    with pytest.raises(EvaluationError, match="expected a mapping"):
        Plan.read(written(tmp_path, "- 1"))
    path = tmp_path / "plan.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match="not YAML"):
        Plan.read(path)


def test_a_missing_file_of_a_task_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"news/en\.txt"):
        Plan.read(written(tmp_path)).load(tmp_path)


def test_choices_by_provenance() -> None:
    mask = MaskSummary(name="lape-en", digest="1", neurons=7, language="en", method="lape", budget=0.005)
    assert MaskChoice().fits(mask)
    assert MaskChoice(methods=("lape", "crane"), languages=("en",), budgets=(0.01, 0.005)).fits(mask)
    assert not MaskChoice(methods=("crane",)).fits(mask)
    assert not MaskChoice(languages=("vi",)).fits(mask)
    assert not MaskChoice(budgets=(0.0051,)).fits(mask)
    assert not MaskChoice(budgets=(0.005,)).fits(mask.model_copy(update={"budget": None}))


def test_matching_keeps_the_order_of_the_names() -> None:
    assert matching(["b*", "a"], ["a", "bc", "B", "c", "b"]) == ["a", "bc", "b"]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "plans").glob("*.yaml")), ids=lambda path: path.name)
def test_plans_of_the_benchmarks_are_plans(path: Path) -> None:
    assert Plan.read(path).tasks


def test_tasks_of_the_docs_are_tasks() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "evaluation.md").read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        assert Plan.parse({"languages": ["en", "zh", "vi"], **yaml.safe_load(block)}, "docs").tasks
