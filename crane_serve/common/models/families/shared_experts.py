"""Llama with experts beside shared ones: Qwen 2 MoE, which weights these by a gate, ERNIE 4.5 MoE and Granite MoE."""

from crane_serve.common.models.family import RMS_NORM, Family

QWEN2_MOE = Family(
    ("Qwen2MoeForCausalLM",), norm=RMS_NORM, shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate"
)

ERNIE4_5_MOE = Family(("Ernie4_5_MoeForCausalLM",), norm=RMS_NORM, shared="mlp.shared_experts")

GRANITE_MOE_SHARED = Family(
    ("GraniteMoeSharedForCausalLM",),
    norm=RMS_NORM,
    gate="shared_mlp.input_linear",
    up="shared_mlp.input_linear",
    act_fn="shared_mlp.activation",
    down="shared_mlp.output_linear",
)
