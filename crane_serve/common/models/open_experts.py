"""Experts of transformers with their neurons in the open: in one tensor, for hooks that read or change them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from crane_serve.common.models.errors import UnsupportedModelError

_OPENED = "crane_opened"
_TOKENS = 8
_CLOSE = 5e-2  # in dtypes of 16 bits; other experts differ by more
_NEEDED = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")


class OpenExperts(nn.Module):
    """What hooks act at. A token and one of its experts are a pair; pairs are sorted by expert.

    gate_up: from hidden states [tokens, hidden] to gates and ups, [pairs, 2 * width] for experts of `width` neurons.
    act_fn: from gates to act(gate), both [pairs, width]; None for experts of another form than act(gate) * up, with
    gates before ups. Both have `Routes` as their second input, which can `spread` what they return. down_proj: its
    first input [tokens, neurons] holds the neurons of all experts, 0 for those that a token does not have.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.width = _width(experts)
        self.neurons = experts.num_experts * self.width
        self.gate_up = _GateUp(experts)
        self.act_fn = _Activation(experts) if _is_default(experts) else None
        self.down_proj = _DownProjection(experts)


class Routes:
    """Which tokens have which experts, sorted by expert: tokens, experts, choices (which of the top k), each [pairs].

    chosen, counts: the experts that some token has, and how many tokens those are.
    """

    def __init__(self, ids: Tensor, experts: int) -> None:
        """ids: [tokens, top k]; experts: how many there are."""
        self.experts, order = ids.flatten().sort(stable=True)
        self.tokens, self.choices = order // ids.shape[1], order % ids.shape[1]
        chosen, counts = torch.unique_consecutive(self.experts, return_counts=True)
        self.chosen: list[int] = chosen.tolist()
        self.counts: list[int] = counts.tolist()
        self._shape = len(ids), experts

    def spread(self, of_pairs: Tensor) -> Tensor:
        """[pairs, n] as [tokens, experts * n], 0 for experts that a token does not have."""
        whole = of_pairs.new_zeros(*self._shape, of_pairs.shape[1])
        return whole.index_put((self.tokens, self.experts), of_pairs).flatten(1)


class _Part(nn.Module):
    """A part of experts. It holds them in a list, so that they are not a part of their own part."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self._experts = [experts]

    def _linear(self, name: str, inputs: Tensor, routes: Routes) -> Tensor:
        """inputs: [pairs, in] -> [pairs, out], each by its expert's weights."""
        (experts,) = self._experts
        of_experts = zip(routes.chosen, torch.split(inputs, routes.counts), strict=True)
        return torch.cat([_linear(experts, name, expert, of_expert) for expert, of_expert in of_experts])


class _GateUp(_Part):
    """From the hidden state to the gates and ups of the experts that a token has."""

    def forward(self, hidden: Tensor, routes: Routes) -> Tensor:
        """hidden: [tokens, hidden] -> [pairs, 2 * neurons of an expert]."""
        return self._linear("gate_up_proj", hidden[routes.tokens], routes)


class _Activation(_Part):
    """The activation function of experts, by its name."""

    def __init__(self, experts: Any) -> None:
        super().__init__(experts)
        self.__name__ = getattr(experts.act_fn, "__name__", type(experts.act_fn).__name__)

    def forward(self, gate: Tensor, routes: Routes | None = None) -> Tensor:
        """gate: of any shape, which the result has too; routes: for those who listen."""
        (experts,) = self._experts
        value: Tensor = experts.act_fn(gate)
        return value


class _DownProjection(_Part):
    """From the neurons of all experts to their weighted sum."""

    def forward(self, neurons: Tensor, routes: Routes, weights: Tensor) -> Tensor:
        """neurons: [tokens, experts * neurons]; weights: [tokens, top k] -> [tokens, hidden]."""
        (experts,) = self._experts
        # Taken in one step, since each has a gradient of the size of all neurons.
        taken = neurons.view(len(neurons), experts.num_experts, -1)[routes.tokens, routes.experts]
        answers = self._linear("down_proj", taken, routes)
        answers = answers * weights[routes.tokens, routes.choices].unsqueeze(1)
        output = answers.new_zeros(len(neurons), answers.shape[1])
        return output.index_add(0, routes.tokens, answers)


def open_experts(experts: Any) -> OpenExperts:
    """Have a module of transformers that holds the experts of a layer compute them through an `OpenExperts`, which is
    returned. It computes the same as before; but in the backward pass the weights of the router count as fixed.

    Raises UnsupportedModelError for experts of another kind than transformers' common one.
    """
    held: OpenExperts | None = getattr(experts, _OPENED, None)
    if held is not None:
        return held
    missing = [name for name in _NEEDED if not hasattr(experts, name)]
    if missing or not experts.has_gate:
        what = f"has no {missing[0]}" if missing else "has no gate"
        raise UnsupportedModelError(f"{type(experts).__name__} {what}; its experts cannot be opened")
    opened = OpenExperts(experts)

    def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """hidden: [tokens, hidden]; ids, weights: [tokens, top k] -> [tokens, hidden]."""
        routes = Routes(ids, experts.num_experts)
        gate_up = opened.gate_up(hidden, routes)
        if opened.act_fn is None:
            neurons = experts._apply_gate(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            neurons = opened.act_fn(gate, routes) * up
        answer: Tensor = opened.down_proj(routes.spread(neurons), routes, weights.detach())
        return answer.to(hidden.dtype)

    _require_same(experts, forward)
    setattr(experts, _OPENED, opened)
    experts.forward = forward
    return opened


@torch.no_grad()
def _require_same(experts: Any, forward: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Raise UnsupportedModelError if `forward` does not compute what the module does, on a few random tokens."""
    weight = experts.down_proj
    if weight.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    count = experts.num_experts
    top_k = min(2, count)
    hidden = torch.randn(_TOKENS, _hidden(experts), generator=generator).to(weight.device, weight.dtype)
    ids = torch.rand(_TOKENS, count, generator=generator).topk(top_k).indices.to(weight.device)
    shares = torch.rand(_TOKENS, top_k, generator=generator).to(weight.device, weight.dtype)
    own, other = experts(hidden, ids, shares).float(), forward(hidden, ids, shares).float()
    largest = float(own.abs().max())
    if bool(own.isfinite().all()) and not torch.allclose(own, other, rtol=_CLOSE, atol=_CLOSE * largest):
        raise UnsupportedModelError(
            f"{type(experts).__name__} does more than its parts show; its experts cannot be opened"
        )


def _linear(experts: Any, name: str, expert: int, inputs: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return functional.linear(inputs, weight.T if experts.is_transposed else weight, bias)


def _hidden(experts: Any) -> int:
    size: int = experts.down_proj.shape[2 if experts.is_transposed else 1]
    return size


def _width(experts: Any) -> int:
    size: int = experts.down_proj.shape[1 if experts.is_transposed else 2]
    return size


def _is_default(experts: Any) -> bool:
    """Whether the neurons are act(gate) * up, gate before up."""
    from transformers.integrations.moe import _default_apply_gate

    return getattr(type(experts), "_apply_gate", None) is _default_apply_gate and bool(experts.is_concatenated)
