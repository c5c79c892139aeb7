"""Experts of transformers with their neurons in the open: in one tensor, for hooks that read or change them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from crane_serve.common.models.errors import UnsupportedModelError

_OPENED = "crane_opened"
_NEEDED = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")


class OpenExperts(nn.Module):
    """What the hooks act at. down_proj: its first input [tokens, experts * neurons] holds the neurons, 0 for experts
    that a token does not have; act_fn: its output is act(gate), alike, None for experts of which it is not known."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.neurons = experts.num_experts * _width(experts)
        self.down_proj = _DownProjection(experts)
        self.act_fn = nn.Identity() if _is_default(experts) else None


class _DownProjection(nn.Module):
    """From the neurons of all experts to their weighted sum."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self._experts = [experts]  # in a list, so that it is not a part of its own part

    def forward(self, neurons: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """neurons: [tokens, experts * neurons]; ids, weights: [tokens, top k] -> [tokens, hidden]."""
        (experts,) = self._experts
        by_expert = neurons.view(len(neurons), experts.num_experts, -1)
        output = torch.zeros(len(neurons), _hidden(experts), dtype=neurons.dtype, device=neurons.device)
        for expert, tokens, choices in _chosen(ids, experts.num_experts):
            answers = _linear(experts, "down_proj", expert, by_expert[tokens, expert])
            answers = answers * weights[tokens, choices].unsqueeze(1)
            output = output.index_add(0, tokens, answers.to(output.dtype))
        return output


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
        shape = (len(hidden), experts.num_experts, opened.neurons // experts.num_experts)
        places, neurons, acts = [], [], []
        for expert, tokens, _ in _chosen(ids, experts.num_experts):
            gate_up = _linear(experts, "gate_up_proj", expert, hidden[tokens])
            places.append(torch.stack([tokens, torch.full_like(tokens, expert)]))
            neurons.append(experts._apply_gate(gate_up))
            if opened.act_fn is not None:
                acts.append(experts.act_fn(gate_up.detach().chunk(2, dim=-1)[0]))
        index = tuple(torch.cat(places, dim=1))
        if opened.act_fn is not None:
            opened.act_fn(_spread(index, acts, shape))
        answer: Tensor = opened.down_proj(_spread(index, neurons, shape), ids, weights.detach())
        return answer.to(hidden.dtype)

    setattr(experts, _OPENED, opened)
    experts.forward = forward
    return opened


def _spread(index: tuple[Tensor, ...], values: list[Tensor], shape: tuple[int, int, int]) -> Tensor:
    """[tokens, experts * neurons]: values at (token, expert), 0 elsewhere."""
    together = torch.cat(values)
    return together.new_zeros(shape).index_put(index, together).flatten(1)


def _chosen(ids: Tensor, count: int) -> list[tuple[int, Tensor, Tensor]]:
    """Each expert that some token has, with these tokens and at which of their choices it stands."""
    found = []
    for expert in range(count):
        tokens, choices = (ids == expert).nonzero(as_tuple=True)
        if len(tokens):
            found.append((expert, tokens, choices))
    return found


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
