"""Routers of transformers: those of a mixture of experts, and experts kept from being chosen."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.experts import expert_modules


def find_routers(decoder: nn.Module) -> dict[int, nn.Module]:
    """By layer, the module that chooses among its experts. Raises UnsupportedModelError unless there is one beside all
    experts."""
    paths = {module: path for path, module in decoder.named_modules()}
    found = {}
    for layer, module in expert_modules(decoder).items():
        block, count = decoder.get_submodule(paths[module].rpartition(".")[0]), len(module.get_parameter("down_proj"))
        routers = [part for part in block.modules() if part is not module and _chooses(part, count)]
        if len(routers) != 1:
            raise UnsupportedModelError(f"{paths[module]}: {len(routers)} routers beside its experts, expected one")
        found[layer] = routers[0]
    return found


def _chooses(module: nn.Module, count: int) -> bool:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.dim() == 2 and len(weight) == count


@contextmanager
def kept_from(router: nn.Module, allowed: Tensor) -> Iterator[None]:
    """While the context lasts, the router's logits of experts whose `allowed` [experts] is 0 are minus infinity; or of
    each token its own, [tokens, experts].

    Raises RuntimeError, when the router runs, unless it makes its logits by one linear map.
    """
    forward, off, before = router.forward, allowed == 0, router.__dict__.get("forward")

    def run(*args: Any, **kwargs: Any) -> Any:
        with _Logits(off) as logits:
            answer = forward(*args, **kwargs)
        if logits.made != 1:
            raise RuntimeError(f"{type(router).__name__} made logits {logits.made} times, expected once")
        return answer

    router.forward = run
    try:
        yield
    finally:
        if before is None:
            del router.forward
        else:  # of another context, or of somebody else
            router.forward = before


class _Logits(TorchFunctionMode):
    """While it is on, linear maps to as many outputs as there are experts give some of them minus infinity."""

    def __init__(self, off: Tensor) -> None:
        super().__init__()
        self.off, self.made = off, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        answer = func(*args, **(kwargs or {}))
        if func is functional.linear and answer.shape[-1] == self.off.shape[-1]:
            self.made += 1
            answer = answer.masked_fill(self.off.to(answer.device), -torch.inf)
        return answer
