"""Command and Aya: attention and MLP side by side, behind one LayerNorm without bias."""

from crane_serve.common.models.family import Family, NormKind

COHERE = Family(
    ("CohereForCausalLM", "Cohere2ForCausalLM"),
    norm=NormKind(epsilon="variance_epsilon", centred=True),
    layer_norms=("input_layernorm",),
    refused={"use_qk_norm": False},
)
