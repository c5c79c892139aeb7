"""Every Python process with this directory on its PYTHONPATH takes Triton's interpreter for its CPU backend.

vLLM's V2 model runner needs Triton. On a CPU vLLM uses it only if there is a backend "cpu", which is a distribution of
its own; the interpreter (`TRITON_INTERPRET=1`) runs the kernels all the same.
"""

from triton.backends import Backend, backends


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return False


backends.setdefault("cpu", Backend(compiler=None, driver=_Driver))
