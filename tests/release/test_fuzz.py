"""Random checkpoint and corpus directories, a few of those that `python -m tests.fuzz.directories` tries."""

from pathlib import Path

from tests.fuzz import directories


def test_random_directories_give_the_same_scores_or_one_line(tmp_path: Path) -> None:
    outcomes, broken = directories.run(tmp_path, count=25, seed=3)
    assert not broken, "\n".join(broken)
    assert len(outcomes) == 2, outcomes
