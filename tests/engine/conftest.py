import os
from collections.abc import Iterator

import pytest

from tests.conftest import Tiny
from tests.engine.offline import start


@pytest.fixture(scope="session")
def llm(tiny: Tiny) -> Iterator[object]:
    """vLLM's offline engine with the plugin, switched on by nothing but CRANE_MASKS."""
    saved = dict(os.environ)
    os.environ.update(CRANE_MASKS=str(tiny.masks), VLLM_CPU_KVCACHE_SPACE="1")
    engine = start(tiny.checkpoint)
    yield engine
    engine.llm_engine.engine_core.shutdown()
    os.environ.clear()
    os.environ.update(saved)
