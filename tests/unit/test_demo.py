"""The demonstration's own choices."""

import pytest
import torch

from crane_serve.demo import _dtype_flags


@pytest.mark.parametrize(
    ("capability", "cuda", "flags"),
    [("AVX2", False, ["--dtype", "float32"]), ("AVX512", False, []), ("DEFAULT", False, []), ("AVX2", True, [])],
)
def test_float32_where_bfloat16_is_slow(
    capability: str, cuda: bool, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert _dtype_flags() == flags
