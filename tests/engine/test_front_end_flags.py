"""What `crane serve` takes of vLLM's flags."""

from pathlib import Path

import pytest

from crane_serve.engine.flags import serving_arguments


def parse(*flags: str) -> object:
    return serving_arguments(Path("/models/tiny"), flags, program="crane serve")


def test_flags_of_the_engine_and_of_the_front_end_are_read() -> None:
    arguments = parse(
        *("--dtype", "float32", "--chat-template", "{{ messages }}", "--return-tokens-as-token-ids"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--served-model-name", "a", "b"),
    )
    read = {name: getattr(arguments, name) for name in ("model", "dtype", "chat_template", "served_model_name")}
    assert read == {
        "model": "/models/tiny",
        "dtype": "float32",
        "chat_template": "{{ messages }}",
        "served_model_name": ["a", "b"],
    }
    assert arguments.return_tokens_as_token_ids
    assert (arguments.enable_auto_tool_choice, arguments.tool_call_parser) == (True, "hermes")


def test_what_is_not_given_has_vllms_defaults() -> None:
    arguments = parse()
    assert (arguments.allowed_origins, arguments.middleware, arguments.api_key) == ([], [], None)
    assert (arguments.lora_modules, arguments.tokens_only, arguments.served_model_name) == (None, False, None)


def test_what_the_tokenizer_is_can_be_asked_unless_a_flag_says_no() -> None:
    assert parse().enable_tokenizer_info_endpoint
    assert not parse("--no-enable-tokenizer-info-endpoint").enable_tokenizer_info_endpoint


@pytest.mark.parametrize(
    "flags",
    [
        ("--api-key", "secret"),
        ("--host", "::"),
        ("--port", "1"),
        ("--uds", "/x"),
        ("--root-path", "/x"),
        ("--allowed-origins", '["*"]'),
        ("--allow-credentials",),
        ("--middleware", "a.b"),
        ("--ssl-keyfile", "key"),
        ("--enable-ssl-refresh",),
        ("--uvicorn-log-level", "info"),  # also where it is the default
        ("--disable-uvicorn-access-log",),
        ("--h11-max-header-count", "3"),
        ("--grpc-port", "1"),
        ("--lora-modules", "a=b"),
        ("--tokens-only",),
        ("--headless",),
        ("--api-server-count", "2"),
        ("--config", "file"),
    ],
)
def test_what_the_service_does_itself_is_refused_by_name(flags: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"{flags[0]}\\b") as raised:
        parse(*flags)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--enable-auto-tool-choice",), "--tool-call-parser"),
        (("--chat-template", "/nowhere.jinja"), "/nowhere.jinja"),
        (("--dtype", "float99"), "float99"),
        (("--enable-log-outputs",), "--enable-log-requests"),
    ],
)
def test_flags_that_cannot_be_are_value_errors(flags: tuple[str, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse(*flags)
