"""Activations in bodies: what a request asks to see of its neurons, and the answer."""

import base64
import re

import numpy as np
from numpy.typing import NDArray

from crane_serve.engine.activations import (
    ActivationRequest,
    Activations,
    ActivationsError,
    Reduction,
    TooManyActivations,
)
from crane_serve.engine.service import EngineService
from crane_serve.service.api.schemas import ActivationsSeen, ActivationsWanted, LayerActivations

_LAYER = re.compile("0|[1-9][0-9]{0,5}")
_SHOWN = 80  # characters of a name that errors show

MAX_LISTED = 2**18
"""Most values in an answer as lists; more of them as base64."""


def activation_request(wanted: ActivationsWanted | None, sequences: int) -> ActivationRequest | None:
    """What the engine is asked for; None for nothing.

    sequences: how many the engine would run. Raises ActivationsError unless it is one, and for a body that contradicts
    itself.
    """
    if wanted is None:
        return None
    if not sequences:
        raise ActivationsError("no token is left whose neurons could be shown")
    if sequences != 1:
        raise ActivationsError(f"expected one prompt, text or context to show, found {sequences} sequences")
    neurons: dict[int, tuple[int, ...] | None] = {}
    for layer in wanted.layers:
        if layer in neurons:
            raise ActivationsError(f"layer {layer} is asked for twice")
        neurons[layer] = None
    for name, of_layer in wanted.neurons.items():
        if _LAYER.fullmatch(name) is None:
            raise ActivationsError(f"neurons: {name[:_SHOWN]!r} is no layer; expected its number")
        if int(name) in neurons:
            raise ActivationsError(f"layer {name} is in 'layers' and in 'neurons'; expected one of them")
        neurons[int(name)] = tuple(of_layer)
    names = [wanted.reduce] if isinstance(wanted.reduce, str) else wanted.reduce
    if len(set(names)) < len(names) or ("none" in names and len(names) > 1):
        raise ActivationsError("reduce: expected 'none', or different reductions")
    reductions = tuple(Reduction(name) for name in names if name != "none")
    return ActivationRequest(dict(sorted(neurons.items())), reductions, wanted.first, wanted.end)


def require_listable(
    wanted: ActivationsWanted | None, request: ActivationRequest | None, engine: EngineService, tokens: int
) -> None:
    """Raise TooManyActivations for more values than an answer of lists may have. tokens: most that are computed."""
    if wanted is None or request is None or wanted.encoding == "base64":
        return
    sizes = engine.library.fingerprint.intermediate_sizes
    if not all(0 <= layer < len(sizes) for layer in request.neurons):
        return  # the engine says so
    end = tokens if request.end is None else min(request.end, tokens)
    values = request.width(sizes) * (len(request.reductions) or max(end - request.first, 0))
    if values > MAX_LISTED:
        raise TooManyActivations(f"{values} values as lists; expected at most {MAX_LISTED}, or encoding 'base64'")


def activations_seen(
    wanted: ActivationsWanted | None, request: ActivationRequest | None, seen: Activations | None
) -> ActivationsSeen | None:
    """The answer's part; None if nothing was asked for."""
    if wanted is None or request is None or seen is None:
        return None

    def encoded(array: NDArray[np.float32]) -> list[float] | list[list[float]] | str:
        if wanted.encoding == "base64":
            return base64.b64encode(array.astype("<f4").tobytes()).decode()
        listed: list[float] | list[list[float]] = array.tolist()
        return listed

    layers = []
    for layer, values in seen.values.items():
        neurons = request.neurons[layer]
        fields = {name: encoded(array) for name, array in values.items()}
        layers.append(LayerActivations(layer=layer, neurons=None if neurons is None else list(neurons), **fields))
    return ActivationsSeen(first=seen.first, tokens=seen.tokens, layers=layers)
