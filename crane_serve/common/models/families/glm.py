"""GLM: gate and up in one projection; GLM-4 has norms before and after each part."""

from dataclasses import replace

from crane_serve.common.models.family import RMS_NORM, Family

GLM = Family(
    ("GlmForCausalLM",),
    norm=RMS_NORM,
    gate="mlp.gate_up_proj",
    up="mlp.gate_up_proj",
    act_fn="mlp.activation_fn",
)

GLM4 = replace(
    GLM,
    architectures=("Glm4ForCausalLM",),
    layer_norms=(
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    ),
)
