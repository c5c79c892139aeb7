"""OLMo, whose norms have no weights, and those with norms behind each part: OLMo 2, OLMo 3, FlexOLMo and
EXAONE 4; OLMoE, whose norms are before each part."""

from crane_serve.common.models.family import RMS_NORM, Family, NormKind

# transformers writes the epsilon into the code.
OLMO = Family(("OlmoForCausalLM",), norm=NormKind(epsilon=1e-5, centred=True, weightless=("*",)))

OLMO2 = Family(
    ("Olmo2ForCausalLM", "Olmo3ForCausalLM", "Exaone4ForCausalLM", "FlexOlmoForCausalLM"),
    norm=RMS_NORM,
    layer_norms=(
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "self_attn.q_norm",
        "self_attn.k_norm",
    ),
)

OLMOE = Family(
    ("OlmoeForCausalLM",),
    norm=RMS_NORM,
    layer_norms=("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
    refused={"clip_qkv": None},
)
