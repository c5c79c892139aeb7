"""The MLPs of a decoder, found by structure: in models of transformers as in those of vLLM."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from crane_serve.common.models.errors import UnsupportedModelError

# Decoder layers are numbered: "model.layers.3.mlp.down_proj", "transformer.blocks.3.ffn.down_proj".
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation", "activation_func", "gelu_impl")
NO_MLP = re.compile(r"attn|attention|mamba|mixer|ssm", re.IGNORECASE)  # attention, and state-space models


@dataclass(frozen=True)
class Mlp:
    """The MLP of a decoder layer. parent: the module that holds its last projection; name: the parent's path."""

    parent: nn.Module
    name: str
    attribute: str

    @property
    def projection(self) -> Any:
        """The linear map from the neurons to the hidden size."""
        return getattr(self.parent, self.attribute)

    @property
    def activation_attribute(self) -> str | None:
        """The name of the activation function in the parent, if it is a module."""
        return next((name for name, _ in self.parent.named_children() if name in _ACTIVATIONS), None)

    @property
    def activation(self) -> nn.Module | None:
        """The activation function, if it is a module."""
        return None if self.activation_attribute is None else getattr(self.parent, self.activation_attribute)

    @property
    def makers(self) -> list[int]:
        """How many outputs the linear maps have that make its neurons, n: [n] without a gate, [2n] of gate and up in
        one, [n, n] of two."""
        neurons, hidden = linear_shape(self.projection)
        others = (linear_shape(module) for module in self.parent.children() if module is not self.projection)
        return [out for read, out in others if read == hidden and out in (neurons, 2 * neurons)]

    @property
    def is_own_module(self) -> bool:
        """Whether the parent is the MLP and nothing else; in OPT it is the decoder layer."""
        return not self.name.rpartition(".")[2].isdecimal()


def language_model(model: nn.Module) -> nn.Module:
    """The decoder of a model, which may stand beside what reads images."""
    for way in ("get_language_model", "get_decoder"):  # of vLLM's models, of transformers'
        if hasattr(model, way):
            decoder: nn.Module = getattr(model, way)()
            return decoder
    return model


def layer_of(path: str) -> int | None:
    """The index of the decoder layer that a module path inside a language model is of."""
    found = _LAYER.search(path)
    return None if found is None else int(found.group(1))


def intermediate_sizes(config: Any, layers: int) -> tuple[int, ...]:
    """The number of MLP neurons of each layer, from a transformers config of the language model."""
    for key in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"):
        size = getattr(config, key, None)
        if isinstance(size, int):
            # Gemma 4 can make the MLPs of its last layers twice as wide.
            wide = getattr(config, "num_kv_shared_layers", 0) if getattr(config, "use_double_wide_mlp", False) else 0
            return (_adjusted(config, size),) * (layers - wide) + (2 * size,) * wide
        if isinstance(size, list | tuple):
            return tuple(int(value) for value in size)
    return (int(getattr(config, "expansion_ratio", 4) * config.hidden_size),) * layers  # BLOOM and GPT-2 do not say


def _adjusted(config: Any, size: int) -> int:
    """LFM2 takes two thirds of the size in its config, times a factor, rounded up."""
    if not getattr(config, "block_auto_adjust_ff_dim", False):
        return size
    size = 2 * size // 3
    if config.block_ffn_dim_multiplier is None:
        return size
    multiple = int(config.block_multiple_of)
    return -(-int(config.block_ffn_dim_multiplier * size) // multiple) * multiple


def widths(decoder: nn.Module, hidden: int, layers: int) -> tuple[int, ...]:
    """The number of neurons of each layer's MLP, 0 for a layer without one, by structure alone.

    Raises UnsupportedModelError for two MLPs in a layer.
    """
    found = [0] * layers
    for path, index, module in _linears(decoder):
        neurons, out = linear_shape(module)
        if index < layers and out == hidden and _has_neurons(decoder.get_submodule(path.rpartition(".")[0]), module):
            if found[index]:
                raise UnsupportedModelError(f"layer {index} has two MLPs, one of them with {path}; expected one")
            found[index] = neurons
    return tuple(found)


def find_mlps(decoder: nn.Module, sizes: Sequence[int], *, beside_experts: bool = False) -> dict[int, Mlp]:
    """The MLPs by layer, in order; layers without one are left out.

    decoder: what `language_model` returns; sizes: number of neurons of each layer. An MLP is known by two linear maps
    of one module: from its neurons to the hidden size, and from the hidden size to the neurons (or, in one, to gate and
    up). beside_experts: whether the caller takes care of experts. Raises UnsupportedModelError for a mixture of experts
    otherwise, and for two MLPs in a layer.
    """
    mlps: dict[int, Mlp] = {}
    for path, module in () if beside_experts else decoder.named_modules():
        # A shared expert looks like an MLP, but the experts beside it would go unmasked. (Dense models may have MLPs of
        # a class that was written for shared experts.)
        kind = type(module).__name__.lower()
        if "experts" in path.split(".") or ("moe" in kind and not kind.endswith("mlp")):
            raise UnsupportedModelError(
                f"{path} ({type(module).__name__}) belongs to a mixture of experts; it cannot be masked"
            )
    for path, index, module in _linears(decoder):
        name, _, attribute = path.rpartition(".")
        parent = decoder.get_submodule(name)
        if index < len(sizes) and linear_shape(module)[0] == sizes[index] and _has_neurons(parent, module):
            if index in mlps:
                other = f"{mlps[index].name}.{mlps[index].attribute}"
                raise UnsupportedModelError(f"layer {index} has two MLPs, with {other} and {path}; expected one")
            mlps[index] = Mlp(parent, name, attribute)
    return dict(sorted(mlps.items()))


def require_mlps(
    decoder: nn.Module, sizes: Sequence[int], elsewhere: Sequence[int] = (), *, beside_experts: bool = False
) -> dict[int, Mlp]:
    """`find_mlps`, with exactly one in every layer but those that are elsewhere; beside experts, also but those of
    size 0. Raises UnsupportedModelError."""
    mlps = find_mlps(decoder, sizes, beside_experts=beside_experts)
    none = [layer for layer, size in enumerate(sizes) if not size] if beside_experts else []
    owned = [layer for layer in range(len(sizes)) if layer not in elsewhere and layer not in none]
    if sorted(mlps) == owned and (owned or none):
        return mlps
    lacking = next((layer for layer in owned if layer not in mlps), 0)
    found = [
        f"{path} {' to '.join(map(str, linear_shape(of)))}" for path, index, of in _linears(decoder) if index == lacking
    ]
    raise UnsupportedModelError(
        f"found MLPs in layers {sorted(mlps)}, expected one in each of {_listed(owned)}: layer {lacking} should have "
        f"one linear map from its {sizes[lacking]} neurons, beside one that makes them; it has "
        f"{', '.join(found) or 'none'}"
    )


def _linears(decoder: nn.Module) -> Iterator[tuple[str, int, nn.Module]]:
    """Path, layer and module of the linear maps inside decoder layers, outside of what mixes tokens."""
    for path, module in decoder.named_modules():
        layer = layer_of(path)
        if layer is not None and any(linear_shape(module)) and not NO_MLP.search(path):
            yield path, layer, module


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """How many inputs and outputs a linear map has, on all ranks together; 0, 0 for another module."""
    of: Any = module
    if type(of).__name__ == "Conv1D":  # GPT-2's, its weight being transposed
        return of.weight.shape[0], of.weight.shape[1]
    if hasattr(of, "in_features") and hasattr(of, "out_features"):  # torch's
        return of.in_features, of.out_features
    if hasattr(of, "input_size") and hasattr(of, "output_size"):  # vLLM's
        return of.input_size, of.output_size
    return 0, 0


def _has_neurons(parent: nn.Module, projection: nn.Module) -> bool:
    """Whether a map beside a projection makes what it reads: the neurons, or in one map gate and up."""
    neurons, hidden = linear_shape(projection)
    makers = ((hidden, neurons), (hidden, 2 * neurons))
    return any(module is not projection and linear_shape(module) in makers for module in parent.children())


def _listed(layers: Sequence[int]) -> str:
    contiguous = layers and list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"layers {layers[0]} to {layers[-1]}" if contiguous else f"layers {list(layers)}"
