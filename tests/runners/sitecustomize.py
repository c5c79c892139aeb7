"""Every Python process with this directory on its PYTHONPATH runs vLLM on a CPU in ways that vLLM keeps for GPUs.

Triton's interpreter stands in for its CPU backend: vLLM's V2 model runner needs Triton, which vLLM uses on a CPU only
if there is a backend "cpu", a distribution of its own. The interpreter (`TRITON_INTERPRET=1`) runs the kernels all the
same.

Asynchronous scheduling stays on (`CRANE_TEST_ASYNC_SCHEDULING=1`), where vLLM's CPU platform switches it off. V1 then
asks for streams and events, which do nothing on a CPU; V2 brings such of its own.
"""

import contextlib
import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder

PLATFORM = "vllm.platforms.cpu"


def _interpret() -> None:
    from triton.backends import Backend, backends

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return False

    backends.setdefault("cpu", Backend(compiler=None, driver=Driver))


class _Nothing:
    """A stream, or an event, of a device that has none."""

    def __init__(self, *_args, **_options):
        pass

    def _nothing(self, *_args):
        return None

    record = synchronize = wait_stream = _nothing


def _schedule_ahead(platform) -> None:
    import torch

    check = platform.check_and_update_config.__func__

    def check_and_update_config(cls, config) -> None:
        chosen = config.scheduler_config.async_scheduling
        check(cls, config)
        config.scheduler_config.async_scheduling = chosen

    platform.check_and_update_config = classmethod(check_and_update_config)
    torch.cuda.Event = torch.cuda.Stream = torch.cuda.current_stream = _Nothing
    torch.cuda.stream = contextlib.nullcontext


class _AfterPlatform(MetaPathFinder):
    """Changes vLLM's CPU platform when it is imported; to import it here would import vLLM in every process."""

    def find_spec(self, name, path=None, target=None):
        if name != PLATFORM:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module) -> None:
            load(module)
            _schedule_ahead(module.CpuPlatform)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("TRITON_INTERPRET") == "1":
    _interpret()
if os.environ.get("CRANE_TEST_ASYNC_SCHEDULING") == "1":
    sys.meta_path.insert(0, _AfterPlatform())
