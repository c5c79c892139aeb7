"""Activations: the values of chosen MLP neurons at the tokens of chosen requests, before their masks.

A request asks by the argument `crane_activations`. Its tokens are numbered when the batch is prepared; in the forward
pass each patched MLP stores the values of token number n in row n of a buffer, and those of all other tokens in row 0,
which nobody reads. (So does its activation function with what it reads, in an engine with gates: see `gates`.) What a
batch has stored is collected before the next one is prepared, or when it is asked for, so that nothing waits for a
forward pass. Each rank collects its own neurons of its own layers; the front end asks for them by the request's key
when the request has ended, and the engine core joins them.

A request that asks reads nothing from the prefix cache, so all its tokens are computed, in order. A preemption has
tokens computed again: they replace those before. An engine may run ahead of the end of a request by a few tokens, which
the front end learns of later; what a reduction takes in therefore lags behind the generated tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crane_serve.common.defaults import MAX_ACTIVATIONS
from crane_serve.common.masks import Fingerprint
from crane_serve.engine.admission import ACTIVATIONS_ARGUMENT
from crane_serve.engine.config import ACTIVATIONS_VARIABLE, GATES_VARIABLE, mask_config
from crane_serve.engine.routing import Ints, fill_slots

TAKE_METHOD = "crane_take_activations"
MAX_REQUESTS = 16
"""Most requests at once that ask for activations."""

_LAG = 8  # generated tokens that an engine may run ahead of a request's end
_BLOCK = 256  # tokens that are summed at a time: sums are in float64, for which torch copies what it sums


class ActivationsError(ValueError):
    """Activations that there cannot be; the message names what is asked for and what was expected."""


class ActivationsOff(ActivationsError):
    """The engine was started without activations."""


class TooManyActivations(ActivationsError):
    """More values than one request may ask for."""


class ActivationsBusy(ActivationsError):
    """Too many requests ask for activations at once; temporary."""


class Reduction(StrEnum):
    """What becomes of a neuron's values at the tokens of a request: their mean, the mean of their absolute values, the
    largest of them, or the share of those above 0; the share of tokens at which act(gate) is above 0, or the mean of
    the absolute values of up, the output of the up projection. Where the MLP has no gate, act(gate) is the neuron
    itself, and up what its activation function reads."""

    MEAN = "mean"
    MEAN_ABS = "mean_abs"
    MAX = "max"
    POSITIVE = "positive"
    ACT_POSITIVE = "act_positive"
    UP_MEAN_ABS = "up_mean_abs"

    @property
    def source(self) -> str:
        """Of which tensor of the MLP it is: neurons, gate or up."""
        return {Reduction.ACT_POSITIVE: "gate", Reduction.UP_MEAN_ABS: "up"}.get(self, "neurons")


@dataclass(frozen=True)
class ActivationRequest:
    """What a request asks for.

    neurons: by layer, indices of neurons in the order of the answer, None for all of them; reductions: none for the
    values of every token; first, end: positions of the first token and behind the last, None for all.
    """

    neurons: Mapping[int, tuple[int, ...] | None]
    reductions: tuple[Reduction, ...] = ()
    first: int = 0
    end: int | None = None

    def argument(self, key: str) -> dict[str, Any]:
        """The `extra_args` that ask for it. key: by which the values are taken, of no other request."""
        layers = [[layer, None if neurons is None else list(neurons)] for layer, neurons in self.neurons.items()]
        reductions = list(map(str, self.reductions))
        return {
            ACTIVATIONS_ARGUMENT: {"key": key, "layers": layers, "reduce": reductions, "span": [self.first, self.end]}
        }

    @property
    def of_gates(self) -> bool:
        """Whether it asks for act(gate) or up."""
        return any(reduction.source != "neurons" for reduction in self.reductions)

    def width(self, sizes: Sequence[int]) -> int:
        """How many neurons. sizes: of the layers."""
        return sum(sizes[layer] if neurons is None else len(neurons) for layer, neurons in self.neurons.items())

    def require(self, fingerprint: Fingerprint, prompt: int, tokens: int) -> None:
        """Raise ActivationsError for neurons that the model does not have or that are in experts, and for tokens that
        there are not; TooManyActivations for too many values.

        prompt: tokens of the prompt; tokens: most tokens that will be computed.
        """
        sizes = fingerprint.intermediate_sizes
        if not self.neurons:
            raise ActivationsError("expected 'layers', 'neurons' or both, and a layer in them")
        for layer, neurons in self.neurons.items():
            if not 0 <= layer < len(sizes):
                raise ActivationsError(f"layer {layer}: the model has the layers 0 to {len(sizes) - 1}")
            if fingerprint.experts is not None and layer in fingerprint.experts.layers:
                raise ActivationsError(
                    f"layer {layer} has experts, whose neurons not all tokens have; expected another"
                )
            if neurons is None:
                continue
            if not neurons:
                raise ActivationsError(f"layer {layer}: expected at least one neuron")
            for neuron in neurons:
                if not 0 <= neuron < sizes[layer]:
                    raise ActivationsError(f"layer {layer}, neuron {neuron}: expected 0 to {sizes[layer] - 1}")
            if len(set(neurons)) < len(neurons):
                raise ActivationsError(f"layer {layer}: a neuron is asked for twice")
        end = tokens if self.end is None else min(self.end, tokens)
        if not 0 <= self.first < min(end, prompt):
            raise ActivationsError(
                f"tokens from {self.first} to {self.end}: expected a first one within the prompt's {prompt}, and an "
                "end behind it"
            )
        width = self.width(sizes)
        times, of = (len(self.reductions), "reductions") if self.reductions else (end - self.first, "tokens")
        if times * width > MAX_ACTIVATIONS:
            raise TooManyActivations(
                f"{times} {of} of {width} neurons are {times * width} values; one request may have {MAX_ACTIVATIONS}"
            )


@dataclass(frozen=True)
class Activations:
    """The values of one request.

    tokens: how many, from which position `first`; values: by layer, then by reduction or "values", float32: [neurons],
    or [tokens, neurons] of "values".
    """

    first: int
    tokens: int
    values: Mapping[int, Mapping[str, NDArray[np.float32]]]


def asked_for(sampling_params: Any) -> tuple[str, ActivationRequest] | None:
    """The key of a request and what it asks for, or None for one that asks for no activations.

    Raises ActivationsError for an argument that is malformed.
    """
    asked = (getattr(sampling_params, "extra_args", None) or {}).get(ACTIVATIONS_ARGUMENT)
    if asked is None:
        return None
    try:
        layers = {
            int(layer): None if neurons is None else tuple(map(int, neurons)) for layer, neurons in asked["layers"]
        }
        first, end = asked["span"]
        reductions = tuple(map(Reduction, asked["reduce"]))
        return str(asked["key"]), ActivationRequest(layers, reductions, int(first), None if end is None else int(end))
    except (KeyError, TypeError, ValueError) as error:
        raise ActivationsError(f"{ACTIVATIONS_ARGUMENT}: expected key, layers, reduce and span") from error


def admit_activations(vllm_config: Any, request: Any) -> None:
    """Have an EngineCoreRequest that asks for activations read no prefix cache.

    Raises ActivationsOff in an engine without them, ActivationsError if it cannot have them.
    """
    parameters = request.sampling_params
    asked = asked_for(parameters)
    if asked is None:
        return
    config = mask_config(vllm_config)
    if config is None or not config.activations:
        raise ActivationsOff(
            f"this engine was started without activations; {ACTIVATIONS_VARIABLE}=1 starts it with them"
        )
    if asked[1].of_gates and not config.gates:
        raise ActivationsOff(
            f"this engine was started without act(gate) and up; {GATES_VARIABLE}=1 starts it with them"
        )
    if parameters.n != 1:
        raise ActivationsError(f"{ACTIVATIONS_ARGUMENT}: n is {parameters.n}, expected 1")
    if request.resumable:
        raise ActivationsError(f"{ACTIVATIONS_ARGUMENT}: streaming-input sessions have no activations")
    prompt = len(request.prompt_token_ids or ())
    longest = vllm_config.model_config.max_model_len
    tokens = min(prompt + (parameters.max_tokens or longest) - 1, longest)
    asked[1].require(config.library().fingerprint, prompt, tokens)
    parameters.skip_reading_prefix_cache = True


@dataclass(frozen=True)
class LayerBuffers:
    """What is stored of a layer, [maximum tokens + 1, neurons on this rank] each. start: the first of these neurons;
    gate, up: in an engine with gates, the outputs of the projections; of an MLP without a gate, up is what its
    activation function reads, and the neurons stand for the gate, since they are act(gate)."""

    start: int
    neurons: Tensor
    gate: Tensor | None = None
    up: Tensor | None = None

    def of(self, source: str) -> Tensor:
        """The buffer that `Reduction.source` names, [maximum tokens + 1, neurons on this rank]."""
        buffer: Tensor = getattr(self, source)
        return buffer


class CaptureBuffers:
    """Where the patched MLPs of a rank store values. gates: whether gate and up are stored, too.

    slots: int64 [maximum tokens], the row that each token of a batch is stored in; 0 for those that nobody wants.
    """

    def __init__(self, gates: bool = False) -> None:
        self.gates = gates
        self.slots = torch.zeros(0, dtype=torch.int64)
        self._of: dict[int, LayerBuffers] = {}

    def add(self, layer: int, neurons: int, start: int, slots: Tensor, like: Tensor) -> Tensor:
        """A new buffer [maximum tokens + 1, neurons] for a layer. start: the first of its neurons on this rank."""
        buffer = torch.zeros(len(slots) + 1, neurons, dtype=like.dtype, device=like.device)
        self.slots, self._of[layer] = slots, LayerBuffers(start, buffer)
        return buffer

    def add_gates(self, layer: int, gate: Tensor | None, up: Tensor) -> None:
        """Have the values of gate and up read from views of a buffer, [maximum tokens + 1, neurons] each; gate: None
        where the MLP has none."""
        of_layer = self._of[layer]
        self._of[layer] = replace(of_layer, gate=of_layer.neurons if gate is None else gate, up=up)

    def erase(self, rows: int) -> None:
        """Make the first `rows` behind row 0 NaN, so that what is not stored is no value."""
        for buffers in self._of.values():
            for buffer in (buffers.neurons, buffers.gate, buffers.up):
                if buffer is not None:
                    buffer[1 : rows + 1].fill_(torch.nan)

    def of(self, layer: int) -> LayerBuffers | None:
        """The buffers of a layer; None for a layer of another rank."""
        return self._of.get(layer)


@dataclass
class _OfLayer:
    """What a rank has of one tensor of one layer for one request.

    places: int64 [own], of the rank's neurons in the answer; local: their indices in the buffer, None for all of it;
    sums: [own] by reduction; tail: [tokens, own], not yet reduced.
    """

    buffer: Tensor
    places: NDArray[np.int64]
    local: Tensor | None
    sums: Mapping[Reduction, Tensor]
    tail: list[Tensor] = field(default_factory=list)

    def stored(self, low: int, high: int) -> Tensor:
        """The rows of the buffer from one to another, [rows, own]; of a whole layer they are the buffer's own, which
        the next batch replaces."""
        rows = self.buffer[low:high]
        return rows if self.local is None else rows[:, self.local]

    def cut(self, rows: int) -> None:
        """Drop the last `rows` of the tail."""
        whole = torch.cat(self.tail)
        self.tail = [whole[: len(whole) - rows]]

    def reduce(self, further: Sequence[Tensor], count: int) -> None:
        """Take in the first `count` tokens of the tail and of `further` ones, [tokens, own] each; a copy of the others
        becomes the tail."""
        left: list[Tensor] = []
        for rows in (*self.tail, *further):
            now, later = rows[:count], rows[count:]
            for block in torch.split(now, _BLOCK) if len(now) else ():
                for reduction, total in self.sums.items():
                    _add(total, block, reduction)
            count -= len(now)
            left.append(later)
        self.tail = [torch.cat(left)]


def _add(total: Tensor, rows: Tensor, reduction: Reduction) -> None:
    """In place. total: [own]; rows: [tokens, own], for ACT_POSITIVE of the gate, whose sign act(gate) has."""
    match reduction:
        case Reduction.MEAN:
            total += rows.sum(dim=0, dtype=torch.float64)
        case Reduction.MEAN_ABS | Reduction.UP_MEAN_ABS:
            total += rows.abs().sum(dim=0, dtype=torch.float64)
        case Reduction.MAX:
            torch.maximum(total, rows.amax(dim=0), out=total)
        case Reduction.POSITIVE | Reduction.ACT_POSITIVE:
            total += torch.where(rows.isnan(), torch.nan, rows > 0).sum(dim=0, dtype=torch.float64)


class _Collected:
    """What a rank has collected for one request: its tokens from `first` to `known`, reduced up to `reduced`."""

    def __init__(self, request: ActivationRequest, prompt: int, buffers: CaptureBuffers) -> None:
        self._request = request
        self._prompt = prompt
        self.reduced = self.known = request.first
        self._layers: dict[int, list[_OfLayer]] = {}
        for layer, neurons in request.neurons.items():
            own = buffers.of(layer)
            if own is not None:
                self._layers[layer] = _own(own, neurons, request.reductions)

    @torch.inference_mode()  # which a worker's steps are in: what they have made is changed in no other
    def add(self, low: int, row: int, tokens: int) -> None:
        """Take in `tokens` from position `low` on, which stand from `row` on in the buffers."""
        if low > self.known:  # something was not computed; what is known stays too short to be taken
            return
        again = max(self.known - max(low, self.reduced), 0)
        skipped = max(self.reduced - low, 0)
        self.known = max(low + tokens, self.reduced)
        until = max(self.reduced, min(self.known, self._prompt), self.known - _LAG)
        for of_layer in chain.from_iterable(self._layers.values()):
            if again:
                of_layer.cut(again)
            rows = of_layer.stored(row + skipped, row + tokens)
            if self._request.reductions:  # layer by layer: a chunk of all layers is large
                of_layer.reduce([rows], until - self.reduced)
            else:
                of_layer.tail.append(rows.to("cpu", torch.float32, copy=True))
        if self._request.reductions:
            self.reduced = until

    @torch.inference_mode()
    def result(self, end: int) -> dict[str, Any] | None:
        """The values of the tokens before position `end`: how many tokens there are, and by layer the places of this
        rank's neurons and its values, as bytes. None if they are not known."""
        end = end if self._request.end is None else min(end, self._request.end)
        if not self.reduced <= end <= self.known or end <= self._request.first:
            return None
        tokens = end - self._request.first
        if not self._request.reductions:
            layers = {
                layer: (of_layer.places.tobytes(), {"values": _bytes(torch.cat(of_layer.tail)[:tokens])})
                for layer, [of_layer] in self._layers.items()
            }
            return {"tokens": tokens, "layers": layers}
        reduced = {}
        for layer, tensors in self._layers.items():
            values: dict[str, bytes] = {}
            for of_layer in tensors:
                of_layer.reduce([], end - self.reduced)
                for reduction, total in of_layer.sums.items():
                    values[str(reduction)] = _bytes(total if reduction is Reduction.MAX else total / tokens)
            reduced[layer] = tensors[0].places.tobytes(), values
        return {"tokens": tokens, "layers": reduced}


def _own(buffers: LayerBuffers, neurons: Sequence[int] | None, reductions: Sequence[Reduction]) -> list[_OfLayer]:
    """The part of a layer that a rank has, of all or some of the layer's neurons, from each tensor that is needed."""
    start, device = buffers.start, buffers.neurons.device
    stop = start + buffers.neurons.shape[1]
    if neurons is None:
        places, local = np.arange(start, stop), None
    else:
        asked = np.asarray(neurons, dtype=np.int64)
        places = np.flatnonzero((asked >= start) & (asked < stop))
        local = torch.from_numpy(asked[places] - start).to(device)
    tensors: list[_OfLayer] = []
    for source in dict.fromkeys(reduction.source for reduction in reductions) or ("neurons",):
        buffer = buffers.of(source)
        sums = {
            reduction: torch.full((len(places),), -torch.inf, dtype=buffer.dtype, device=device)
            if reduction is Reduction.MAX
            else torch.zeros(len(places), dtype=torch.float64, device=device)
            for reduction in reductions
            if reduction.source == source
        }
        tensors.append(_OfLayer(buffer, places, local, sums))
    return tensors


def _bytes(values: Tensor) -> bytes:
    array: NDArray[np.float32] = values.float().cpu().numpy()
    return array.tobytes()


def store(x: Tensor, buffer: Tensor, slots: Tensor) -> None:
    """In a forward pass: store the values of the tokens in their rows of a buffer.

    x: [..., tokens, width]; buffer: [maximum tokens + 1, width]; slots: [maximum tokens].
    """
    buffer.index_put_((slots[: x.shape[-2]],), x.view(-1, x.shape[-1]))


class BatchActivations:
    """The activations of one worker: `fill` before every batch, `take` when a request has ended."""

    def __init__(self, buffers: CaptureBuffers) -> None:
        self._buffers = buffers
        self._collected: dict[str, _Collected] = {}
        self._stored: list[tuple[_Collected, int, int, int]] = []  # by the batch before: of, position, row, tokens
        self._used = 0

    def fill(
        self, requests: Sequence[tuple[str, ActivationRequest] | None], tokens: Ints, computed: Ints, prompts: Ints
    ) -> None:
        """Collect what the batch before has stored, and give each wanted token of the next one a row.

        All arguments are [requests]: what each asks for, the tokens scheduled, the tokens computed before, and the
        length of the prompt.
        """
        self._collect()
        if not any(requests):
            self._forget_rows()
            return
        counts, starts, lengths = (np.asarray(each).tolist() for each in (tokens, computed, prompts))
        rows = np.zeros(sum(counts), dtype=np.int64)
        place, row = 0, 1
        for asked, count, start, prompt in zip(requests, counts, starts, lengths, strict=True):
            if asked is not None:
                key, request = asked
                low, high = max(start, request.first), start + count
                if request.end is not None:
                    high = min(high, request.end)
                collected = self._of(key, request, low, prompt) if low < high else None
                if collected is not None:
                    rows[place + low - start : place + high - start] = np.arange(row, row + high - low)
                    self._stored.append((collected, low, row, high - low))
                    row += high - low
            place += count
        self._buffers.erase(row - 1)
        self._used = fill_slots(self._buffers.slots, rows, self._used)

    def clear(self) -> None:
        """Collect, and have nothing of the next batch stored."""
        self._collect()
        self._forget_rows()

    def take(self, key: str, end: int) -> dict[str, Any] | None:
        """What there is of a request before position `end` (see `_Collected.result`); it is forgotten here."""
        self._collect()
        collected = self._collected.pop(key, None)
        return None if collected is None else collected.result(end)

    def _of(self, key: str, request: ActivationRequest, low: int, prompt: int) -> _Collected | None:
        known = self._collected.get(key)
        if known is None and low == request.first:  # a later token is of a request that has been dropped
            while len(self._collected) >= MAX_REQUESTS:  # nobody has taken them
                del self._collected[next(iter(self._collected))]
            known = self._collected[key] = _Collected(request, prompt, self._buffers)
        return known

    def _collect(self) -> None:
        for collected, *where in self._stored:
            collected.add(*where)
        self._stored.clear()

    def _forget_rows(self) -> None:
        if self._used:
            self._buffers.slots[: self._used].zero_()
            self._used = 0


def take_in_worker(self: Any, key: str, end: int) -> dict[str, Any] | None:
    """Method of WorkerWrapperBase: see `BatchActivations.take`."""
    runner = self.worker.model_runner
    activations: BatchActivations | None = getattr(runner, "model_state", runner)._crane_masks.activations
    return None if activations is None else activations.take(key, end)


def take_in_core(self: Any, key: str, end: int) -> list[dict[str, Any]] | None:
    """Method of EngineCore: what its workers have of a request before position `end`, which they then forget; None if
    one of them has nothing."""
    of_workers = self.collective_rpc(TAKE_METHOD, args=(key, end))
    return None if any(each is None for each in of_workers) else of_workers


def joined(request: ActivationRequest, sizes: Sequence[int], of_workers: Iterable[Mapping[str, Any]]) -> Activations:
    """The values of a request from the parts that the workers of an engine have. sizes: neurons of the layers.

    Raises ActivationsError if a part is missing, or a value is not finite.
    """
    parts = list(of_workers)
    tokens = min((part["tokens"] for part in parts), default=0)
    values: dict[int, dict[str, NDArray[np.float32]]] = {}
    for layer, neurons in request.neurons.items():
        width = sizes[layer] if neurons is None else len(neurons)
        names = [str(name) for name in request.reductions] or ["values"]
        rows = 1 if request.reductions else tokens
        whole = {name: np.full((rows, width), np.nan, dtype=np.float32) for name in names}
        for part in parts:
            for place_bytes, own in (part["layers"][of] for of in part["layers"] if int(of) == layer):
                places = np.frombuffer(place_bytes, dtype=np.int64)
                for name in names:
                    whole[name][:, places] = np.frombuffer(own[name], dtype=np.float32).reshape(rows, len(places))
        if not all(np.isfinite(each).all() for each in whole.values()):
            raise ActivationsError(f"layer {layer}: an activation is not finite, or its rank did not return it")
        values[layer] = {name: each[0] if request.reductions else each for name, each in whole.items()}
    return Activations(request.first, tokens, values)
