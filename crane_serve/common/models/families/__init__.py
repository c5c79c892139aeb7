"""The locations of a decoder's parts in each model family. A file here that defines a Family adds a family."""

import importlib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import nn

from crane_serve.common.models.decoder import (
    Decoder,
    Group,
    KnownDecoder,
    KnownGroup,
    KnownLayer,
    Layer,
    Norm,
    Projection,
)
from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.experts import expert_modules
from crane_serve.common.models.family import Family, NormKind
from crane_serve.common.models.mlps import intermediate_sizes, language_model, require_mlps, widths
from crane_serve.common.models.open_experts import OpenExperts, open_experts
from crane_serve.common.models.routers import find_routers

_Kind = TypeVar("_Kind", bound=nn.Module)
# Of a model without a family; nothing of it is looked up by its paths.
UNKNOWN = Family((), NormKind(epsilon=0.0), attention_softcap="attn_logit_softcapping", attention="eager")
# With this setting transformers lets every position attend to the whole text, in all families.
_CAUSAL = MappingProxyType({"is_causal": True, "use_bidirectional_attention": False})


@cache
def available() -> Mapping[str, Family]:
    """The families in the files of this package by the class names of their models, in alphabetical order."""
    families: dict[str, Family] = {}
    for module_info in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
        for member in vars(importlib.import_module(module_info.name)).values():
            if isinstance(member, Family):
                families.update(dict.fromkeys(member.architectures, member))
    return MappingProxyType(dict(sorted(families.items())))


def decoder_of(model: nn.Module) -> Decoder:
    """A causal language model of transformers: taken apart, if it is of a family, else by its structure.

    Raises UnsupportedModelError if it is not built as most are: one MLP per layer, a linear unembedding.
    `relevance.proof` shows whether logits are what the parts make of them.
    """
    name = type(model).__name__
    if name in available():
        return take_apart(model)
    whole: Any = model
    config = whole.config.get_text_config()
    _require_features(name, UNKNOWN, config)
    trunk = language_model(model)
    embedding, unembedding = whole.get_input_embeddings(), whole.get_output_embeddings()
    if not isinstance(embedding, nn.Module) or "weight" not in dict(embedding.named_parameters()):
        raise UnsupportedModelError(f"{name} has no embedding of tokens that can be found")
    if not isinstance(unembedding, nn.Linear):
        raise UnsupportedModelError(f"{name} has {type(unembedding).__name__} as its unembedding; expected Linear")
    return Decoder(
        trunk=trunk,
        embedding=embedding,
        unembedding=_with_bias_as_weights(unembedding),
        layers=_layers_by_structure(trunk, config),
        positions=getattr(config, "max_position_embeddings", None),
        final_softcap=_cap(config, "final_logit_softcapping"),
        logit_scale=_logit_scale(config),
    )


def _layers_by_structure(trunk: nn.Module, config: Any) -> tuple[Layer, ...]:
    count = int(config.num_hidden_layers)
    experts = expert_modules(trunk)
    sizes = widths(trunk, int(config.hidden_size), count) if experts else intermediate_sizes(config, count)
    mlps = require_mlps(trunk, sizes, beside_experts=bool(experts))
    groups: list[list[Group]] = [[] for _ in range(count)]
    for index, mlp in mlps.items():
        groups[index].append(Group(slice(0, sizes[index]), mlp.projection, mlp.activation))
    for index, module in experts.items():
        opened = open_experts(module)
        columns = slice(sizes[index], sizes[index] + opened.neurons)  # as Experts.columns
        groups[index].append(Group(columns, opened.down_proj, opened.act_fn, of_experts=True))
    without = [index for index, of_layer in enumerate(groups) if not of_layer]
    if without:
        raise UnsupportedModelError(f"layers {without} have no MLP")
    return tuple(Layer(tuple(of_layer)) for of_layer in groups)


def _with_bias_as_weights(unembedding: nn.Linear) -> nn.Linear:
    """The unembedding without a bias; one that had one reads a 1 behind the hidden state."""
    parameters = dict(unembedding.named_parameters())
    if "bias" not in parameters:
        return unembedding
    weight = torch.cat([parameters["weight"].detach(), parameters["bias"].detach().unsqueeze(1)], dim=1)
    whole = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    whole.weight = nn.Parameter(weight, requires_grad=False)
    return whole


def _logit_scale(config: Any) -> float:
    """Cohere multiplies logits, Granite divides them, and HyperCLOVA X multiplies by what Granite divides by."""
    scaling = 1 if config.model_type == "hyperclovax" else -1
    for key, power in (("logit_scale", 1), ("lm_head_multiplier", 1), ("logits_scaling", scaling)):
        if getattr(config, key, None) is not None:
            return float(getattr(config, key)) ** power
    return 1.0


def attention_for(config: Any, architecture: str) -> str | None:
    """The attention implementation of transformers that computes the model's function, where it is not its default."""
    family = available().get(architecture, UNKNOWN)
    if family is UNKNOWN and _cap(config.get_text_config(), UNKNOWN.attention_softcap) is None:
        return None
    return family.attention


def require_family(architecture: str) -> Family:
    """The family of a model's class name. Raises UnsupportedModelError naming the known ones."""
    family = available().get(architecture)
    if family is None:
        raise UnsupportedModelError(
            f"relevance does not know the architecture {architecture}; it knows {', '.join(available())}"
        )
    return family


def take_apart(model: nn.Module) -> KnownDecoder:
    """Find the parts of a Hugging Face causal language model.

    Raises UnsupportedModelError for an unknown class, a part that is missing or of another kind, a number of layers
    other than the config's, a module that the family does not list, a config feature that it refuses, or an attention
    implementation that computes another function.
    """
    architecture = type(model).__name__
    family = require_family(architecture)
    whole: Any = model
    config = whole.config.get_text_config()
    _require_features(architecture, family, config)
    layers = _part(model, family.layers, nn.ModuleList)
    if len(layers) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{architecture} has {len(layers)} modules in {family.layers}, its config says {config.num_hidden_layers}"
        )
    paths = [f"{family.layers}.{index}" for index in range(len(layers))]
    norms = [*_layer_norms(model, family, paths), family.final_norm]
    trunk = _part(model, family.trunk, nn.Module)
    experts = expert_modules(trunk)
    unembedding = _with_bias_as_weights(_part(model, family.unembedding, nn.Linear))
    positions = None if family.positions is None else _part(model, family.positions, nn.Embedding)
    decoder = KnownDecoder(
        trunk=trunk,
        embedding=_part(model, family.embedding, nn.Embedding),
        unembedding=unembedding,
        layers=tuple(
            _layer(model, family, path, _heads(config), experts.get(index)) for index, path in enumerate(paths)
        ),
        norms=tuple(_norm(model, family.norm, path) for path in norms),
        positions=None if positions is None else config.max_position_embeddings,
        attention_softcap=_cap(config, family.attention_softcap),
        final_softcap=_cap(config, family.final_softcap),
        logit_scale=_logit_scale(config),
    )
    opened = {inside for module in (*experts.values(), *find_routers(trunk).values()) for inside in module.modules()}
    _require_known(model, family, {*norms, *_known_paths(family, paths)}, opened)
    return decoder


def _require_features(architecture: str, family: Family, config: Any) -> None:
    for key, expected in {**_CAUSAL, **family.refused}.items():
        value = getattr(config, key, None)
        if value == "vision":  # of images only
            continue
        if value is not None and value != expected:
            raise UnsupportedModelError(f"{architecture} with {key}={value!r} is not supported; expected {expected!r}")
    attention = config._attn_implementation
    if attention == "sdpa" and family.attention is not None and _cap(config, family.attention_softcap) is not None:
        raise UnsupportedModelError(
            f"{architecture} with attn_implementation='sdpa' leaves out the soft cap of its attention; "
            f"expected {family.attention!r}"
        )


def _layer_norms(model: nn.Module, family: Family, layers: Iterable[str]) -> Iterable[str]:
    """Paths of those norms inside of layers that the model has."""
    for layer in layers:
        yield from (f"{layer}.{norm}" for norm in family.layer_norms if _has(model, f"{layer}.{norm}"))


def _require_known(model: nn.Module, family: Family, known: set[str], opened: set[nn.Module]) -> None:
    """Refuse a module that computes something and is not in the family's list, since the rules would not cover it.

    opened: of experts, which are shown to compute what their parts make, and of routers, whose outputs are constants.
    """
    for path, module in model.named_modules():
        if any(f"{path}.".startswith(f"{beside}.") for beside in family.beside):
            continue
        inert = isinstance(module, (nn.Dropout, nn.Identity)) or type(module).__name__.endswith("RotaryEmbedding")
        leaf = next(module.children(), None) is None
        if leaf and not inert and path not in known and module not in opened:
            raise UnsupportedModelError(
                f"{type(model).__name__} has a module {path} ({type(module).__name__}) that relevance does not know"
            )


def _known_paths(family: Family, layers: Iterable[str]) -> Iterable[str]:
    yield from (family.embedding, family.unembedding)
    if family.positions is not None:
        yield family.positions
    mlps = (family, family.of_shared) if family.shared is not None else (family,)
    of_mlps = [path for mlp in mlps for path in (mlp.gate, mlp.up, mlp.act_fn, mlp.down)]
    inside = (family.query, family.key, family.value, family.attention_output, family.shared_gate, *of_mlps)
    for layer in layers:
        yield from (f"{layer}.{path}" for path in inside if path is not None)


def _layer(
    model: nn.Module, family: Family, path: str, heads: tuple[int, int, int], experts: nn.Module | None
) -> KnownLayer:
    """heads: total widths of the queries, the keys and the values; experts: of the layer, if it has some."""
    _linear(model, f"{path}.{family.attention_output}", family.linear)
    query, key, value = _projections(
        model, family.linear, [f"{path}.{part}" for part in (family.query, family.key, family.value)], heads
    )
    dense = family.of_shared if family.shared is not None and experts is not None else family
    # Layers whose experts are all that they have are known by their having no other last projection.
    groups = [_mlp(model, dense, path)] if experts is None or _has(model, f"{path}.{dense.down}") else []
    if experts is not None:
        groups.append(_of_experts(open_experts(experts), experts, groups[-1].columns.stop if groups else 0))
    gate = f"{path}.{family.shared_gate}"
    return KnownLayer(
        groups=tuple(groups),
        query=query,
        key=key,
        value=value,
        shared_gate=_linear(model, gate, family.linear)[0] if family.shared_gate and _has(model, gate) else None,
    )


def _mlp(model: nn.Module, family: Family, path: str) -> KnownGroup:
    """The dense MLP of the layer at `path`."""
    down, neurons, _ = _linear(model, f"{path}.{family.down}", family.linear)
    gated = [f"{path}.{part}" for part in (family.gate, family.up) if part is not None]
    gate, *up = _projections(model, family.linear, gated, [neurons] * len(gated))
    act_fn = _part(model, f"{path}.{family.act_fn}", nn.Module)
    return KnownGroup(slice(0, neurons), down, act_fn, gate=gate, up=up[0] if up else None)


def _of_experts(opened: OpenExperts, experts: Any, start: int) -> KnownGroup:
    """start: the first of the layer's neurons that is in an expert, as Experts.columns has it."""
    if opened.act_fn is None or experts.has_bias:
        raise UnsupportedModelError(
            f"{type(experts).__name__}: the rules of relevance expect experts of the form act(gate) * up without biases"
        )
    gate, up = (Projection(opened.gate_up, slice(of, of + opened.width)) for of in (0, opened.width))
    columns = slice(start, start + opened.neurons)
    return KnownGroup(columns, opened.down_proj, opened.act_fn, of_experts=True, gate=gate, up=up)


def _heads(config: Any) -> tuple[int, int, int]:
    """Total widths of the queries, the keys and the values."""
    heads: int = config.num_attention_heads
    head_width: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value_heads: int = getattr(config, "num_key_value_heads", None) or heads
    return heads * head_width, key_value_heads * head_width, key_value_heads * head_width


def _projections(model: nn.Module, kind: str, paths: Sequence[str], widths: Sequence[int]) -> list[Projection]:
    """A projection for each width. Projections with the same path are consecutive rows of one module."""
    taken = dict.fromkeys(paths, 0)
    projections: list[Projection] = []
    for path, width in zip(paths, widths, strict=True):
        module, _, _ = _linear(model, path, kind)
        projections.append(Projection(module, slice(taken[path], taken[path] + width)))
        taken[path] += width
    for path, rows in taken.items():
        _, _, outputs = _linear(model, path, kind)
        if outputs != rows:
            raise UnsupportedModelError(f"{path} has {outputs} outputs, expected {rows}")
    return projections


def _linear(model: nn.Module, path: str, kind: str) -> tuple[nn.Module, int, int]:
    """A linear map, with its numbers of inputs and outputs. Conv1D is GPT-2's, its weight being transposed."""
    module = _part(model, path, nn.Module)
    weight = getattr(module, "weight", None)
    if type(module).__name__ != kind or not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        raise UnsupportedModelError(f"{path} is {type(module).__name__}, expected {kind}")
    inputs, outputs = weight.shape if kind == "Conv1D" else reversed(weight.shape)
    return module, inputs, outputs


def _norm(model: nn.Module, kind: NormKind, path: str) -> Norm:
    module = _part(model, path, nn.Module)
    epsilon = kind.epsilon if isinstance(kind.epsilon, float) else getattr(module, kind.epsilon, None)
    weight = getattr(module, "weight", None)
    without = any(name == "*" or path.endswith(f".{name}") for name in kind.weightless)
    if not isinstance(epsilon, float) or isinstance(weight, nn.Parameter) == without:
        expected = "no weight" if without else "weight"
        raise UnsupportedModelError(f"{path} is {type(module).__name__}; expected {expected} and {kind.epsilon}")
    return Norm(module, epsilon, kind.offset, kind.centred)


def _cap(config: Any, key: str | None) -> float | None:
    cap = None if key is None else getattr(config, key, None)
    return None if cap is None else float(cap)


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _part(model: nn.Module, path: str, kind: type[_Kind]) -> _Kind:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModelError(f"{type(model).__name__} has no module {path}") from error
    if not isinstance(module, kind):
        raise UnsupportedModelError(f"{path} is {type(module).__name__}, expected {kind.__name__}")
    return module
