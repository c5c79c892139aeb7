"""Random scores: the control, which shows the cost of arbitrary neurons."""

from collections.abc import Sequence

import torch
from torch import Tensor

from relevance.method import ScoredMethod, ScoreSource, Shape


class Random(ScoredMethod):
    """Uniform scores in [0, 1), drawn from a seed. `score` is the draw of seed 0; a selection may ask for another.

    No publication: the control.
    """

    name = "random"
    source = ScoreSource.NOTHING
    languages_needed = 1
    matched_to = "attnlrp"

    @classmethod
    def score(cls, finalised: Sequence[Tensor], shape: Shape) -> Tensor:
        return draw(shape, seed=0)

    @classmethod
    def ranking(cls, scores: Tensor, shape: Shape, seed: int, contrast: str | None = None) -> Tensor:
        return draw(shape, seed)


def draw(shape: Shape, seed: int) -> Tensor:
    """float64 [languages, layers, widest], uniform in [0, 1), 0 in padding; the same for the same seed and shape."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(shape.tensor, generator=generator, dtype=torch.float64)
    return scores.where(shape.exists, 0)
