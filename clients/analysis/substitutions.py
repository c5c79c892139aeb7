"""Substitutions: which language takes over in the answers that are not in the expected one."""

from collections import Counter
from collections.abc import Iterable

from clients.analysis.samples import grouped
from clients.evaluation import Substitution
from clients.task import Answers


def substitutions_of(answers: Answers, masks: Iterable[str]) -> tuple[Substitution, ...]:
    """For every task that tells languages, language and mask with answers, in the order of the evaluation."""
    names, groups = tuple(masks), grouped(answers)
    return tuple(
        Substitution(
            task=name,
            language=language,
            mask=mask,
            answers=len(substitutes),
            languages=dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))),
        )
        for name, task in answers.tasks.items()
        if task.tells_languages
        for language, items in answers.items.get(name, {}).items()
        for mask in names
        if (by_item := groups.get((name, language), {}).get(mask))
        and (substitutes := [task.substitute(item, by_item[item.id]) for item in items if item.id in by_item])
        for counts in [Counter(substitute for substitute in substitutes if substitute is not None)]
    )
