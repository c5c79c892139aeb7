"""Positions: which tokens of a request its mask applies to."""

from enum import StrEnum


class Positions(StrEnum):
    """The tokens in whose forward pass the mask is applied. A token's forward pass predicts the token after it.

    So with `GENERATED` the last token of the prompt is unmasked, and with it the choice of the first generated token;
    with `PROMPT` that choice is masked and all later ones are not, though they attend to a prompt that was.
    """

    ALL = "all"
    PROMPT = "prompt"
    GENERATED = "generated"
