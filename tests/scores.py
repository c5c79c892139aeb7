"""Scores made by hand or at random, without a model."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from crane_serve.common.masks import Fingerprint
from relevance.method import Shape
from relevance.scores import Scores, ScoresInfo

LANGUAGES = ("en", "vi", "zh")
SIZES = (50, 30)
HIDDEN = 8


def scores_info(languages: Sequence[str] = LANGUAGES, sizes: Sequence[int] = SIZES, hidden: int = HIDDEN) -> ScoresInfo:
    count = len(languages)
    fingerprint = Fingerprint(
        architecture="LlamaForCausalLM",
        layers=len(sizes),
        hidden_size=hidden,
        intermediate_sizes=tuple(sizes),
        config_digest="c",
        weights_digest="w",
    )
    return ScoresInfo(
        languages=tuple(languages),
        fingerprint=fingerprint,
        corpus_digest="d",
        split="relevance",
        documents=(3,) * count,
        tokens=(30,) * count,
        truncated=(0,) * count,
        skipped=(0,) * count,
        max_tokens=2048,
        dtype="float32",
    )


def given_scores(
    by_method: Mapping[str, object], outputs: Mapping[str, object] | None = None, languages: Sequence[str] = LANGUAGES
) -> Scores:
    """Scores written out as nested lists [languages][layers][neurons], every layer of one size."""
    tensors = {method: torch.tensor(values, dtype=torch.float32) for method, values in by_method.items()}
    dimensions = {method: torch.tensor(values, dtype=torch.float32) for method, values in (outputs or {}).items()}
    count, layers, neurons = next(iter(tensors.values())).shape
    hidden = next((values.shape[2] for values in dimensions.values()), HIDDEN)
    return Scores(tensors, scores_info(languages[:count], (neurons,) * layers, hidden), dimensions)


def random_scores(languages: Sequence[str] = LANGUAGES, sizes: Sequence[int] = SIZES) -> Scores:
    """Scores of attnlrp, crane (with outputs), lape and random; layers of different sizes."""
    generator = torch.Generator().manual_seed(1)
    shape = Shape(tuple(languages), tuple(sizes))

    def normal() -> Tensor:
        return torch.randn(shape.tensor, generator=generator).where(shape.exists, 0)

    def uniform() -> Tensor:
        return torch.rand(shape.tensor, generator=generator).where(shape.exists, 0)

    outputs = torch.randn((len(languages), len(sizes), HIDDEN), generator=generator)
    by_method = {"attnlrp": normal(), "crane": normal(), "lape": uniform(), "random": uniform()}
    return Scores(by_method, scores_info(languages, sizes), {"crane": outputs})
