"""Evaluations of made-up answers, so that what is made of them can be tested without a server."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from clients.analysis import analyse
from clients.answers import Score
from clients.evaluation import UNMASKED, Evaluation, Failure, PlannedMask, TaskInfo, Throughput
from clients.task import (
    Answers,
    Generate,
    Generated,
    Item,
    Metric,
    Question,
    ScoreContinuations,
    Scored,
    ScoreOf,
    ScoreText,
    Task,
    Value,
)

LANGUAGES = ("en", "vi", "zh")
BUDGETS = (0.001, 0.01, 0.05)
NEURONS = 20_000
LAYERS = 8
PROMPTS = {"en": "Where does the river begin?", "vi": "Con sông bắt đầu ở đâu?", "zh": "这条河从哪里开始？"}
ANSWERS = {"en": "In the hills.", "vi": "Ở trên đồi.", "zh": "在山上。"}


class _Made(Task):
    """A task whose items are made here."""

    def load(self, language: str, base: Path) -> tuple[Item, ...]:
        raise NotImplementedError


class Texts(_Made):
    """Nats per token of texts."""

    kind: ClassVar[str] = "texts"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        nats = Metric(
            name="nats_per_token",
            title="Loss",
            unit="nats per token",
            higher_is_better=False,
            score=ScoreOf.EXP_NEGATIVE,
        )
        return (nats, Metric(name="bits_per_byte", title="Bits per byte", unit="bits per byte", higher_is_better=False))

    def measure(self, item: Item, answer: Scored | Generated) -> dict[str, Value]:
        assert isinstance(answer, Scored)
        score = answer.scores[0]
        return {
            "nats_per_token": Value(-score.logprob, score.tokens),
            "bits_per_byte": Value(-score.logprob / np.log(2), score.bytes),
        }


class Guesses(_Made):
    """Whether the more probable of two continuations is the right one."""

    kind: ClassVar[str] = "guesses"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric(name="accuracy", title="Accuracy", unit="share right", higher_is_better=True, score=ScoreOf.LEVEL),
        )

    def measure(self, item: Item, answer: Scored | Generated) -> dict[str, Value]:
        return {"accuracy": Value(float(self.shown(item, answer) == item.reference["right"]))}

    def shown(self, item: Item, answer: Scored | Generated) -> str:
        assert isinstance(answer, Scored)
        return "yes" if answer.scores[0].logprob > answer.scores[1].logprob else "no"

    def expected(self, item: Item) -> str:
        return str(item.reference["right"])

    def chance(self, items: Sequence[Item]) -> dict[str, float]:
        return {"accuracy": 0.5}


class Written(_Made):
    """Whether a generated text is the reference."""

    kind: ClassVar[str] = "written"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric(name="match", title="Exact match", unit="share", higher_is_better=True),)

    def measure(self, item: Item, answer: Scored | Generated) -> dict[str, Value]:
        return {"match": Value(float(self.shown(item, answer) == item.reference["text"]))}

    def shown(self, item: Item, answer: Scored | Generated) -> str:
        assert isinstance(answer, Generated)
        return answer.text

    def expected(self, item: Item) -> str:
        return str(item.reference["text"])


def planned_masks(languages: Sequence[str] = LANGUAGES, draws: int = 3) -> dict[str, PlannedMask]:
    """`none`; two methods at each of BUDGETS; random masks of the middle budget."""
    masks = {UNMASKED: PlannedMask(name=UNMASKED)}
    wanted: list[tuple[str, float, int | None]] = [
        (method, budget, None) for method in ("attnlrp", "lape") for budget in BUDGETS
    ]
    wanted += [("random", BUDGETS[1], seed) for seed in range(draws)]
    for method, budget, seed in wanted:
        for language in languages:
            name = f"{method}-{language}-{budget:g}" + ("" if seed is None else f"-s{seed}")
            neurons = int(NEURONS * budget)
            middle = LAYERS // 2 if method == "attnlrp" else LAYERS - 1
            weights = np.exp(-np.abs(np.arange(LAYERS) - middle) / (50 if method == "random" else 2))
            counts = np.floor(neurons * weights / weights.sum()).astype(int)
            counts[middle] += neurons - counts.sum()
            masks[name] = PlannedMask(
                name=name,
                digest=f"{len(masks):064x}",
                neurons=neurons,
                language=language,
                method=method,
                budget=budget,
                seed=seed,
                neurons_per_layer=tuple(counts.tolist()),
            )
    return masks


def damage_of(mask: PlannedMask, language: str) -> float:
    """How much, from about 0 to 3, a mask hurts a language here."""
    if mask.method is None or mask.budget is None:
        return 0.0
    strength = {"attnlrp": 2.5, "lape": 1.0, "random": 0.2}[mask.method] * (mask.budget / BUDGETS[-1]) ** 0.5
    share = 1.0 if mask.language == language else {"attnlrp": 0.1, "lape": 0.5, "random": 1.0}[mask.method]
    return strength * share


def made_answers(masks: dict[str, PlannedMask], languages: Sequence[str] = LANGUAGES, items: int = 12) -> Answers:
    """Answers of three tasks: texts, guesses (at chance) and written answers. The same arguments, the same answers."""
    tasks: dict[str, Task] = {task.name: task for task in (Texts(name="ppl"), Guesses(name="pick"), Written(name="qa"))}
    asked: dict[str, dict[str, tuple[Item, ...]]] = {name: {} for name in tasks}
    answers: dict[Question, Scored | Generated] = {}
    for language in languages:
        rng = np.random.default_rng(7)
        prompt, right = PROMPTS.get(language, language), ANSWERS.get(language, language)
        base = rng.normal(60.0, 5.0, items)
        easy = rng.random(items)
        asked["ppl"][language] = tuple(Item(f"t{n}", language, ScoreText(f"{prompt} {n}")) for n in range(items))
        asked["pick"][language] = tuple(
            Item(f"g{n}", language, ScoreContinuations(f"{prompt} {n}", (" yes", " no")), {"right": "yes"})
            for n in range(items)
        )
        asked["qa"][language] = tuple(
            Item(f"q{n}", language, Generate(f"{prompt} {n}", 20), {"text": right}) for n in range(items)
        )
        for mask in masks.values():
            damage = damage_of(mask, language)
            for n in range(items):
                nats = base[n] + 20 * damage * (0.8 + 0.4 * easy[n])
                yes = 1.0 if (n % 2 == 0) != (damage > 0.3 and n % 3 == 0) else -1.0
                lost = damage > 1.5 * easy[n]
                for task, item, answer in (
                    ("ppl", f"t{n}", Scored(scores=(Score(logprob=-nats, tokens=20, bytes=80),))),
                    ("pick", f"g{n}", Scored(scores=tuple(Score(logprob=p, tokens=1, bytes=3) for p in (yes, 0.0)))),
                    ("qa", f"q{n}", Generated(text="?" * 3 if lost else right, tokens=3, finish_reason="stop")),
                ):
                    answers[Question(task, language, item, mask.name)] = answer
    return Answers(tasks, asked, answers)


def evaluation_of(answers: Answers, masks: dict[str, PlannedMask], *, failures: Sequence[Failure] = ()) -> Evaluation:
    """What a run with these answers would find."""
    found = analyse(answers, masks)
    tasks = tuple(
        TaskInfo(
            name=name,
            kind=task.kind,
            settings=task.settings(),
            metrics=task.metrics,
            languages=tuple(answers.items[name]),
            masks=tuple(masks),
            items={language: len(items) for language, items in answers.items[name].items()},
            digests={
                language: "-".join(i.digest[:4] for i in items) for language, items in answers.items[name].items()
            },
            chance={metric: dict.fromkeys(answers.items[name], value) for metric, value in task.chance(()).items()},
        )
        for name, task in answers.tasks.items()
    )
    languages = tuple(dict.fromkeys(language for task in tasks for language in task.languages))
    return Evaluation(
        name="made up",
        plan={"name": "made up"},
        model={"name": "tiny", "layers": LAYERS, "intermediate_sizes": [NEURONS // LAYERS] * LAYERS},
        server_version="1.2.3",
        languages=languages,
        masks=masks,
        tasks=tasks,
        cells=found.cells,
        effects=found.effects,
        ranks=found.ranks,
        matched=found.matched,
        failures=tuple(failures),
        intervals=found.intervals,
        throughput=Throughput(answers=len(answers.answers), tokens=1000, seconds=12.5, sessions=1),
        versions={"python": "3.12.0"},
    )
