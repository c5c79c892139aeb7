"""The parts of a decoder of transformers, as far as relevance needs them. `families` finds them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Norm:
    """A normalisation: y = scale * x' / sqrt(mean(x'^2) + epsilon), perhaps plus a bias, as NormKind has it.

    scale is offset + weight, or 1 without a weight.
    """

    module: nn.Module
    epsilon: float
    offset: float
    centred: bool

    @property
    def scale(self) -> Tensor:
        """[width], [heads, width] for a norm of each head, or [] without a weight; in float32 at least."""
        weight = dict(self.module.named_parameters(recurse=False)).get("weight")
        if weight is None:
            return torch.ones(())
        return weight.detach().to(torch.promote_types(weight.dtype, torch.float32)) + self.offset


@dataclass(frozen=True)
class Projection:
    """A linear map: `output[..., rows]` of `module`. `rows` are all outputs, unless several maps are fused in the
    module."""

    module: nn.Module
    rows: slice


@dataclass(frozen=True)
class Group:
    """Neurons of a layer that one module reads: those of its dense MLP, or those of all its experts.

    columns: which of the layer's neurons; down_proj: its inputs [documents, tokens, neurons] are the neurons, its
    outputs [documents, tokens, hidden] are what they add; act_fn: its outputs are act(gate), [documents, tokens,
    neurons], None if no module is known to be it. OPT flattens its MLP, as mixtures of experts do: there all of these
    are [documents * tokens, ...]. of_experts: whether they are in experts; act_fn is then as `OpenExperts` has it.
    """

    columns: slice
    down_proj: nn.Module
    act_fn: nn.Module | None
    of_experts: bool = False


@dataclass(frozen=True)
class KnownGroup(Group):
    """Neurons whose makers are known. up: None in an MLP that is not gated, where `gate` is the first linear layer.

    In experts both are parts of `OpenExperts.gate_up`.
    """

    act_fn: nn.Module
    gate: Projection = field(kw_only=True)
    up: Projection | None = field(kw_only=True)

    @property
    def gated(self) -> bool:
        """Whether the neurons are act(gate) * up; else they are act(gate)."""
        return self.up is not None


@dataclass(frozen=True)
class Layer:
    """The neurons of one decoder layer, as far as its structure shows it; groups: in the order of their columns."""

    groups: tuple[Group, ...]

    @property
    def neurons(self) -> int:
        """How many there are."""
        count: int = self.groups[-1].columns.stop
        return count


@dataclass(frozen=True)
class KnownLayer(Layer):
    """The parts of one decoder layer that the rules of relevance act at.

    shared_gate: the projection whose sigmoid weights the outputs of shared experts, if there is one.
    """

    groups: tuple[KnownGroup, ...]
    query: Projection
    key: Projection
    value: Projection
    shared_gate: nn.Module | None

    @property
    def gated(self) -> bool:
        """Whether there are neurons that are act(gate) * up."""
        return any(group.gated for group in self.groups)


@dataclass(frozen=True)
class Decoder:
    """A causal language model, as far as activations and plain gradients need it.

    trunk: from `inputs_embeds` to the last hidden state; unembedding: [vocabulary, hidden] in its weight, or
    [vocabulary, hidden + 1] of a model whose unembedding has a bias, which is the last column. positions: how many
    tokens a document may have, None for a family whose positions are not learned. logit_scale, final_softcap: logits
    are the product with the unembedding times the first, then, if there is one, c tanh(z / c). The trunk computes
    neither.
    """

    trunk: nn.Module
    embedding: nn.Module
    unembedding: nn.Linear
    layers: tuple[Layer, ...]
    positions: int | None
    final_softcap: float | None
    logit_scale: float

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of neurons of each layer."""
        return tuple(layer.neurons for layer in self.layers)

    @property
    def vocabulary(self) -> int:
        """How many tokens it can read and predict."""
        return min(len(self.embedding.get_parameter("weight")), self.unembedding.out_features)


@dataclass(frozen=True)
class KnownDecoder(Decoder):
    """A causal language model of a family, taken apart.

    attention_softcap: c of the soft cap c tanh(z / c) at attention scores, or None; the trunk computes it itself.
    """

    layers: tuple[KnownLayer, ...]
    norms: tuple[Norm, ...]
    attention_softcap: float | None
