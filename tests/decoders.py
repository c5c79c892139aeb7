"""Random decoders of every model family, two layers deep, whose every parameter matters."""

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from crane_serve.common.models.experts import expert_modules
from crane_serve.common.models.families import require_family, take_apart
from tests.architectures import model_class, tiny_config
from tests.tiny import FAMILIES

NAMES = tuple(FAMILIES)
# With experts alone; beside shared experts that have a gate; behind a dense layer.
MIXTURES = ("MixtralForCausalLM", "Qwen2MoeForCausalLM", "Glm4MoeForCausalLM")


def random_decoder(
    family: str, *, attention: str | None = None, dtype: torch.dtype = torch.float32, **changes: object
) -> nn.Module:
    """A model of the family, its config's entries overwritten by `changes`, in evaluation mode.

    family: one of `tests.tiny`, or the class name of a model, whose tiny config has more than two layers.
    attention: the implementation of transformers; None for the one that relevance is computed with.
    """
    config = FAMILIES[family](2) if family in FAMILIES else tiny_config(family)
    for key, value in changes.items():
        setattr(config, key, value)
    kind = AutoModelForCausalLM if family in FAMILIES else model_class(family)
    return randomised(config, attention, dtype, kind)


def randomised(
    config: PretrainedConfig,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    kind: type = AutoModelForCausalLM,
) -> nn.Module:
    """The model of a config, with noise on every parameter: biases and norms begin as zeros and ones."""
    torch.manual_seed(0)
    model = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    implementation = attention or require_family(type(model).__name__).attention
    if implementation is not None:
        model.set_attn_implementation(implementation)
    if expert_modules(model):
        model.set_experts_implementation("eager")  # its kernels do not know float64
    return model.to(dtype).eval()


def exact(model: nn.Module) -> nn.Module:
    """`model` in float64 also where transformers computes in float32 whatever the dtype: in its RMSNorms."""
    model = model.double()
    for norm in take_apart(model).norms:
        if not norm.centred:
            norm.module.forward = _rms_norm(norm.scale, norm.epsilon)
    return model


def _rms_norm(scale: Tensor, epsilon: float) -> object:
    return lambda x: scale * x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()


def hidden_states(model: nn.Module, embeddings: Tensor) -> Tensor:
    """[documents, tokens, hidden] of embeddings of that shape."""
    return take_apart(model).trunk(inputs_embeds=embeddings, use_cache=False).last_hidden_state
