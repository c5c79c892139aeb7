"""LangSpec-F1: how much of what a mask takes, it takes from its own language, in one number between 0 and 1.

From CRANE's published evaluation code (Le & Li, arXiv:2601.04664), which has two forms. Both clip: a language that
gains counts as one that loses nothing. So it is always shown beside the signed changes, never instead of them.
"""

from collections.abc import Mapping
from enum import StrEnum


class Form(StrEnum):
    """RELATIVE: drops are fractions of each language's baseline. ABSOLUTE: drops are differences of scores."""

    RELATIVE = "relative"
    ABSOLUTE = "absolute"


def langspec_f1(
    baseline: Mapping[str, float], masked: Mapping[str, float], target: str, form: Form, beta: float = 1.0
) -> float:
    """F = (1 + b^2) P R / (P + b^2 R) with P = d_t / (d_t + mean of d_o over the others o) and R = the target's drop.

    baseline, masked: a score above 0 of each language, the higher the better, unmasked and masked. With B and M for
    them, relative: d = max((B - M) / B, 0) and R = d_t. Absolute: d = max(B - M, 0) and R = d_t / B_t. 0 where the
    target drops by nothing. Raises ValueError for a missing language, a baseline not above 0, or no other language.
    """
    others = [language for language in baseline if language != target]
    if target not in baseline or not others or baseline.keys() != masked.keys():
        raise ValueError(f"expected scores of {target!r} and of other languages, both unmasked and masked")
    for language, score in baseline.items():
        if not score > 0:
            raise ValueError(f"the baseline score of {language} is {score}; expected one above 0")
    drops = {language: max(baseline[language] - masked[language], 0.0) for language in baseline}
    if form is Form.RELATIVE:
        drops = {language: drop / baseline[language] for language, drop in drops.items()}
    if drops[target] == 0:
        return 0.0
    precision = drops[target] / (drops[target] + sum(drops[language] for language in others) / len(others))
    recall = drops[target] if form is Form.RELATIVE else drops[target] / baseline[target]
    weight = beta**2
    return (1 + weight) * precision * recall / (precision + weight * recall)
