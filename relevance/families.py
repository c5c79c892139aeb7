"""Where the parts of a decoder sit in each model family. A family is an entry of FAMILIES."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor, nn

_Kind = TypeVar("_Kind", bound=nn.Module)


class UnsupportedModelError(ValueError):
    """A model whose parts are not where a known family has them; the message names the class or module."""


@dataclass(frozen=True)
class Family:
    """Module paths of one architecture, and what its RMSNorm multiplies by.

    Paths under `layer_norms`, `mlp` and `attention` are relative to a decoder layer, the others to the whole model.
    norm_scale: module -> [width], the factor of x / rms(x); norm_epsilon: the attribute that holds its epsilon.
    refused: config key -> value that it must have, for features that the relevance rules do not cover.
    """

    norm_scale: Callable[[nn.Module], Tensor]
    norm_epsilon: str
    layer_norms: tuple[str, ...]
    refused: Mapping[str, object]
    trunk: str = "model"
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    unembedding: str = "lm_head"
    mlp: str = "mlp"
    attention: str = "self_attn"


def _weight(norm: nn.Module) -> Tensor:
    return norm.get_parameter("weight")


def _one_plus_weight(norm: nn.Module) -> Tensor:
    return 1 + norm.get_parameter("weight")


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": Family(
            norm_scale=_weight,
            norm_epsilon="variance_epsilon",
            layer_norms=("input_layernorm", "post_attention_layernorm"),
            refused={},
        ),
        "Gemma3ForCausalLM": Family(
            norm_scale=_one_plus_weight,
            norm_epsilon="eps",
            layer_norms=(
                "input_layernorm",
                "self_attn.q_norm",
                "self_attn.k_norm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ),
            refused={
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "use_bidirectional_attention": False,
            },
        ),
    }
)


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: y = scale * x / sqrt(mean(x^2) + epsilon)."""

    module: nn.Module
    scale: Callable[[nn.Module], Tensor]
    epsilon: float


@dataclass(frozen=True)
class Layer:
    """The parts of one decoder layer that relevance needs. Its neurons are the inputs of `down_proj`."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    act_fn: nn.Module
    down_proj: nn.Linear
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    @property
    def neurons(self) -> int:
        return self.down_proj.in_features


@dataclass(frozen=True)
class Decoder:
    """A causal language model taken apart.

    trunk: from `inputs_embeds` to the last hidden state; unembedding: [vocabulary, hidden] in its weight.
    """

    trunk: nn.Module
    embedding: nn.Module
    unembedding: nn.Linear
    layers: tuple[Layer, ...]
    norms: tuple[Norm, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of neurons of each layer."""
        return tuple(layer.neurons for layer in self.layers)


def require_family(architecture: str) -> Family:
    """The family of a model class name. Raises UnsupportedModelError naming those that are known."""
    family = FAMILIES.get(architecture)
    if family is None:
        raise UnsupportedModelError(
            f"relevance does not know the architecture {architecture}; it knows {', '.join(FAMILIES)}"
        )
    return family


def take_apart(model: nn.Module) -> Decoder:
    """Find the parts of a Hugging Face causal language model.

    Raises UnsupportedModelError for an unknown class, a part that is missing or of another kind, a number of layers
    other than the config's, a normalisation that the family does not list, or a config feature that it refuses.
    """
    architecture = type(model).__name__
    family = require_family(architecture)
    config: Any = model.config
    for key, expected in family.refused.items():
        if (value := getattr(config, key, expected)) != expected:
            raise UnsupportedModelError(f"{architecture} with {key}={value!r} is not supported; expected {expected!r}")

    layers = _part(model, family.layers, nn.ModuleList)
    if len(layers) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{architecture} has {len(layers)} modules in {family.layers}, its config says {config.num_hidden_layers}"
        )
    norm_paths = [f"{family.layers}.{index}.{path}" for index in range(len(layers)) for path in family.layer_norms]
    norm_paths.append(family.final_norm)
    for path, module in model.named_modules():
        if type(module).__name__.endswith("Norm") and path not in norm_paths:
            raise UnsupportedModelError(f"{architecture} has a normalisation at {path} that relevance does not know")
    unembedding = _part(model, family.unembedding, nn.Linear)
    if "bias" in dict(unembedding.named_parameters()):
        raise UnsupportedModelError(f"{architecture}: {family.unembedding} has a bias; expected none")
    return Decoder(
        trunk=_part(model, family.trunk, nn.Module),
        embedding=_part(model, family.embedding, nn.Embedding),
        unembedding=unembedding,
        layers=tuple(_layer(model, family, f"{family.layers}.{index}") for index in range(len(layers))),
        norms=tuple(_norm(model, family, path) for path in norm_paths),
    )


def _layer(model: nn.Module, family: Family, path: str) -> Layer:
    mlp, attention = f"{path}.{family.mlp}", f"{path}.{family.attention}"
    layer = Layer(
        gate_proj=_part(model, f"{mlp}.gate_proj", nn.Linear),
        up_proj=_part(model, f"{mlp}.up_proj", nn.Linear),
        act_fn=_part(model, f"{mlp}.act_fn", nn.Module),
        down_proj=_part(model, f"{mlp}.down_proj", nn.Linear),
        q_proj=_part(model, f"{attention}.q_proj", nn.Linear),
        k_proj=_part(model, f"{attention}.k_proj", nn.Linear),
        v_proj=_part(model, f"{attention}.v_proj", nn.Linear),
    )
    if not layer.gate_proj.out_features == layer.up_proj.out_features == layer.neurons:
        raise UnsupportedModelError(f"{mlp}: gate_proj, up_proj and down_proj differ in their number of neurons")
    return layer


def _norm(model: nn.Module, family: Family, path: str) -> Norm:
    module = _part(model, path, nn.Module)
    epsilon = getattr(module, family.norm_epsilon, None)
    if not isinstance(epsilon, float) or not isinstance(getattr(module, "weight", None), nn.Parameter):
        raise UnsupportedModelError(f"{path} is {type(module).__name__}; expected weight and {family.norm_epsilon}")
    return Norm(module, family.norm_scale, epsilon)


def _part(model: nn.Module, path: str, kind: type[_Kind]) -> _Kind:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModelError(f"{type(model).__name__} has no module {path}") from error
    if not isinstance(module, kind):
        raise UnsupportedModelError(f"{path} is {type(module).__name__}, expected {kind.__name__}")
    return module
