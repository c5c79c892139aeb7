"""The fingerprint of a small model, for tests that need neither an engine nor a download."""

import pytest

from crane_serve.common.masks import Fingerprint


@pytest.fixture
def fingerprint() -> Fingerprint:
    """Of a model with two layers of 6 and 5 neurons."""
    return Fingerprint(
        architecture="TinyForCausalLM",
        layers=2,
        hidden_size=4,
        intermediate_sizes=(6, 5),
        config_digest="a" * 64,
        weights_digest="b" * 64,
    )
