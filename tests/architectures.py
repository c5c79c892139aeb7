"""Tiny random checkpoints of the architectures that vLLM serves as text, by their class names in transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from crane_serve.common.models.experts import expert_modules
from crane_serve.common.models.mlps import find_mlps, intermediate_sizes, language_model, widths
from tests.tiny import HIDDEN, LAYERS, NEURONS, byte_tokenizer

EXPERT_NEURONS = 32  # of each expert
# What most configs call their sizes; what a config does not have, it ignores.
_SIZES: dict[str, Any] = {
    "vocab_size": 258,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "hidden_size": HIDDEN,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "image_size": 28,
    "patch_size": 14,
}
_WRAPPED: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "mm_tokens_per_image": 4}
_GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 64, "initializer_range": 0.08}
_GPT2 = {"n_embd": HIDDEN, "n_inner": NEURONS, "n_layer": LAYERS, "n_head": 2, "n_positions": 2048}
_LATENT = {
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}  # attention over compressed keys and values
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": EXPERT_NEURONS,
    "shared_expert_intermediate_size": NEURONS,
    "shared_intermediate_size": NEURONS,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
# vLLM's kernels for it know few widths.
_WIDE_LATENT = {
    **_LATENT,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "head_dim": 64,
}
_GEMMA4 = {
    **_GEMMA,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 258,
    "num_kv_shared_layers": 0,
    "global_head_dim": 32,
}
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "BloomForCausalLM": {"n_layer": LAYERS, "n_head": 2},
    "Cohere2ForCausalLM": {"sliding_window": 64},
    "DeepseekV2ForCausalLM": {**_WIDE_LATENT, "topk_method": "greedy"},
    "DeepseekV3ForCausalLM": {**_WIDE_LATENT, "topk_method": "noaux_tc"},
    "DiffLlamaForCausalLM": {"num_key_value_heads": 2},
    "DogeForCausalLM": {"is_moe": False},
    "FalconForCausalLM": {"ffn_hidden_size": 4 * HIDDEN, "alibi": False, "multi_query": True},
    "Gemma2ForCausalLM": _GEMMA,
    "Gemma3ForCausalLM": _GEMMA,
    "Gemma3nForCausalLM": {
        **_GEMMA,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 258,
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "Gemma4ForCausalLM": _GEMMA4,
    "Gemma4ForConditionalGeneration": _GEMMA4,
    "Glm4MoeForCausalLM": {"head_dim": 32},
    "GPT2LMHeadModel": _GPT2,
    "GPTBigCodeForCausalLM": _GPT2,
    "GPTJForCausalLM": {**_GPT2, "rotary_dim": 16},
    "Lfm2ForCausalLM": {"block_dim": HIDDEN, "conv_dim": HIDDEN},
    "MiniCPM3ForCausalLM": _LATENT,
    "MiniMaxM2ForCausalLM": {"rotary_dim": 16, "scoring_func": "sigmoid"},
    "NanoChatForCausalLM": {"num_key_value_heads": 2},
    "OPTForCausalLM": {"word_embed_proj_dim": HIDDEN, "ffn_dim": NEURONS, "init_std": 0.15},
    "VaultGemmaForCausalLM": _GEMMA,
    "YoutuForCausalLM": _LATENT,
}


_NAMES = """
ApertusForCausalLM ArceeForCausalLM BambaForCausalLM BioGptForCausalLM BitNetForCausalLM BloomForCausalLM
Cohere2ForCausalLM CohereForCausalLM CwmForCausalLM DiffLlamaForCausalLM DogeForCausalLM
Ernie4_5ForCausalLM Exaone4ForCausalLM FalconForCausalLM FalconH1ForCausalLM GPT2LMHeadModel GPTBigCodeForCausalLM
GPTJForCausalLM GPTNeoXForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration
Gemma3nForCausalLM Gemma4ForCausalLM Gemma4ForConditionalGeneration GemmaForCausalLM Glm4ForCausalLM GlmForCausalLM
GraniteForCausalLM GraniteSWAForCausalLM HeliumForCausalLM HunYuanDenseV1ForCausalLM HyperCLOVAXForCausalLM
Jais2ForCausalLM Lfm2ForCausalLM LlamaForCausalLM MiniCPM3ForCausalLM Ministral3ForCausalLM MinistralForCausalLM
Mistral3ForConditionalGeneration MistralForCausalLM ModernBertDecoderForCausalLM NanoChatForCausalLM
NemotronForCausalLM OPTForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM OlmoForCausalLM OlmoHybridForCausalLM
PersimmonForCausalLM Phi3ForCausalLM PhiForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM Qwen3_5ForCausalLM
Qwen3_5ForConditionalGeneration SeedOssForCausalLM SmolLM3ForCausalLM StableLmForCausalLM Starcoder2ForCausalLM
VaultGemmaForCausalLM YoutuForCausalLM
"""
_OF_EXPERTS = """
GptOssForCausalLM GraniteMoeForCausalLM GraniteMoeSharedForCausalLM MixtralForCausalLM OlmoeForCausalLM
PhimoeForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM Glm4MoeForCausalLM DeepseekV2ForCausalLM
DeepseekV3ForCausalLM Dots1ForCausalLM FlexOlmoForCausalLM MiniMaxM2ForCausalLM Ernie4_5_MoeForCausalLM
"""
OF_EXPERTS = tuple(_OF_EXPERTS.split())
ARCHITECTURES = (*_NAMES.split(), *OF_EXPERTS)
# Served in every run of the engine tests, beside the families of tests.tiny; three by vLLM's Transformers backend,
# three with experts.
SHORT_LIST = [
    "FalconForCausalLM",
    "GPTNeoXForCausalLM",
    "GraniteForCausalLM",
    "Olmo2ForCausalLM",
    "SmolLM3ForCausalLM",
    "GptOssForCausalLM",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
]


def model_type_of(architecture: str) -> str:
    """The model type of a class of transformers. Raises KeyError."""
    for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for model_type, classes in names.items():
            if architecture in (classes if isinstance(classes, tuple) else (classes,)):
                return model_type
    raise KeyError(architecture)


def model_class(architecture: str) -> Any:
    """The class of transformers that makes and loads it."""
    wrapped = architecture in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    return AutoModelForImageTextToText if wrapped else AutoModelForCausalLM


_TOWERS = {"gemma4": "gemma4_vision"}  # where the default has none


def tiny_config(architecture: str) -> PretrainedConfig:
    """A config of a few small layers; one that reads images has a small tower for them."""
    model_type = model_type_of(architecture)
    whole = AutoConfig.for_model(model_type)
    if "text_config" not in whole.sub_configs:
        sizes = _SIZES | (_EXPERTS if architecture in OF_EXPERTS else {})
        return AutoConfig.for_model(model_type, **{**_known(sizes, whole), **_SETTINGS.get(architecture, {})})
    text, tower = (
        whole.get_text_config(),
        AutoConfig.for_model(_TOWERS.get(model_type) or whole.vision_config.model_type),
    )
    return AutoConfig.for_model(
        model_type,
        text_config={**_known(_SIZES, text), "model_type": text.model_type, **_SETTINGS.get(architecture, {})},
        vision_config={**_known(_TOWER, tower), "model_type": tower.model_type},
        **_known(_WRAPPED, whole),
    )


def _known(settings: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    names = {*config.to_dict(), *config.attribute_map}
    return {name: value for name, value in settings.items() if name in names}


def tiny_checkpoint(architecture: str, directory: Path, *, seed: int = 0) -> Path:
    """Write a random float32 checkpoint whose MLPs matter: the weights of their last projection are large."""
    torch.manual_seed(seed)
    config = tiny_config(architecture)
    model = model_class(architecture).from_config(config, dtype=torch.float32)
    decoder = language_model(model)
    experts = expert_modules(decoder).values()
    sizes = widths(decoder, HIDDEN, LAYERS) if experts else intermediate_sizes_of(config)
    with torch.no_grad():
        for mlp in find_mlps(decoder, sizes, beside_experts=bool(experts)).values():
            mlp.projection.weight.mul_(3.0)
        for module in experts:
            module.down_proj.mul_(3.0)
        for parameter in model.parameters():  # what is 0 at first hides what it does
            if not parameter.any():
                parameter.normal_(std=0.1)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def intermediate_sizes_of(config: PretrainedConfig) -> tuple[int, ...]:
    """The number of neurons of each layer."""
    text = config.get_text_config()
    return intermediate_sizes(text, text.num_hidden_layers)
