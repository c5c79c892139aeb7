"""GPT-J: attention and MLP side by side, behind one LayerNorm."""

from crane_serve.common.models.family import LAYER_NORM, Family

GPTJ = Family(
    ("GPTJForCausalLM",),
    norm=LAYER_NORM,
    layer_norms=("ln_1",),
    query="attn.q_proj",
    key="attn.k_proj",
    value="attn.v_proj",
    attention_output="attn.out_proj",
    gate="mlp.fc_in",
    up=None,
    act_fn="mlp.act",
    down="mlp.fc_out",
    trunk="transformer",
    embedding="transformer.wte",
    layers="transformer.h",
    final_norm="transformer.ln_f",
)
