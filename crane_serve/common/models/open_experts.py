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
    """What the hooks act at. down_proj: its first input [tokens, experts * neurons] holds the neurons, 0 for experts
    that a token does not have; act_fn: its output is act(gate), alike, None for experts of which it is not known."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.neurons = experts.num_experts * _width(experts)
        self.down_proj = _DownProjection(experts)
        self.act_fn = nn.Identity() if _is_default(experts) else None

    @property
    def is_heard(self) -> bool:
        """Whether somebody listens to act(gate)."""
        return self.act_fn is not None and bool(self.act_fn._forward_hooks)


class _DownProjection(nn.Module):
    """From the neurons of all experts to their weighted sum."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self._experts = [experts]  # in a list, so that it is not a part of its own part

    def forward(self, neurons: Tensor, routes: "_Routes", weights: Tensor) -> Tensor:
        """neurons: [tokens, experts * neurons]; weights: [tokens, top k] -> [tokens, hidden]."""
        (experts,) = self._experts
        # Taken in one step, since each has a gradient of the size of all neurons.
        taken = neurons.view(len(neurons), experts.num_experts, -1)[routes.tokens, routes.experts]
        answers = torch.cat(
            [
                _linear(experts, "down_proj", expert, of_expert)
                for expert, of_expert in zip(routes.chosen, torch.split(taken, routes.counts), strict=True)
            ]
        )
        answers = answers * weights[routes.tokens, routes.choices].unsqueeze(1)
        output = answers.new_zeros(len(neurons), answers.shape[1])
        return output.index_add(0, routes.tokens, answers)


class _Routes:
    """Which tokens have which experts, sorted by expert: tokens, experts, choices (which of the top k), each [pairs].

    chosen, counts: the experts that some token has, and how many tokens those are.
    """

    def __init__(self, ids: Tensor) -> None:
        """ids: [tokens, top k]."""
        self.experts, order = ids.flatten().sort(stable=True)
        self.tokens, self.choices = order // ids.shape[1], order % ids.shape[1]
        chosen, counts = torch.unique_consecutive(self.experts, return_counts=True)
        self.chosen: list[int] = chosen.tolist()
        self.counts: list[int] = counts.tolist()


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
        routes = _Routes(ids)
        neurons, acts = [], []
        for expert, of_expert in zip(routes.chosen, torch.split(hidden[routes.tokens], routes.counts), strict=True):
            gate_up = _linear(experts, "gate_up_proj", expert, of_expert)
            neurons.append(experts._apply_gate(gate_up))
            if opened.is_heard:
                acts.append(experts.act_fn(gate_up.detach().chunk(2, dim=-1)[0]))

        def spread(values: list[Tensor]) -> Tensor:
            """[tokens, experts * neurons]: at the places of the routes, 0 elsewhere."""
            together = torch.cat(values)
            whole = together.new_zeros(len(hidden), experts.num_experts, together.shape[1])
            return whole.index_put((routes.tokens, routes.experts), together).flatten(1)

        if opened.act_fn is not None and acts:
            opened.act_fn(spread(acts))
        answer: Tensor = opened.down_proj(spread(neurons), routes, weights.detach())
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
