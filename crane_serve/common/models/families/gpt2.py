"""GPT-2: an MLP without gate, of transposed linear maps."""

from crane_serve.common.models.family import LAYER_NORM, Family

GPT2 = Family(
    ("GPT2LMHeadModel",),
    norm=LAYER_NORM,
    layer_norms=("ln_1", "ln_2"),
    query="attn.c_attn",
    key="attn.c_attn",
    value="attn.c_attn",
    attention_output="attn.c_proj",
    gate="mlp.c_fc",
    up=None,
    act_fn="mlp.act",
    down="mlp.c_proj",
    trunk="transformer",
    embedding="transformer.wte",
    positions="transformer.wpe",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    linear="Conv1D",
    refused={"add_cross_attention": False},
)
