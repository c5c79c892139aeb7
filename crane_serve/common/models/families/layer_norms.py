"""Llama's layout with LayerNorm: StableLM, StarCoder 2, Jais 2, Nemotron, Phi MoE, and Phi with its parts side by
side."""

from crane_serve.common.models.family import LAYER_NORM, Family, NormKind

STABLELM = Family(
    ("StableLmForCausalLM",),
    norm=LAYER_NORM,
    refused={"use_parallel_residual": False, "qk_layernorm": False},
)

STARCODER2 = Family(
    ("Starcoder2ForCausalLM",), norm=LAYER_NORM, gate="mlp.c_fc", up=None, act_fn="mlp.act", down="mlp.c_proj"
)

JAIS2 = Family(("Jais2ForCausalLM",), norm=LAYER_NORM, gate="mlp.up_proj", up=None)

NEMOTRON = Family(
    ("NemotronForCausalLM",), norm=NormKind(epsilon="eps", offset=1.0, centred=True), gate="mlp.up_proj", up=None
)

PHI = Family(
    ("PhiForCausalLM",),
    norm=LAYER_NORM,
    layer_norms=("input_layernorm",),
    attention_output="self_attn.dense",
    gate="mlp.fc1",
    up=None,
    act_fn="mlp.activation_fn",
    down="mlp.fc2",
    final_norm="model.final_layernorm",
    refused={"qk_layernorm": False},
)

PHIMOE = Family(("PhimoeForCausalLM",), norm=LAYER_NORM)
