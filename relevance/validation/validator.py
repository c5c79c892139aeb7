"""Validation: do the neurons that a method names really matter to their language, and to no other?"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from crane_serve.common.masks import NeuronMask
from crane_serve.common.numbers.bootstrap import Estimate, change_per_token, estimate, resampled_sums
from crane_serve.common.numbers.langspec import Form, langspec_f1
from relevance.method import MethodError
from relevance.methods import find
from relevance.scored_model import EncodedTexts, ScoredModel
from relevance.scores import Scores
from relevance.selection import order, select
from relevance.selection_options import GLOBAL, LIKE, ZERO, Intervention, SelectionOptions, neurons_of_budget
from relevance.validation.ablations import Ablations
from relevance.validation.overlap import members, neurons_per_layer, overlaps, stability
from relevance.validation.result import (
    CHOICE,
    MATCHED,
    REPORT,
    MaskEffect,
    Texts,
    Validation,
    ValidationError,
    ValidationPlan,
)

JOURNAL_FILE = "ablations.jsonl"
OVERLAP_BUDGET = 0.01

_FIRST_COUNT = 8
_WIDENING = 4
_PRECISION = 1.07  # the search stops when two numbers of neurons are within this ratio


class Validator:
    """Runs a plan: masks of every method, their effects on the texts for reporting, and at matched effect.

    The number of neurons for a matched effect is chosen on the part "validation"; everything is reported on "test".
    Raises ValidationError, before the first measurement, for a plan that cannot be run.
    """

    def __init__(
        self,
        ablations: Ablations,
        scores: Scores,
        plan: ValidationPlan,
        advance: Callable[[str], None] = lambda done: None,
    ) -> None:
        self.ablations = ablations
        self.scores = scores
        self.plan = plan
        self.advance = advance
        self.languages = scores.info.languages
        self.empty: list[tuple[str, str]] = []
        for method in plan.methods:
            scores.of(method)
            self._intervention(method)
        for budget in plan.budgets:
            neurons_of_budget(budget, scores.shape.neurons)
        if plan.effect is not None and not plan.effect > 0:
            raise ValidationError(f"the effect to match is {plan.effect} nats per token; expected one above 0")
        for part in (CHOICE, REPORT):
            if missing := set(self.languages) - set(ablations.texts[part]):
                raise ValidationError(f"the texts of {part} lack {', '.join(sorted(missing))}")

    @property
    def masks(self) -> int:
        """The number of masks in the plan, which is how often `advance` is called, also for masks that do not exist."""
        draws = sum(len(self._seeds(method)) for method in self.plan.methods)
        random = sum(len(self.plan.seeds) for method in self.plan.methods if self._draws(method))
        of_language = draws * (len(self.plan.budgets) + (self.plan.effect is not None))
        of_language += random * len(self.plan.budgets) * (self.plan.matched_to is not None)
        of_language += len(self.plan.methods) * self.plan.published
        return of_language * len(self.languages)

    def effects(self) -> Iterator[MaskEffect]:
        """Effects at every budget, of the published rules and of the controls."""
        for method in self.plan.methods:
            for seed in self._seeds(method):
                orders = self._orders(method, seed)
                for budget in self.plan.budgets:
                    count = neurons_of_budget(budget, self.scores.shape.neurons)
                    for language in self.languages:
                        mask = self._mask(method, orders[language], count)
                        yield self._effect(method, language, "budget", self._seed_of(method, seed), mask)
                if seed is not None and self.plan.matched_to is not None:
                    yield from self._controls(method, seed, self.plan.matched_to)
            if self.plan.published:
                yield from self._published(method)

    def matched(self) -> tuple[list[MaskEffect], list[tuple[str, str]]]:
        """Effects where the target loses `plan.effect`, and the pairs (method, language) that never reach it."""
        effects: list[MaskEffect] = []
        unreached: list[tuple[str, str]] = []
        if self.plan.effect is None:
            return effects, unreached
        for method in self.plan.methods:
            for seed in self._seeds(method):
                orders = self._orders(method, seed)
                for language in self.languages:
                    count = self._count_for(self.plan.effect, method, orders[language], language)
                    if count is None:
                        unreached.append((method, language))
                        self.advance(f"{method} {language} {MATCHED}")
                        continue
                    mask = self._mask(method, orders[language], count)
                    effects.append(self._effect(method, language, MATCHED, self._seed_of(method, seed), mask))
        return effects, unreached

    def _seeds(self, method: str) -> Sequence[int]:
        return self.plan.seeds if self._draws(method) else (0,)

    def _seed_of(self, method: str, seed: int) -> int | None:
        return seed if self._draws(method) else None

    @staticmethod
    def _draws(method: str) -> bool:
        return find(method).matched_to is not None

    def _orders(self, method: str, seed: int) -> Mapping[str, Tensor]:
        return order(self.scores, method, seed=seed)

    def _controls(self, method: str, seed: int, like: str) -> Iterator[MaskEffect]:
        if not self._draws(method):
            return
        for budget in self.plan.budgets:
            options = self._options(method, budget=budget, quotas=f"{LIKE}{like}", seed=seed)
            selection = select(self.scores, options)
            for language, mask in selection.masks.items():
                intervention = selection.options.intervention
                yield self._effect(method, language, f"{LIKE}{like}", seed, mask, intervention)

    def _published(self, method: str) -> Iterator[MaskEffect]:
        shape = self.scores.shape
        try:
            chosen = find(method).published(self.scores.of(method).double(), shape)
        except MethodError:  # published without a rule
            for language in self.languages:
                self.advance(f"{method} {language} published")
            return
        for language, off in zip(self.languages, chosen, strict=True):
            if not bool(off.any()):
                self.empty.append((method, language))
                self.advance(f"{method} {language} published")
                continue
            mask = self._intervention(method).mask(off, shape.sizes)
            yield self._effect(method, language, "published", None, mask)

    def _options(self, method: str, quotas: str = GLOBAL, **options: Any) -> SelectionOptions:
        """With the intervention of the plan, or that of the scores."""
        wanted = SelectionOptions(method, quotas=quotas, intervention=self.plan.intervention, **options)
        return wanted.settled(self.scores.info)

    def _intervention(self, method: str) -> Intervention:
        return Intervention.of(self._options(method).intervention or ZERO, self.scores)

    def _mask(self, method: str, ordered: Tensor, count: int) -> NeuronMask:
        off = members(ordered[:count], self.scores.shape.tensor[1:])
        return self._intervention(method).mask(off, self.scores.shape.sizes)

    def _count_for(self, effect: float, method: str, ordered: Tensor, language: str) -> int | None:
        """The smallest number of neurons, to within 7 %, that costs `language` so many nats per token on the part for
        choices."""

        def costs(count: int) -> bool:
            return self.ablations.loss(self._mask(method, ordered, count), CHOICE, language) >= effect

        return fewest(costs, len(ordered))

    def _effect(
        self,
        method: str,
        language: str,
        rule: str,
        seed: int | None,
        mask: NeuronMask,
        intervention: str | None = None,
    ) -> MaskEffect:
        measured = {name: self.ablations.losses(mask, REPORT, name) for name in self.languages}
        whole = {name: self.ablations.losses(None, REPORT, name) for name in self.languages}
        changes = {
            name: change_per_token(measured[name].nats, whole[name].nats, measured[name].tokens)
            for name in self.languages
        }
        unmasked = {name: float(np.exp(-whole[name].per_token)) for name in self.languages}
        left = {name: float(np.exp(-measured[name].per_token)) for name in self.languages}
        self.advance(f"{method} {language} {rule}")
        return MaskEffect(
            method=method,
            language=language,
            rule=rule,
            seed=seed,
            budget=mask.neurons / self.scores.shape.neurons,
            neurons=mask.neurons,
            digest=mask.digest,
            changes=changes,
            collateral=collateral(
                {name: measured[name].nats - whole[name].nats for name in self.languages},
                {name: measured[name].tokens for name in self.languages},
                language,
            ),
            f1={form: langspec_f1(unmasked, left, language, form) for form in Form},
            intervention=intervention or self._options(method).intervention or ZERO,
        )


def run(
    scored_model: ScoredModel,
    texts: Mapping[str, EncodedTexts],
    plan: ValidationPlan,
    directory: Path,
    batch_tokens: int,
    halves: Sequence[Scores] = (),
    advance: Callable[[str], None] = lambda done: None,
    start: Callable[[int], None] = lambda masks: None,
) -> Validation:
    """Run `plan` and save the result in `directory`, where a journal lets a killed run continue.

    texts: of the parts "validation" and "test"; halves: scores from two halves of a corpus, or none. start: called with
    the largest number of masks; advance: called for each mask that is measured or does not exist. Raises
    ValidationError, JournalError, and the errors of `select`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    ablations = Ablations(
        scored_model.decoder,
        {part: of.documents for part, of in texts.items()},
        batch_tokens,
        directory / JOURNAL_FILE,
        scored_model.identity(texts, batch_tokens),
    )
    validator = Validator(ablations, scored_model.scores, plan, advance)
    start(validator.masks)
    matched, unreached = validator.matched()
    effects = [*validator.effects(), *matched]
    methods = [method for method in plan.methods if not find(method).matched_to]
    result = Validation(
        fingerprint=scored_model.scores.info.fingerprint,
        languages=scored_model.languages,
        dtype=str(scored_model.dtype).removeprefix("torch."),
        plan=plan,
        relevance_digest=scored_model.scores.info.corpus_digest,
        texts={part: _described(ablations, part, of) for part, of in texts.items()},
        effects=effects,
        unreached=unreached,
        empty=validator.empty,
        overlap_budget=OVERLAP_BUDGET,
        overlaps=overlaps(scored_model.scores, methods, OVERLAP_BUDGET),
        stability=stability(halves, OVERLAP_BUDGET),
        layers=neurons_per_layer(scored_model.scores, methods, OVERLAP_BUDGET),
    )
    result.save(directory)
    return result


def _described(ablations: Ablations, part: str, texts: EncodedTexts) -> Texts:
    whole = {language: ablations.losses(None, part, language) for language in texts.documents}
    return Texts(
        corpus_digest=texts.corpus_digest,
        split=texts.split,
        documents={language: len(of.nats) for language, of in whole.items()},
        tokens={language: int(of.tokens.sum()) for language, of in whole.items()},
        nats_per_token={language: of.per_token for language, of in whole.items()},
    )


def fewest(enough: Callable[[int], bool], most: int) -> int | None:
    """The smallest count from 1 to `most` that is `enough`, to within a ratio of 1.07; None if `most` is not enough.

    Assumes that larger counts than a sufficient one are sufficient, too. Calls `enough` about a dozen times.
    """
    too_few, count = 0, min(_FIRST_COUNT, most)
    while not enough(count):
        if count == most:
            return None
        too_few, count = count, min(count * _WIDENING, most)
    while count - too_few > 1 and count > too_few * _PRECISION:
        middle = round((too_few * count) ** 0.5) if too_few else (count + 1) // 2
        middle = min(max(middle, too_few + 1), count - 1)
        if enough(middle):
            count = middle
        else:
            too_few = middle
    return count


def collateral(
    changes: Mapping[str, np.ndarray], tokens: Mapping[str, np.ndarray], target: str, seed: int = 0
) -> Estimate | None:
    """Mean loss per token of the other languages over that of `target`, with a bootstrap over documents.

    changes: nats that each document loses, [documents] by language; tokens: their lengths. A resample draws documents
    of every language, the same places in all languages that have equally many, since those may be parallel. None if the
    target loses nothing. There is no interval if the target loses nothing in some resample.
    """
    sums = {name: resampled_sums(np.stack([changes[name], tokens[name]], axis=1), seed=seed) for name in changes}
    losses = {name: of_language[:, 0] / of_language[:, 1] for name, of_language in sums.items()}  # [1 + resamples]
    loss = losses.pop(target)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(loss > 0, sum(losses.values()) / len(losses) / loss, np.nan)
    interval = estimate(ratios, least=1.0)
    if interval is None or min(map(len, changes.values())) > 1:
        return interval
    return interval.model_copy(update={"low": None, "high": None})
