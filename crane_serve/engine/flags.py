"""vLLM's own engine flags, read by vLLM's own parser."""

from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def engine_arguments(kind: Any, model: Path, flags: Sequence[str], *, program: str) -> Any:
    """The arguments of `kind`, vLLM's EngineArgs or AsyncEngineArgs, for `model` and `flags`, as a namespace.

    program: named in errors. Raises ValueError for flags that vLLM does not know or cannot read.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = kind.add_cli_args(FlexibleArgumentParser(prog=program, exit_on_error=False))
    try:
        arguments, unknown = parser.parse_known_args(list(flags))
    except ArgumentError as error:
        raise ValueError(f"engine flags: {error}") from error
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; expected an option of {program} or an engine flag of vLLM")
    arguments.model = str(model)
    return arguments
