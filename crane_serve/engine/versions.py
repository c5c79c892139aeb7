"""Which versions of vLLM are supported, and all that differs between them: no other module asks for the version."""

from typing import Any

TESTED_VERSIONS = ("0.32.0",)
"""The engine tests have run on these."""

READ_VERSIONS = ("0.33.0",)
"""Their source has been read and is checked by `make contract`; tests of engines ran on their Python files with the
compiled ones of a tested version. No build of theirs has run. Masks are served, with a warning."""


def front_end_flags() -> tuple[Any, Any, Any]:
    """vLLM's classes of its server's flags, the base and all of them, and the function that checks parsed flags."""
    try:
        from vllm.entrypoints.common.cli_args import BaseFrontendArgs, FrontendArgs, validate_parsed_serve_args
    except ImportError:  # vLLM 0.32
        from vllm.entrypoints.launchers.cli_args import BaseFrontendArgs, FrontendArgs, validate_parsed_serve_args
    return BaseFrontendArgs, FrontendArgs, validate_parsed_serve_args


def fail_request(core: Any, request: Any, code: str, reason: str) -> None:
    """End a request that has reached `core`, an EngineCoreProc: its client is told of an error, after which it may ask
    again. vLLM 0.32 passes on no reason.
    """
    from vllm.outputs import RequestError
    from vllm.v1.engine import FinishReason

    told = [RequestError(code, reason, retryable=True)] if hasattr(RequestError, "to_exception") else []
    core._send_finish_outputs_to_client([request.request_id], request.client_index, FinishReason.ERROR, *told)
