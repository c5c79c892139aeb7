"""Help is quick: no command's options need torch, vLLM or a model library."""

import subprocess
import sys

import pytest

import clients

HEAVY = ("torch", "vllm", "transformers", "ray", "scipy", "matplotlib", "datasets", "fastapi", "numpy", "httpx")


def test_commands_are_known_without_heavy_libraries() -> None:
    program = f"import sys, crane_serve.cli; print(*[name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.split() == []


def test_what_clients_offer_is_there() -> None:
    assert sorted(clients._PLACES) == clients.__all__
    for name in clients.__all__:
        assert getattr(clients, name).__name__ == name
    with pytest.raises(AttributeError, match="Nothing"):
        clients.Nothing  # noqa: B018
