"""Phi-3: queries, keys and values in one projection, gate and up in another."""

from crane_serve.common.models.family import RMS_NORM, Family

PHI3 = Family(
    ("Phi3ForCausalLM",),
    norm=RMS_NORM,
    query="self_attn.qkv_proj",
    key="self_attn.qkv_proj",
    value="self_attn.qkv_proj",
    gate="mlp.gate_up_proj",
    up="mlp.gate_up_proj",
    act_fn="mlp.activation_fn",
)
