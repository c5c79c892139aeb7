"""Record: the questions and answers of a run, read back from its directory, and the figures computed from them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from clients.analysis import analyse
from clients.analysis.substitutions import substitutions_of
from clients.errors import EvaluationError
from clients.evaluation import Evaluation, Failure, TaskInfo, Throughput, versions_here
from clients.plan import Plan
from clients.results import (
    ITEMS_FILE,
    RESULTS_FILE,
    RUN_FILE,
    ItemResult,
    Settings,
    parse_results,
    read_items,
    read_settings,
)
from clients.task import Answers, Item, Task

Items = Mapping[str, Mapping[str, tuple[Item, ...]]]


@dataclass(frozen=True)
class Record:
    """settings, plan, items: the questions; results: the answers so far."""

    settings: Settings
    plan: Plan
    items: Items
    results: tuple[ItemResult, ...]

    @classmethod
    def read(cls, directory: Path) -> "Record":
        """The record of a run, of any process, finished or not. Raises EvaluationError if `directory` has none."""
        settings = read_settings(directory / RUN_FILE)
        plan = Plan.parse(settings.plan, str(directory / RUN_FILE))
        items = read_items(directory / ITEMS_FILE)
        path = directory / RESULTS_FILE
        try:
            content = path.read_bytes()
        except OSError as error:
            raise EvaluationError(f"{path} cannot be read; expected the results of a run: {error.strerror}") from error
        digests = {
            (task, language, item.id): item.digest
            for task, languages in items.items()
            for language, of_language in languages.items()
            for item in of_language
        }
        results = tuple(
            result
            for result in parse_results(content[: content.rfind(b"\n") + 1], path)
            if result.mask in settings.task_masks.get(result.task, ())
            and digests.get((result.task, result.language, result.item)) == result.item_digest
        )
        return cls(settings, plan, items, results)

    @cached_property
    def answers(self) -> Answers:
        """The answers by question."""
        tasks = {task.name: task for task in self.plan.tasks}
        return Answers(tasks, self.items, {result.question: result.answer for result in self.results})

    def evaluation(self, failures: Sequence[Failure] = ()) -> Evaluation:
        """The figures. failures: items that failed after all retries."""
        findings = analyse(
            self.answers,
            self.settings.masks,
            seed=self.plan.seed,
            beta=self.plan.beta,
            matched_effects=self.plan.matched_effects,
        )
        return Evaluation(
            name=self.plan.name,
            plan=self.settings.plan,
            model={"name": self.settings.model, **self.settings.fingerprint},
            server_version=self.settings.server_version,
            languages=self.plan.languages,
            masks=self.settings.masks,
            tasks=tuple(self._task(task) for task in self.plan.tasks),
            cells=findings.cells,
            effects=findings.effects,
            ranks=findings.ranks,
            matched=findings.matched,
            substitutions=substitutions_of(self.answers, self.settings.masks),
            failures=tuple(failures),
            intervals=findings.intervals,
            throughput=_throughput(self.results),
            versions=versions_here(),
        )

    def _task(self, task: Task) -> TaskInfo:
        items = self.items[task.name]
        chances = {language: task.chance(of) for language, of in items.items()}
        return TaskInfo(
            name=task.name,
            kind=task.kind,
            settings=task.settings(),
            metrics=task.metrics,
            languages=tuple(items),
            masks=self.settings.task_masks[task.name],
            items={language: len(of) for language, of in items.items()},
            digests=digests_of(items),
            chance={
                metric.name: {
                    language: chance[metric.name] for language, chance in chances.items() if metric.name in chance
                }
                for metric in task.metrics
                if any(metric.name in chance for chance in chances.values())
            },
        )


def digests_of(items: Mapping[str, Iterable[Item]]) -> dict[str, str]:
    """By language a SHA-256 (hex) over the ids and digests of its items in order."""
    return {
        language: sha256("".join(f"{item.id}\0{item.digest}\n" for item in of).encode()).hexdigest()
        for language, of in items.items()
    }


def _throughput(results: Iterable[ItemResult]) -> Throughput:
    last: dict[int, float] = {}
    answers = tokens = 0
    for result in results:
        answers += 1
        tokens += result.tokens
        last[result.session] = max(last.get(result.session, 0.0), result.elapsed_s)
    return Throughput(answers=answers, tokens=tokens, seconds=math.fsum(last.values()), sessions=len(last))
