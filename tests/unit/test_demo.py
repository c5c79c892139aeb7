"""The demonstration's own choices."""

import pytest
import torch

from crane_serve.demo import _dtype_flags


@pytest.mark.parametrize(
    ("ability", "cuda", "flags"),
    [
        ("avx2", False, ["--dtype", "float32"]),
        ("avx512_f", False, ["--dtype", "float32"]),
        ("avx512_bf16", False, []),
        ("amx_bf16", False, []),
        ("avx2", True, []),
    ],
)
def test_float32_where_bfloat16_is_slow(
    ability: str, cuda: bool, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {ability: True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert _dtype_flags() == flags
