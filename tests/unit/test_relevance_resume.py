import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from crane_serve.common.text.corpus import Corpus, Document
from relevance.methods import find_scored
from relevance.methods.lape import Lape
from relevance.model_passes import ModelPasses
from relevance.progress import Done, Progress, ProgressError, ScoringPlan
from relevance.scores import Scores
from relevance.scoring import Execution, score
from relevance.typical import MeanActivation
from tests.forked import forked
from tests.tiny import tiny_model

CPU = torch.device("cpu")


def score_and_be_killed(checkpoint: Path, directory: Path, out: Path, log: Path, moment: str, at: int) -> None:
    """Score with every method and keep progress; write a line when a batch begins.

    Kills its own process at batch number `at`, before or after the methods have seen it.
    """
    torch.set_num_threads(1)
    run, seen = ModelPasses.run, []

    def counting(self: ModelPasses, batch: Any, methods: Any) -> None:
        seen.append(None)
        with log.open("a") as file:
            file.write("begun\n")
        if len(seen) == at and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        run(self, batch, methods)
        if len(seen) == at and moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)

    ModelPasses.run = counting
    scores_of(checkpoint, directory).save(out)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Other numbers of threads may round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def corpus() -> Corpus:
    return Corpus(
        {
            language: tuple(Document(str(n), f"{text} {n} " * (2 + n % 3)) for n in range(9))
            for language, text in {"en": "rain falls", "vi": "mưa rơi", "zh": "下雨了"}.items()
        }
    )


def scores_of(
    checkpoint: Path,
    progress: Path | None,
    methods: Sequence[str] = ("all",),
    batch_tokens: int = 130,
    restart: bool = False,
) -> Scores:
    return score(
        checkpoint,
        corpus(),
        find_scored(methods),
        batch_tokens=batch_tokens,
        max_tokens=60,
        dtype=torch.float32,
        device=CPU,
        output_dimensions=True,
        execution=Execution(progress=progress, restart=restart),
    )


def killed_or_finished(checkpoint: Path, directory: Path, moment: str, at: int) -> int:
    places = (directory / "progress", directory / "scores", directory / "log")
    process = forked(score_and_be_killed, checkpoint, *places, moment, at)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def same(found: Scores, expected: Scores) -> bool:
    pairs = [(found.by_method, expected.by_method), (found.outputs, expected.outputs)]
    return all(
        mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
        for mine, theirs in pairs
    )


def test_killed_twice_the_result_is_the_same_to_the_bit(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert killed_or_finished(checkpoint, tmp_path, "before", 3) == -9
    assert killed_or_finished(checkpoint, tmp_path, "after", 4) == -9
    assert not (tmp_path / "scores").exists()
    assert killed_or_finished(checkpoint, tmp_path, "before", 1000) == 0
    run, batches = ModelPasses.run, []
    monkeypatch.setattr(ModelPasses, "run", lambda *arguments: (batches.append(1), run(*arguments)))
    undisturbed = scores_of(checkpoint, None)
    assert len(batches) >= 9
    # Each death had one batch begun that is not in the progress.
    assert len((tmp_path / "log").read_text().splitlines()) == len(batches) + 2
    assert same(Scores.load(tmp_path / "scores"), undisturbed)


def test_finished_progress_needs_no_batch(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = scores_of(checkpoint, tmp_path)
    assert same(before, scores_of(checkpoint, None))
    monkeypatch.setattr(ModelPasses, "run", None)
    assert same(scores_of(checkpoint, tmp_path), before)


def test_progress_of_another_run_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    directory = tmp_path / "progress"
    before = scores_of(checkpoint, directory, ["lape"])
    with pytest.raises(ProgressError, match=r"another run \(methods, batch_tokens differ\).*--restart"):
        scores_of(checkpoint, directory, ["magnitude"], batch_tokens=64)
    other = tiny_model("llama", tmp_path / "other", seed=1)
    with pytest.raises(ProgressError, match=r"another run \(fingerprint differ\)"):
        scores_of(other, directory, ["lape"])
    after = scores_of(other, directory, ["lape"], restart=True)
    assert not same(after, before)
    assert same(after, scores_of(other, None, ["lape"]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(b"no state"), "not the state of a run"),
        (lambda file: file.write_bytes(file.with_name("en-0-of-1.piece-000000.safetensors").read_bytes()), "not the"),
        (lambda file: file.with_name("en-0-of-1.piece-000000.safetensors").unlink(), "not a piece of a state"),
        (lambda file: file.with_name("plan.json").write_text("{}"), "not the plan of a run"),
    ],
)
def test_damaged_progress_is_refused(checkpoint: Path, tmp_path: Path, damage: object, message: str) -> None:
    scores_of(checkpoint, tmp_path, ["average-precision", "lape"])
    damage(tmp_path / "en-0-of-1.safetensors")  # type: ignore[operator]
    with pytest.raises(ProgressError, match=f"{message}.*pass --restart to begin again"):
        scores_of(checkpoint, tmp_path, ["average-precision", "lape"])


def test_state_of_another_plan_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    scores_of(checkpoint, tmp_path, ["lape"])
    plan = json.loads((tmp_path / "plan.json").read_text())
    other = Progress.open(tmp_path / "other", ScoringPlan(**{**plan, "batch_tokens": 7}))
    (tmp_path / "en-0-of-1.safetensors").rename(other.directory / "en-0-of-1.safetensors")
    with pytest.raises(ProgressError, match="the state of another run"):
        other.documents()
    with pytest.raises(ProgressError, match="the state of another run"):
        other.load(0, "en", [])
    assert other.load(0, "zh", []) == Done()
    other.remove()
    assert not other.directory.exists()


def test_saved_files_stay_small(checkpoint: Path, tmp_path: Path) -> None:
    """A growing statistic writes each document once, not all of them after each batch."""
    scores_of(checkpoint, tmp_path, ["average-precision"])
    pieces = list(tmp_path.glob("en-0-of-1.piece-*.safetensors"))
    row = 3 * 160 * 4  # layers, neurons, bytes
    assert len(pieces) >= 3
    assert 9 * row <= sum(path.stat().st_size for path in pieces) < 9 * row + 300 * len(pieces)
    means = 3 * 160 * 8  # sums in float64
    assert (tmp_path / "en-0-of-1.safetensors").stat().st_size < 1500 + means


def test_methods_that_need_no_model_leave_no_progress(checkpoint: Path, tmp_path: Path) -> None:
    scores_of(checkpoint, tmp_path / "progress", ["random"])
    assert not (tmp_path / "progress").exists()


def test_lape_is_saved_exactly(checkpoint: Path, tmp_path: Path) -> None:
    """What is written is float64 sums and integer counts, so that nothing is lost between batches."""
    scores_of(checkpoint, tmp_path, ["lape"])
    from safetensors import safe_open

    with safe_open(tmp_path / "zh-0-of-1.safetensors", framework="pt") as file:
        means = [f"{MeanActivation.name}/values/{name}" for name in ("count", "total")]
        assert sorted(file.keys()) == ["lape/active/count", "lape/active/total", *means]
        assert file.get_tensor("lape/active/total").dtype == torch.float64
    assert Lape.name == "lape"
