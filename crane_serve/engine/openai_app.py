"""vLLM's own OpenAI application over an engine with masks.

It consists of vLLM's own routes and handlers, without the rest of vLLM's server, which reads keys from the environment,
handles CORS, loads adapters and third-party handlers, and registers metrics of its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from crane_serve.common.masks import MaskError, MaskLibrary
from crane_serve.common.masks.library import UNMASKED
from crane_serve.engine.detokenizing import mend_detokenizer
from crane_serve.engine.limits import explain_limits
from crane_serve.engine.vllm_routes import guard

_TASKS = ("generate",)
_CHAT, _CHAT_BATCH = "/v1/chat/completions", "/v1/chat/completions/batch"
_TOKENS = "/inference/v1/generate"
_LISTS = ("list", "tuple", "set", "frozenset")  # of pydantic's core schemas
_answering_as: ContextVar[str | None] = ContextVar("answering_as", default=None)


RequestFields = Mapping[str, Mapping[str, frozenset[str]]]
"""By route, then by object of the body: the field names that vLLM knows. "" is the body itself."""


class OpenAIApp(NamedTuple):
    """vLLM's application, and the fields that it knows."""

    app: ASGIApp
    fields: RequestFields


@contextmanager
def answering_as(model: str | None) -> Iterator[None]:
    """Answers to requests made in this context name `model` as their model, if it is not None."""
    token = _answering_as.set(model)
    try:
        yield
    finally:
        _answering_as.reset(token)


def public_name(library: MaskLibrary, name: str) -> str:
    """The shortest expression for a mask: its bare language, if that means this mask and no other, or its name."""
    bare = name.removeprefix(f"{library.default_method}-")
    try:
        return bare if bare != UNMASKED and library.get(bare).name == name else name
    except MaskError:
        return name


def split_model(model: Any, names: Sequence[str]) -> tuple[str | None, str | None]:
    """The base model and the mask expression that a model's name stands for; (None, None) if it names no model of this
    server.

    names: of the base model.
    """
    if not isinstance(model, str) or model in names:
        return None, None
    # The longest name first: one may begin with another and a colon.
    base = next((name for name in sorted(names, key=len, reverse=True) if model.startswith(f"{name}:")), None)
    return (None, None) if base is None else (base, model[len(base) + 1 :])


async def build_openai_app(engine: Any, arguments: Any, model_names: Sequence[str], library: MaskLibrary) -> OpenAIApp:
    """vLLM's application over `engine`, an AsyncLLM, with the flags in the namespace `arguments`.

    model_names: of the base model, the first of which stands in answers; the list of models has a model NAME:MASK for
    each mask that `library` has at that time, and `/v1/models/{model}` answers for every name that a request may have.
    The application's lifespan need not run: it only logs statistics. Also corrects, in this process, vLLM's detokenizer
    and its messages about prompts that are too long. Raises ValueError, TypeError or KeyError for flags that the model
    cannot be served with.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    if arguments.tool_parser_plugin:
        ToolParserManager.import_tool_parser(arguments.tool_parser_plugin)
    if arguments.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(arguments.reasoning_parser_plugin)
    arguments.served_model_name = list(model_names)
    app = assemble(arguments)
    guard(app)
    await init_app_state(engine, app.state, arguments, _TASKS)
    _name_masks(app, model_names, library)
    mend_detokenizer()
    explain_limits()
    return OpenAIApp(app, request_fields(app))


def assemble(arguments: Any) -> Any:
    """vLLM's routes in an application that has no engine yet."""
    from fastapi import FastAPI
    from vllm.entrypoints.generate.api_router import register_generate_api_routers
    from vllm.entrypoints.openai.models.api_router import attach_router as attach_models
    from vllm.entrypoints.scale_out.factories import register_scale_out_api_routers
    from vllm.entrypoints.serve.exception_handling.handlers.http import http_exception_handler
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
    from vllm.entrypoints.serve.instrumentator.basic import router as basic_router
    from vllm.entrypoints.serve.tokenize.api_router import attach_router as attach_tokenize

    app = FastAPI(openapi_url=None)
    app.state.args = arguments
    app.state.server = SimpleNamespace()  # a dead engine's server is told to exit by its attribute; the service sees it
    attach_models(app)
    attach_tokenize(app)
    app.include_router(basic_router)
    register_generate_api_routers(app)
    register_scale_out_api_routers(app, _TASKS)
    init_exception_handler(app)
    app.add_exception_handler(HTTPException, http_exception_handler)  # vLLM's own covers only a subclass of it
    _mend_bodies(app)
    return app


def _mend_bodies(app: Any) -> None:
    """Have the lists of request bodies checked up to their first wrong item, and wrong values refused.

    pydantic describes every wrong item, for every kind of thing that it might have been: of `"input": [{}, {}, ...]`
    4 ms each. vLLM's own validators take values for what they should be, as in `"structured_outputs": "x"`. For vLLM
    0.32 and FastAPI, whose fields keep their TypeAdapter to themselves.
    """
    from pydantic_core import SchemaValidator

    for route in app.routes:
        body = getattr(route, "body_field", None)
        if body is not None:
            adapter = body._type_adapter
            adapter.validator = SchemaValidator(_failing_fast(adapter.core_schema))
            body.validate = partial(_validate, body.validate)


def _validate(
    original: Callable[..., tuple[Any, list[Any]]], value: Any, *args: Any, loc: tuple[int | str, ...], **kwargs: Any
) -> tuple[Any, list[Any]]:
    try:
        return original(value, *args, loc=loc, **kwargs)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        message = f"a value is of another kind than vLLM expects: {error}"
        return None, [{"type": "value_error", "loc": loc, "msg": message, "input": None}]


def _failing_fast(schema: Any) -> Any:
    """A copy of a pydantic core schema."""
    if isinstance(schema, dict):
        copy = {key: _failing_fast(value) for key, value in schema.items()}
        return copy | {"fail_fast": True} if schema.get("type") in _LISTS else copy
    if isinstance(schema, list | tuple):
        return type(schema)(map(_failing_fast, schema))
    return schema


def request_fields(app: Any) -> RequestFields:
    """The fields that vLLM's request models declare. vLLM drops others, most of them without a word."""
    from vllm.sampling_params import SamplingParams

    fields: dict[str, dict[str, frozenset[str]]] = {}
    for route in app.routes:
        body = getattr(route, "body_field", None)
        if body is not None:
            fields[route.path] = {"": frozenset(_declared(body.field_info.annotation))}
    if _CHAT_BATCH in fields:  # for each conversation it makes a chat request with all fields of its own
        fields[_CHAT_BATCH][""] |= fields[_CHAT][""]
    if _TOKENS in fields:
        fields[_TOKENS]["sampling_params"] = frozenset(SamplingParams.__struct_fields__)
    return fields


def _declared(annotation: Any) -> Iterator[str]:
    """The names, and other names, of the fields of a pydantic model, or of any in a union."""
    for kind in get_args(annotation) or (annotation,):
        for name, field in getattr(kind, "model_fields", {}).items():
            yield from (str(known) for known in (name, field.alias, field.validation_alias) if known is not None)


def _name_masks(app: Any, base_names: Sequence[str], library: MaskLibrary) -> None:
    """Have vLLM's OpenAIServingModels list the masks, and answer under the names that were asked for."""
    from fastapi.responses import JSONResponse
    from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

    models = app.state.openai_serving_models
    base_name, base_models = models.model_name, models.show_available_models

    def model_name(lora_request: Any = None) -> str:
        return _answering_as.get() or str(base_name(lora_request))

    async def show_available_models() -> Any:
        listing = await base_models()
        base = listing.data[0]
        listing.data.extend(masked(base, f"{base.id}:{public_name(library, name)}", name) for name in library.masks)
        return listing

    def masked(base: Any, model: str, root: str) -> Any:
        length = base.max_model_len
        return ModelCard(id=model, root=root, parent=base.id, max_model_len=length, permission=[ModelPermission()])

    async def retrieve_model(model: str) -> JSONResponse:
        """One model: the base model, alone or under a mask. The caller has checked that it exists."""
        name, expression = split_model(model, base_names)
        cards = {card.id: card for card in (await base_models()).data}
        card = cards[model if name is None else name]
        if expression is not None:
            mask = library.resolve(expression)
            card = masked(card, model, card.root if mask is None else mask.name)
        return JSONResponse(card.model_dump())

    models.model_name, models.show_available_models = model_name, show_available_models
    app.add_api_route("/v1/models/{model:path}", retrieve_model, methods=["GET"])
