"""LangSpec-F1: how selective a mask's damage is for its own language, as one number between 0 and 1.

From CRANE's published evaluation code (Le & Li, arXiv:2601.04664), which has two forms. Both clip: a gain counts as no
loss. So it is always shown beside the signed changes, never instead of them.
"""

from collections.abc import Mapping
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Form(StrEnum):
    """RELATIVE: drops are fractions of each language's baseline. ABSOLUTE: drops are differences of scores."""

    RELATIVE = "relative"
    ABSOLUTE = "absolute"


def langspec_f1(
    baseline: Mapping[str, float], masked: Mapping[str, float], target: str, form: Form, beta: float = 1.0
) -> float:
    """LangSpec-F1 of `target` from one score per language, by the rule of `langspec_f1_of_arrays`.

    baseline, masked: a score above 0 of each language, the higher the better, unmasked and masked. Raises ValueError
    for a missing language, a baseline not above 0, or no other language.
    """
    others = [language for language in baseline if language != target]
    if target not in baseline or not others or baseline.keys() != masked.keys():
        raise ValueError(f"expected scores of {target!r} and of other languages, both unmasked and masked")
    for language, score in baseline.items():
        if not score > 0:
            raise ValueError(f"the baseline score of {language} is {score}; expected one above 0")
    order = [target, *others]
    f1 = langspec_f1_of_arrays([baseline[name] for name in order], [masked[name] for name in order], form, beta)
    return float(f1)


def langspec_f1_of_arrays(baseline: ArrayLike, masked: ArrayLike, form: Form, beta: float = 1.0) -> NDArray[np.float64]:
    """F = (1 + b^2) P R / (P + b^2 R) with P = d_t / (d_t + mean of d_o over the others o) and R = the target's drop.

    baseline, masked: [languages, ...], scores of the target first and then of at least one other language. With B and M
    for them, relative: d = max((B - M) / B, 0) and R = d_t. Absolute: d = max(B - M, 0) and R = d_t / B_t. Returns
    [...]: 0 where the target drops by nothing, NaN where a baseline is not above 0 or a score is NaN.
    """
    unmasked = np.asarray(baseline, dtype=np.float64)
    unmasked = np.where(unmasked > 0, unmasked, np.nan)
    drops = np.maximum(unmasked - np.asarray(masked, dtype=np.float64), 0.0)  # [languages, ...]
    if form is Form.RELATIVE:
        drops = drops / unmasked
    target, others = drops[0], drops[1:].mean(axis=0)
    recall = target if form is Form.RELATIVE else target / unmasked[0]
    weight = beta**2
    with np.errstate(invalid="ignore"):
        precision = target / (target + others)
        f1 = (1 + weight) * precision * recall / (precision + weight * recall)
    return np.where((target == 0) & ~np.isnan(others), 0.0, f1)
