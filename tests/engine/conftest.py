import os
from collections.abc import Iterator

import pytest

from crane_serve.common.masks import MaskLibrary
from tests.conftest import Engines
from tests.engine.offline import start


@pytest.fixture(scope="session")
def llm(engines: Engines) -> Iterator[object]:
    """vLLM's offline engine with the plugin, switched on by nothing but CRANE_MASKS; one mask scales outputs, and
    requests may bring masks with them."""
    saved = dict(os.environ)
    os.environ.update(
        CRANE_MASKS=str(engines.output_masks),
        CRANE_INLINE_MASKS="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # so that a test can send a function to the worker
    )
    engine = start(engines.tiny.checkpoint)
    yield engine
    engine.llm_engine.engine_core.shutdown()
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture(scope="session")
def library(engines: Engines) -> MaskLibrary:
    """The masks of `llm`."""
    return engines.output_library
