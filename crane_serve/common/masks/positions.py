"""Positions: which tokens of a request its mask applies to."""

from enum import StrEnum


class Positions(StrEnum):
    """The tokens in whose forward pass the mask is applied. A token's forward pass predicts the token after it.

    With `GENERATED` the last token of the prompt is unmasked, and so is the choice of the first generated token. With
    `PROMPT` that choice is masked. All later choices are unmasked, but they attend to a prompt that was masked.
    """

    ALL = "all"
    PROMPT = "prompt"
    GENERATED = "generated"
