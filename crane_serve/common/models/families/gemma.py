"""Gemma; Gemma 2 and 3, with norms before and after each part, and soft caps; VaultGemma, with norms before alone."""

from dataclasses import replace

from crane_serve.common.models.family import Family, NormKind

_NORM = NormKind(epsilon="eps", offset=1.0)
_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)

GEMMA = Family(("GemmaForCausalLM",), norm=_NORM)

GEMMA2 = Family(
    ("Gemma2ForCausalLM",),
    norm=_NORM,
    layer_norms=_NORMS,
    attention_softcap="attn_logit_softcapping",
    final_softcap="final_logit_softcapping",
    attention="eager",
)

GEMMA3 = Family(
    ("Gemma3ForCausalLM",),
    norm=_NORM,
    layer_norms=(*_NORMS, "self_attn.q_norm", "self_attn.k_norm"),
    final_softcap="final_logit_softcapping",
    refused={"attn_logit_softcapping": None},
)

GEMMA3_WITH_IMAGES = GEMMA3.inside(
    "Gemma3ForConditionalGeneration", beside=("model.vision_tower", "model.multi_modal_projector")
)

VAULTGEMMA = replace(
    GEMMA2, architectures=("VaultGemmaForCausalLM",), layer_norms=("input_layernorm", "pre_feedforward_layernorm")
)
