"""What this machine's processors are good at."""

import torch


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16 (on x86: AVX-512 or AMX); others take far longer."""
    abilities = torch.cpu.get_capabilities()
    return any(abilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
