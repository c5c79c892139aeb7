"""OPT and BioGPT: an MLP without gate, whose parts belong to the decoder layer."""

from dataclasses import replace

from crane_serve.common.models.family import LAYER_NORM, Family

OPT = Family(
    ("OPTForCausalLM",),
    norm=LAYER_NORM,
    layer_norms=("self_attn_layer_norm", "final_layer_norm"),
    attention_output="self_attn.out_proj",
    gate="fc1",
    up=None,
    act_fn="activation_fn",
    down="fc2",
    trunk="model.decoder",
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    layers="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    refused={"do_layer_norm_before": True},
)

BIOGPT = replace(
    OPT,
    architectures=("BioGptForCausalLM",),
    trunk="biogpt",
    embedding="biogpt.embed_tokens",
    positions="biogpt.embed_positions",
    layers="biogpt.layers",
    final_norm="biogpt.layer_norm",
    unembedding="output_projection",
    refused={},
)
