"""A mixture of experts with random weights, for speeds: python -m benchmarks.mixture OUT [--layers 6] [...].

The architecture is Qwen3-MoE's, the tokenizer one of bytes. Speeds do not depend on what weights say, but for which
experts are chosen: random routers spread tokens over all of them.
"""

import argparse
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.tiny import byte_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--per-token", type=int, default=4, help="experts that a token is sent to")
    parser.add_argument("--neurons", type=int, default=768, help="of each expert")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=258,
        hidden_size=options.hidden,
        intermediate_size=options.neurons,
        moe_intermediate_size=options.neurons,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=options.experts,
        num_experts_per_tok=options.per_token,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(options.out)
    byte_tokenizer().save_pretrained(options.out)
    print(f"{options.out}: {sum(weights.numel() for weights in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
