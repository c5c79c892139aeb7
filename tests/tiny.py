"""Tiny random checkpoints, made in a second: a few layers and a byte-level tokenizer."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

BOS, EOS = "<s>", "</s>"
BEYOND = "<beyond>"
_PROJECTION = re.compile(
    r"\.(mlp|ffn|feed_forward)\.(down_proj|c_proj|fc2|fc_out|dense_4h_to_h|w2)$|\.layers\.\d+\.fc2$"
    r"|\.shared_experts?\.down_proj$|\.shared_mlp\.output_linear$"
)
_TOWER = re.compile("vision|visual|audio")
LAYERS, HIDDEN, NEURONS = 3, 64, 160


def byte_tokenizer(merges: Sequence[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    """One token per byte, and one per merge of two bytes, after BOS (id 0); EOS is id 1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [BOS, EOS, *alphabet, *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


_SIZES = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_GATED = {
    **_SIZES,
    "hidden_size": HIDDEN,
    "intermediate_size": NEURONS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
}
_GEMMA = {**_GATED, "query_pre_attn_scalar": 32, "sliding_window": 64, "initializer_range": 0.08}
_PLAIN = {**_SIZES, "tie_word_embeddings": True}

FAMILIES: dict[str, Callable[[int], PretrainedConfig]] = {
    "llama": lambda layers: LlamaConfig(**_GATED, num_hidden_layers=layers),
    "mistral": lambda layers: MistralConfig(**_GATED, num_hidden_layers=layers, sliding_window=None),
    "qwen2": lambda layers: Qwen2Config(**_GATED, num_hidden_layers=layers),
    "qwen3": lambda layers: Qwen3Config(**_GATED, num_hidden_layers=layers),
    "gemma2": lambda layers: Gemma2Config(**_GEMMA, num_hidden_layers=layers),
    "gemma3": lambda layers: Gemma3TextConfig(**_GEMMA, num_hidden_layers=layers),
    "phi3": lambda layers: Phi3Config(**_GATED, num_hidden_layers=layers),
    "opt": lambda layers: OPTConfig(
        **_PLAIN,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=NEURONS,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=2048,
        init_std=0.15,
    ),
    "gpt2": lambda layers: GPT2Config(
        **_PLAIN, n_embd=HIDDEN, n_inner=NEURONS, n_layer=layers, n_head=2, n_positions=2048, initializer_range=0.15
    ),
}


def tiny_model(
    family: str, directory: Path, *, layers: int = LAYERS, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a random checkpoint of a family whose MLPs matter: the weights of their last projection are large."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](layers), dtype=torch.float32)
    with torch.no_grad():
        for _, projection in mlp_projections(model):
            projection.weight.mul_(3.0)
    model.to(dtype).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def add_token_beyond(checkpoint: Path) -> None:
    """Teach a checkpoint's tokenizer BEYOND, which the model has no embedding for."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    tokenizer.add_special_tokens({"additional_special_tokens": [BEYOND]})
    tokenizer.save_pretrained(checkpoint)


def mlp_projection_modules(model: nn.Module) -> dict[str, nn.Module]:
    """By path: the projections of a transformers model whose inputs are the neurons of a dense MLP."""
    return {
        name: module for name, module in model.named_modules() if _PROJECTION.search(name) and not _TOWER.search(name)
    }


def mlp_projections(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Per decoder layer of a transformers model: the MLP, and its projection whose inputs are the neurons.

    In OPT the decoder layer itself holds the parts of the MLP.
    """
    found = [
        (model.get_submodule(name.rpartition(".")[0]), module) for name, module in mlp_projection_modules(model).items()
    ]
    assert len(found) == model.config.get_text_config().num_hidden_layers
    return found
