"""Layer maps: where in the model the neurons of each mask lie."""

from clients.evaluation import Evaluation, PlannedMask
from clients.reporting.figures import NOTHING, masks_by_method
from crane_serve.common.reports.content import Cell, Picture, Section, Table


def masks_with_layers(evaluation: Evaluation) -> list[PlannedMask]:
    """Masks whose neurons per layer are known, grouped by method."""
    groups = masks_by_method(evaluation, evaluation.masks)
    return [mask for group in groups for name in group if (mask := evaluation.masks[name]).neurons_per_layer]


def layers_section(evaluation: Evaluation, pictures: tuple[Picture, ...]) -> Section | None:
    """The picture, and the counts in a folded part; None if no mask's layers are known."""
    masks = masks_with_layers(evaluation)
    if not masks:
        return None
    layers = max(len(mask.neurons_per_layer) for mask in masks)
    rows = tuple(
        (Cell(mask.name), *map(Cell, (f"{count:,}" for count in mask.neurons_per_layer)), *_missing(mask, layers))
        for mask in masks
    )
    counts = Section(
        "Neurons per layer, in figures", tables=(Table(("mask", *map(str, range(layers))), rows),), folded=True
    )
    about = ("How the neurons of each mask spread over the layers, from the first (0) to the last.",)
    return Section("Layers", about, pictures=pictures, parts=(counts,))


def _missing(mask: PlannedMask, layers: int) -> list[Cell]:
    return [Cell(NOTHING)] * (layers - len(mask.neurons_per_layer))
