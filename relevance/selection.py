"""Selection: from scores to the neurons that a mask switches off."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from crane_serve.common.masks import MaskInfo, NeuronMask, write_mask
from relevance.contrast import RANDOM_TOKENS, find_contrast, louder
from relevance.method import Method, ScoreSource, Shape, require_languages
from relevance.methods import find
from relevance.scores import Scores
from relevance.selection_options import (
    GLOBAL,
    UNIFORM,
    ZERO,
    Intervention,
    Overlap,
    Rule,
    SelectionError,
    SelectionOptions,
)

NAME = "{method}-{language}"

_ROUNDING = 1e-9  # relative differences between scores up to this size count as rounding


@dataclass(frozen=True)
class Selection:
    """One mask per language, and the options by which its neurons were selected."""

    masks: Mapping[str, NeuronMask]
    options: SelectionOptions

    def write(self, directory: Path, scores: Scores, name: str = NAME) -> list[Path]:
        """Write a mask file for every language; returns the paths.

        name: of the masks; {method}, {language}, {rule} and {seed} are filled in. The recorded budget is the requested
        fraction, or the fraction that the rule selected. Raises SelectionError if two languages get the same name,
        MaskFileError for a name that is not allowed.
        """
        names = [self._name(name, language) for language in self.masks]
        if len(set(names)) < len(names):
            raise SelectionError(f"the name {name!r} is the same for several languages; it needs {{language}}")
        return [
            write_mask(directory, of_mask, mask, self._info(language, mask, scores))
            for of_mask, (language, mask) in zip(names, self.masks.items(), strict=True)
        ]

    def _name(self, pattern: str, language: str) -> str:
        of = self.options
        fields = {"method": of.method, "language": language, "rule": of.rule, "seed": of.seed}
        for field, value in fields.items():
            pattern = pattern.replace(f"{{{field}}}", str(value))
        if "{" in pattern:
            known = ", ".join(f"{{{field}}}" for field in fields)
            raise SelectionError(f"name {pattern!r} holds an unknown field; there are {known}")
        return pattern

    def _info(self, language: str, mask: NeuronMask, scores: Scores) -> MaskInfo:
        of = self.options
        texts = scores.info.texts(of.method)
        by_fraction = of.rule is Rule.BUDGET and of.count is None
        return MaskInfo(
            language=language,
            method=of.method,
            fingerprint=scores.info.fingerprint,
            budget=of.budget if by_fraction else mask.neurons / scores.shape.neurons,
            corpus_digest=texts.corpus_digest,
            parameters={
                "rule": str(of.rule),
                **of.threshold,
                "contrast": of.effective_contrast,
                "quotas": of.effective_quotas,
                "overlap": str(of.overlap),
                "output_dimensions": of.output_dimensions,
                **({} if of.intervention in (None, ZERO) and of.strength == 1 else _what(of)),
                "seed": of.seed,
                "split": texts.split,
                **({} if texts.normalised is None else {"normalised": str(texts.normalised)}),
                "languages": list(scores.info.languages),
            },
        )


def _what(options: SelectionOptions) -> dict[str, str | float]:
    return {"intervention": options.intervention or ZERO, "strength": options.strength}


def select(scores: Scores, options: SelectionOptions) -> Selection:
    """For every language the neurons that `options` select from the ranking of its method.

    Rules. `budget`: the first neurons in `order`, as many as the budget allows. `z`: those whose contrasted score
    exceeds the mean over all neurons of the language by more than z standard deviations. `published`: those that the
    method's own rule selects. The same rule applies to output dimensions; z is then computed over neurons and output
    dimensions together. `experts`: the experts whose neurons rank highest on average, which routers then leave out; one
    is left in each layer.

    Quotas. `global`: the ranking ignores layers. `uniform`: the same number from each layer, as far as possible, and
    the remainder from the best ranked. `like:METHOD`: from each layer as many as METHOD takes under the same rule,
    contrast and overlap, but only neurons that METHOD does not take: a control for the choice within the layers.

    Overlap. `exclusive` assigns each neuron to the language that ranks it highest, to the first language in a tie; the
    rule, or the budget, then selects among the neurons of the language.

    Contrast. `random-tokens` leaves the method's own contrast as it is, and takes no neuron for a language that scores
    as high on random token sequences.

    Without an intervention neurons are switched off, or become what they became in the search that made the scores.

    Raises MethodError for an unknown method and for one without a published rule, ContrastError, ScoresError for
    missing scores, and SelectionError for scores that are not finite, an impossible budget, too few neurons in a layer
    or for a language, too few experts, a rule that selects no neuron, or another ablation than that of the search.
    """
    if options.rule is Rule.EXPERTS:
        return Selection(_of_experts(scores, options), options)
    options = options.settled(scores.info)
    intervention = Intervention.of(options.intervention or ZERO, scores)
    neurons, dimensions = _chosen(scores, options)
    masks = {}
    for index, language in enumerate(scores.info.languages):
        off = neurons[index]
        outputs_off = None if dimensions is None else dimensions[index]
        if not bool(off.any()) and (outputs_off is None or not bool(outputs_off.any())):
            raise SelectionError(f"the rule {options} of {options.method} takes no neuron for {language}")
        output = None if outputs_off is None else (~outputs_off).float()
        masks[language] = intervention.mask(off, scores.shape.sizes, options.strength, output)
    return Selection(masks, options)


def order(
    scores: Scores,
    method: str,
    contrast: str | None = None,
    seed: int = 0,
    *,
    quotas: str = GLOBAL,
    overlap: Overlap = Overlap.SHARED,
) -> dict[str, Tensor]:
    """Per language its neurons, best first: int64 [neurons, 2], layer and index. Ties go to the lower layer and index.

    A selection by budget is a prefix of this order, so the sets of growing budgets are nested. quotas: "global" or
    "uniform"; a matched selection is not a prefix of any order, since it depends on the neurons of the other method.

    Raises SelectionError for a matched method, and what `select` raises.
    """
    options = SelectionOptions(method, contrast=contrast, seed=seed, quotas=quotas, overlap=overlap)
    if options.matched_to is not None:
        raise SelectionError(f"matched neurons have no order; expected quotas {GLOBAL} or {UNIFORM}")
    return dict(zip(scores.info.languages, _Units.of(scores, options).orders(quotas), strict=True))


@dataclass(frozen=True)
class _Units:
    """The ranked units: neurons, or output dimensions.

    shape: of the tensors, padding included; raw: the method's scores, ranking: the higher the sooner, both float64
    [languages, layers, widest]; own: bool of the same shape, the units that a language may take.
    """

    options: SelectionOptions
    shape: Shape
    raw: Tensor
    ranking: Tensor
    own: Tensor

    @classmethod
    def of(cls, scores: Scores, options: SelectionOptions) -> "_Units":
        """The neurons."""
        kind = find(options.method)
        require_languages([kind], scores.info.languages)
        units = cls._ranked(options, kind, scores.shape, scores.of(options.method))
        if options.contrast != RANDOM_TOKENS or kind.source is ScoreSource.NOTHING:
            return units
        return replace(units, own=units.own & louder(units.raw, scores.on_random_of(options.method).double()))

    @classmethod
    def of_outputs(cls, scores: Scores, options: SelectionOptions) -> "_Units":
        """The output dimensions, as if they were neurons. A matched random control needs no scores of them."""
        kind = find(options.method)
        shape = Shape(scores.info.languages, (scores.info.fingerprint.hidden_size,) * len(scores.shape.sizes))
        drawn = kind.matched_to is not None and options.matched_to is not None
        return cls._ranked(options, kind, shape, torch.zeros(shape.tensor) if drawn else scores.outputs_of(kind.name))

    @classmethod
    def _ranked(cls, options: SelectionOptions, kind: type[Method], shape: Shape, scores: Tensor) -> "_Units":
        raw = scores.double()
        for language, of_language in zip(shape.languages, raw, strict=True):
            if not bool(torch.isfinite(of_language).all()):
                raise SelectionError(f"scores of {options.method} for {language} are not all finite")
        contrast = None if options.contrast == RANDOM_TOKENS else options.contrast
        find_contrast(contrast or kind.contrast)
        ranking = kind.ranking(raw, shape, options.seed, contrast)
        own = shape.exists.expand_as(ranking)
        if options.overlap is Overlap.EXCLUSIVE:
            own = exclusive(ranking, shape.exists)
        return cls(options, shape, raw, ranking, own)

    def orders(self, quotas: str) -> list[Tensor]:
        """Per language int64 [units, 2], best first."""
        ordered = [best_first(ranking, own) for ranking, own in zip(self.ranking, self.own, strict=True)]
        return [evenly(places) for places in ordered] if quotas == UNIFORM else ordered

    def published(self) -> Tensor:
        """bool [languages, layers, widest]: the units that the method's own rule selects."""
        return find(self.options.method).published(self.raw, self.shape) & self.own

    def matched(self, model: Tensor) -> Tensor:
        """As many from each layer as `model`, the best ranked of the others: bool [languages, layers, widest], both."""
        languages = zip(self.ranking, model, self.own, strict=True)
        return torch.stack([matched_top(ranking, taken, own) for ranking, taken, own in languages])


def _chosen(scores: Scores, options: SelectionOptions) -> tuple[Tensor, Tensor | None]:
    """bool [languages, layers, widest] neurons and, where wanted, [languages, layers, hidden] output dimensions."""
    neurons = _Units.of(scores, options)
    dimensions = _Units.of_outputs(scores, options) if options.output_dimensions else None
    if options.matched_to is not None:
        model, of_outputs = _chosen(scores, replace(options, method=options.matched_to, quotas=GLOBAL))
        outputs = None if dimensions is None or of_outputs is None else dimensions.matched(of_outputs)
        return neurons.matched(model), outputs
    if options.rule is Rule.PUBLISHED:
        return neurons.published(), None if dimensions is None else dimensions.published()
    if options.rule is Rule.Z:
        return _outstanding(options, neurons, dimensions)
    return _of_budget(options, neurons), None


def _of_budget(options: SelectionOptions, neurons: _Units) -> Tensor:
    count = options.neurons(neurons.shape.neurons)
    chosen = torch.zeros(neurons.shape.tensor, dtype=torch.bool)
    for index, places in enumerate(neurons.orders(options.effective_quotas)):
        if len(places) < count:
            raise SelectionError(
                f"{options} asks for {count} neurons, but only {len(places)} rank best for "
                f"{neurons.shape.languages[index]}; choose a smaller budget, or {_more(options)}"
            )
        layers, indices = places[:count].unbind(dim=1)
        chosen[index, layers, indices] = True
    return chosen


def _more(options: SelectionOptions) -> str:
    return "another contrast" if options.contrast == RANDOM_TOKENS else "let languages share"


def _of_experts(scores: Scores, options: SelectionOptions) -> dict[str, NeuronMask]:
    """Masks of routers."""
    experts, sizes, units = scores.info.fingerprint.experts, scores.shape.sizes, _Units.of(scores, options)
    if experts is None:
        raise SelectionError(f"the model ({scores.info.fingerprint.architecture}) has no experts")
    room = len(experts.layers) * (experts.count - 1)
    if options.threshold["count"] > room:
        raise SelectionError(f"count is {options.count}; all layers but one expert in each have {room}")
    masks = {}
    for language, ranking in zip(scores.info.languages, units.ranking, strict=True):
        of_layers = [ranking[layer, experts.columns(layer, sizes)].view(experts.count, -1) for layer in experts.layers]
        means = torch.stack([neurons.mean(dim=1) for neurons in of_layers])  # [layers with experts, experts]
        # The last of each layer stays.
        eligible = torch.ones_like(means, dtype=torch.bool).scatter_(1, means.argmin(dim=1, keepdim=True), False)
        router = torch.ones(len(sizes), experts.count)
        for place, expert in best_first(means, eligible)[: options.count].tolist():
            router[experts.layers[place], expert] = 0
        masks[language] = NeuronMask(torch.ones(len(sizes), max(sizes)), sizes, router=router)
    return masks


def _outstanding(options: SelectionOptions, neurons: _Units, dimensions: _Units | None) -> tuple[Tensor, Tensor | None]:
    """Rule.Z. Output dimensions are contrasted with the neurons, as further ones of their layer."""
    if dimensions is None:
        return outstanding(neurons.ranking, neurons.shape.exists, options.z) & neurons.own, None
    contrast = find_contrast(options.effective_contrast)
    contrasted = contrast(torch.cat((neurons.raw, dimensions.raw), dim=2))  # [languages, layers, widest + hidden]
    exists = torch.cat((neurons.shape.exists, dimensions.shape.exists), dim=1)
    widest = neurons.shape.tensor[2]
    chosen = outstanding(contrasted, exists, options.z)
    return chosen[..., :widest] & neurons.own, chosen[..., widest:] & dimensions.own


def best_first(ranking: Tensor, eligible: Tensor) -> Tensor:
    """The eligible units, the highest first, ties going to the lower layer and index: int64 [units, 2].

    ranking: [layers, widest]; eligible: bool of the same shape.
    """
    best = torch.sort(ranking[eligible], descending=True, stable=True).indices
    return eligible.nonzero()[best]


def evenly(places: Tensor) -> Tensor:
    """`places` (int64 [units, 2], best first) in rounds: the best of every layer, then the second of every layer, ...

    Within a round the order is kept. So every prefix has nearly the same number of each layer, as far as the layers
    allow, and its last, incomplete round has the best ranked units.
    """
    layers = places[:, 0]
    by_layer = torch.argsort(layers, stable=True)
    _, sizes = torch.unique_consecutive(layers[by_layer], return_counts=True)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    rounds = torch.empty_like(layers)
    rounds[by_layer] = torch.arange(len(layers)) - starts
    return places[torch.argsort(rounds, stable=True)]


def exclusive(ranking: Tensor, exists: Tensor) -> Tensor:
    """The language that ranks each unit best, by its place in the ranking and not by its score; the first language in a
    tie.

    ranking: [languages, layers, widest]; exists: bool [layers, widest]. Returns bool of the shape of `ranking`.
    """
    place = torch.full(ranking.shape, ranking[0].numel(), dtype=torch.int64)
    for language, of_language in enumerate(ranking):
        layers, indices = best_first(of_language, exists).unbind(dim=1)
        place[language, layers, indices] = torch.arange(len(layers))
    best = place == place.amin(dim=0)
    return best & (best.cumsum(dim=0) == 1) & exists


def outstanding(contrasted: Tensor, exists: Tensor, z: float) -> Tensor:
    """Units more than z standard deviations above the mean of all units of their language.

    contrasted: [languages, layers, widest]; exists: bool [layers, widest]. Returns bool of the shape of `contrasted`.
    If all units of a language are equal except for rounding, none is selected.
    """
    units = contrasted[:, exists]  # [languages, units]
    mean, deviation = units.mean(dim=1), units.std(dim=1, correction=0)
    differ = deviation > _ROUNDING * units.abs().amax(dim=1)
    return (contrasted > (mean + z * deviation)[:, None, None]) & differ[:, None, None] & exists


def matched_top(ranking: Tensor, model: Tensor, eligible: Tensor) -> Tensor:
    """As many units of each layer as `model` has: the highest ranked eligible units that are not in `model`.

    All are [layers, widest], the last two bool. Raises SelectionError when a layer has too few left.
    """
    left = eligible & ~model
    chosen = torch.zeros_like(model)
    for layer, count in enumerate(model.sum(dim=1).tolist()):
        if count > int(left[layer].sum()):
            raise SelectionError(
                f"layer {layer} has {int(eligible[layer].sum())} neurons to choose from, and the matched method takes "
                f"{count}: too few are left for a control; choose a smaller budget"
            )
        _, indices = best_first(ranking[layer][None], left[layer][None])[:count].unbind(dim=1)
        chosen[layer, indices] = True
    return chosen
