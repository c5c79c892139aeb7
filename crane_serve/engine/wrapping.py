"""How vLLM's own functions are replaced: each once per process, with the original at hand."""

import functools
from collections.abc import Callable
from typing import Any

_MARK = "_crane_wrapped"


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a method of a class, or a function of a module, by `wrapper(original, *its arguments)`.

    Does nothing if it has been replaced already, or if `owner` is None. Raises AttributeError if there is no such name.
    """
    if owner is None:
        return
    original = getattr(owner, name)
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)
