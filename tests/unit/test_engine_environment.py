"""What an engine's processes are told by environment variables."""

import os
from pathlib import Path

import pytest

from crane_serve.engine.configure import configure_engine

VARIABLES = ("CRANE_MASKS", "CRANE_DEFAULT_METHOD", "CRANE_MASK_ROWS", "CRANE_INLINE_MASKS")
BOUNDS = {"VLLM_CPU_KVCACHE_SPACE": "2", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}


@pytest.mark.parametrize("own", [None, "7"])
def test_memory_on_a_cpu_is_bounded_as_the_operator_says_or_by_us(
    own: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in (*VARIABLES, *BOUNDS):
        monkeypatch.setenv(variable, own or "")  # so that what the call sets is undone
        if own is None or variable in VARIABLES:
            monkeypatch.delenv(variable)
    with pytest.raises(ValueError, match="--no-such-flag"):
        configure_engine(tmp_path, tmp_path, "attnlrp", 4, ["--no-such-flag"])
    for variable, bound in BOUNDS.items():
        assert os.environ[variable] == (own or bound)
