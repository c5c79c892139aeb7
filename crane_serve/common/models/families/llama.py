"""Llama, and those that have its parts, or experts in place of its MLP. Scales of embeddings, residuals, attention and
logits are linear; rules do not change them."""

from crane_serve.common.models.family import RMS_NORM, Family

LLAMA = Family(
    (
        "CwmForCausalLM",
        "Ernie4_5ForCausalLM",
        "GraniteForCausalLM",
        "GraniteMoeForCausalLM",
        "HeliumForCausalLM",
        "LlamaForCausalLM",
        "Ministral3ForCausalLM",
        "MinistralForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "Qwen2ForCausalLM",
        "SeedOssForCausalLM",
        "SmolLM3ForCausalLM",
    ),
    norm=RMS_NORM,
)

MISTRAL3 = LLAMA.inside(
    "Mistral3ForConditionalGeneration", beside=("model.vision_tower", "model.multi_modal_projector")
)

ARCEE = Family(("ArceeForCausalLM",), norm=RMS_NORM, gate="mlp.up_proj", up=None)

HUNYUAN = Family(
    ("HunYuanDenseV1ForCausalLM",),
    norm=RMS_NORM,
    layer_norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.query_layernorm",
        "self_attn.key_layernorm",
    ),
)
