"""Qwen3: Llama with norms on queries and keys. Mixtures of experts that are alike: Qwen3 MoE and MiniMax M2; dots.llm1
and GLM-4.5 with shared experts, the latter with these norms in its largest model only."""

from dataclasses import replace

from crane_serve.common.models.family import RMS_NORM, Family

QWEN3 = Family(
    ("MiniMaxM2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
    norm=RMS_NORM,
    layer_norms=("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
)

GLM4_MOE = replace(QWEN3, architectures=("Dots1ForCausalLM", "Glm4MoeForCausalLM"), shared="mlp.shared_experts")
