"""vLLM's own flags, read by vLLM's own parser."""

from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from crane_serve.engine.versions import front_end_flags

# Flags of routes that are not served, and of adapters: a model's name has the mask where vLLM has the adapter.
_NOT_SERVED = {"lora_modules", "tokens_only", "enable_server_load_tracking"}
# /tokenizer_info, for clients without a tokenizer of their own. vLLM does not serve it by default, since it shows the
# chat template; here it needs a key like every other route.
_SERVED = "enable_tokenizer_info_endpoint"


def engine_arguments(kind: Any, model: Path, flags: Sequence[str], *, program: str) -> Any:
    """The arguments of `kind`, vLLM's EngineArgs or AsyncEngineArgs, for `model` and `flags`, as a namespace.

    program: named in errors. Raises ValueError for flags that vLLM does not know or cannot read.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = kind.add_cli_args(FlexibleArgumentParser(prog=program, exit_on_error=False))
    return _parse(parser, model, flags, program, "an engine flag of vLLM")


def serving_arguments(model: Path, flags: Sequence[str], *, program: str) -> Any:
    """The arguments of vLLM's AsyncEngineArgs and of its OpenAI front end for `model` and `flags`, as a namespace.

    Raises ValueError for flags that vLLM does not know or cannot read, that contradict each other, or that are about
    what the service does itself: the model's revision, listening, keys, origins, TLS, middleware.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.exceptions import VLLMClientError
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    base, front_end, validate = front_end_flags()
    # Without abbreviations: --config, a flag of vLLM's own command line, would be taken for --config-format.
    parser = FlexibleArgumentParser(prog=program, exit_on_error=False, allow_abbrev=False)
    parser = AsyncEngineArgs.add_cli_args(front_end.add_cli_args(parser))
    refused = {field.name for field in fields(front_end)} - {field.name for field in fields(base)}
    parser.set_defaults(**{_SERVED: True})
    defaults = {name: parser.get_default(name) for name in refused | _NOT_SERVED}
    parser.set_defaults(**dict.fromkeys(defaults))  # a value of None after parsing means that the flag was not used
    arguments = _parse(parser, model, flags, program, "a flag of vLLM's engine or OpenAI front end")
    for name, default in defaults.items():
        if getattr(arguments, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag}: {program} does not take this flag of vLLM's server; see {program} --help")
        setattr(arguments, name, default)
    try:
        validate(arguments)
    except (TypeError, ValueError, VLLMClientError) as error:
        raise ValueError(f"flags of vLLM: {str(error).removeprefix('Error: ')}") from error
    return arguments


def _parse(parser: Any, model: Path, flags: Sequence[str], program: str, expected: str) -> Any:
    try:
        arguments, unknown = parser.parse_known_args(list(flags))
    except ArgumentError as error:
        raise ValueError(f"flags of vLLM: {error}") from error
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; expected an option of {program}, or {expected}")
    if arguments.revision is not None:
        raise ValueError(f"--revision: an option of {program} itself, and not to be among the flags of vLLM")
    if arguments.tokenizer_revision is not None and arguments.tokenizer is None:
        raise ValueError("--tokenizer-revision belongs to --tokenizer; the model's own is that of the model's revision")
    arguments.model = str(model)
    return arguments
