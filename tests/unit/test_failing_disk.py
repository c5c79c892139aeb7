"""Masks, scores, progress, results, journals and reports on a disk that fails at any call, and in a process that is
killed there: what was acknowledged is there, what was not can be written, nothing is refused, nothing half is read."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clients.answers import Score
from clients.evaluation import PlannedMask
from clients.results import ItemResult, ResultLog, Settings, read_items, write_items
from clients.task import Item, Scored, ScoreText
from crane_serve.common.atomic import remove_file, write_atomically
from crane_serve.common.masks import MaskInfo, MaskLibrary, NeuronMask, mask_path, write_mask
from crane_serve.verify.plan import Outcome
from relevance.accumulators import DocumentSample, RunningMean
from relevance.progress import Done, Progress, ScoringPlan
from relevance.scores import Scores
from relevance.validation.ablations import Ablations
from tests.failing_disk import interrupted, is_full, killed_at
from tests.scores import random_scores, scores_info

FINGERPRINT = scores_info().fingerprint


@dataclass(frozen=True)
class Writer:
    """write: writes the record or version with this number, 1 or 2, into a directory, and continues what is there;
    read: all that is there, in a form that can be compared."""

    write: Callable[[Path, int], object]
    read: Callable[[Path], object]


def _mask(number: int) -> NeuronMask:
    return NeuronMask.switching_off([[number], []], FINGERPRINT.intermediate_sizes)


def _write_mask(directory: Path, number: int) -> None:
    info = MaskInfo(language="xx", method="test", fingerprint=FINGERPRINT)
    write_mask(directory / "masks", "one", _mask(number), info)


def _remove_mask(directory: Path, number: int) -> None:
    if number == 1:
        _write_mask(directory, number)
    else:
        remove_file(mask_path(directory / "masks", "one"))


def _masks(directory: Path) -> dict[str, str]:
    (directory / "masks").mkdir(exist_ok=True)
    library = MaskLibrary.load(directory / "masks", FINGERPRINT)
    assert library.invalid == {}
    return {name: stored.mask.digest for name, stored in library.masks.items()}


def _scores(number: int) -> Scores:
    scores = random_scores()
    return Scores({name: tensor * number for name, tensor in scores.by_method.items()}, scores.info, scores.outputs)


def _saved_scores(directory: Path) -> float | None:
    path = directory / "scores.safetensors"
    return float(Scores.load(path).by_method["lape"].sum()) if path.exists() else None


def _progress(directory: Path) -> tuple[Progress, Done, Any]:
    """What a run that is continued finds: its statistics of one language, loaded."""
    plan = ScoringPlan(
        fingerprint=FINGERPRINT,
        corpus_digest="c",
        languages=("en",),
        methods=("made",),
        output_dimensions=False,
        max_tokens=8,
        batch_tokens=8,
        dtype="float32",
        device="cpu",
        shards=1,
    )
    progress = Progress.open(directory / "progress", plan)
    mean, sample = RunningMean(1, 2, torch.device("cpu")), DocumentSample(1, 2, 8)
    method: Any = SimpleNamespace(name="made", statistics={"mean": mean, "sample": sample})
    return progress, progress.load(0, "en", [method]), method


def _write_progress(directory: Path, number: int) -> None:
    progress, done, method = _progress(directory)
    for batch in range(done.batches + 1, number + 1):
        method.statistics["mean"].add(0, torch.full((2,), float(batch)), 1)
        method.statistics["sample"].add(0, torch.tensor([batch]), torch.full((1, 2), float(batch)))
        done = done.model_copy(update={"batches": batch, "documents": batch})
        done = progress.save(0, "en", done, [method])


def _read_progress(directory: Path) -> tuple[object, ...]:
    progress, done, method = _progress(directory)
    assert progress.documents() == done.documents
    tensors = [method.statistics[name].tensors() for name in ("mean", "sample")]
    return done, [{name: tensor.tolist() for name, tensor in of.items()} for of in tensors]


def _results(directory: Path) -> ResultLog:
    masks = {"none": PlannedMask(name="none")}
    settings = Settings(
        plan={}, model="tiny", fingerprint={}, server_version=None, masks=masks, task_masks={"texts": ("none",)}
    )
    return ResultLog(directory / "results", settings, lambda question: "d")


def _write_result(directory: Path, number: int) -> None:
    with _results(directory) as log:
        answer = Scored(scores=(Score(logprob=-1.0, tokens=1, bytes=1),))
        fields = {"task": "texts", "language": "en", "mask": "none", "mask_digest": None, "item_digest": "d"}
        for item in range(len(log.results) + 1, number + 1):
            log.append(ItemResult(**fields, item=str(item), answer=answer, tokens=1, session=1, elapsed_s=0.0))


def _read_results(directory: Path) -> list[str]:
    with _results(directory) as log:
        return [result.item for result in log.results.values()]


def _write_items(directory: Path, number: int) -> None:
    items = tuple(Item(str(n), "en", ScoreText("a text"), {}) for n in range(number))
    write_items(directory, {"texts": {"en": items}})


def _read_items(directory: Path) -> object:
    path = directory / "items.jsonl"
    return read_items(path) if path.exists() else None


def _journal(directory: Path) -> Ablations:
    decoder: Any = None  # nothing is measured here
    return Ablations(decoder, {}, 8, directory / "journal.jsonl", "identity")


def _write_journal(directory: Path, number: int) -> None:
    ablations = _journal(directory)
    for line in range(len(ablations._known) + 1, number + 1):
        ablations._append((str(line), "test", "en"), [float(line)])


def _read_report(directory: Path) -> object:
    path = directory / "reports" / "report.json"
    return json.loads(path.read_text()) if path.exists() else None


WRITERS = {
    "mask": Writer(_write_mask, _masks),
    "mask removed": Writer(_remove_mask, _masks),
    "scores": Writer(lambda directory, number: _scores(number).save(directory / "scores.safetensors"), _saved_scores),
    "progress": Writer(_write_progress, _read_progress),
    "results": Writer(_write_result, _read_results),
    "items": Writer(_write_items, _read_items),
    "journal": Writer(_write_journal, lambda directory: _journal(directory)._known),
    "report": Writer(
        lambda directory, number: write_atomically(directory / "reports" / "report.json", b'{"n": %d}' % number),
        _read_report,
    ),
}


@pytest.fixture(params=WRITERS)
def writer(request: pytest.FixtureRequest) -> Writer:
    return WRITERS[request.param]


@pytest.fixture
def states(writer: Writer, tmp_path: Path) -> list[object]:
    """What is there before anything is written, after the first and after the second, if nothing fails."""
    directory = tmp_path / "undisturbed"
    directory.mkdir()
    found = [writer.read(directory)]
    for number in (1, 2):
        writer.write(directory, number)
        found.append(writer.read(directory))
    assert found[1] not in (found[0], found[2])
    return found


def written_up_to(writer: Writer, directory: Path, number: int) -> Path:
    directory.mkdir()
    for before in range(1, number):
        writer.write(directory, before)
    return directory


def assert_goes_on(writer: Writer, directory: Path, number: int, states: list[object]) -> None:
    writer.write(directory, number)
    assert writer.read(directory) == states[number]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("for_good", [False, True], ids=["for a moment", "for good"])
def test_a_disk_that_fails_at_any_call(
    writer: Writer, states: list[object], tmp_path: Path, number: int, for_good: bool
) -> None:
    for at in count(1):
        directory = written_up_to(writer, tmp_path / str(at), number)
        acknowledged = True
        with interrupted(at, is_full, for_good=for_good) as made:
            try:
                writer.write(directory, number)
            except OSError:
                acknowledged = False
        if len(made) < at:
            break
        found = writer.read(directory)
        if acknowledged:
            assert found == states[number], made
        elif for_good:  # what cannot be taken back any more may be there, and then it is whole
            assert found in (states[number - 1], states[number]), made
        else:
            assert found == states[number - 1], made
        assert_goes_on(writer, directory, number, states)
    assert at > 1


@pytest.mark.parametrize("number", [1, 2])
def test_a_process_that_is_killed_at_any_call(
    writer: Writer, states: list[object], tmp_path: Path, number: int
) -> None:
    for at in count(1):
        directory = written_up_to(writer, tmp_path / str(at), number)
        if not killed_at(at, lambda directory=directory: writer.write(directory, number)):
            break
        assert writer.read(directory) in (states[number - 1], states[number])
        assert_goes_on(writer, directory, number, states)
    assert at > 1


def test_of_a_verification_that_dies_the_whole_records_are_read(tmp_path: Path) -> None:
    outcome = Outcome(tmp_path / "outcome.jsonl")
    outcome.record(error="whole")
    assert killed_at(1, lambda: outcome.record(error="torn"))
    assert not (tmp_path / "outcome.jsonl").read_text().endswith("\n")
    assert outcome.error == "whole"
