"""Qwen3: Llama with norms on queries and keys."""

from crane_serve.common.models.family import RMS_NORM, Family

QWEN3 = Family(
    ("Qwen3ForCausalLM",),
    norm=RMS_NORM,
    layer_norms=("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
)
