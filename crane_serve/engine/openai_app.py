"""vLLM's own OpenAI application over an engine with masks.

It is put together of vLLM's own routes and handlers, without what vLLM's server has around them: that reads keys from
the environment, answers origins, loads adapters and handlers of others, and registers metrics of its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from crane_serve.engine.vllm_routes import guard
from crane_serve.masks import MaskError, MaskLibrary
from crane_serve.masks.library import UNMASKED

_TASKS = ("generate",)
_answering_as: ContextVar[str | None] = ContextVar("answering_as", default=None)


@contextmanager
def answering_as(model: str | None) -> Iterator[None]:
    """Requests to the application made in this context are answered in the name of `model`, if it is not None."""
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


async def build_openai_app(engine: Any, arguments: Any, model_names: Sequence[str], library: MaskLibrary) -> ASGIApp:
    """vLLM's application over `engine`, an AsyncLLM, with the flags in the namespace `arguments`.

    model_names: of the base model, the first of which stands in answers; the list of models has a model NAME:MASK for
    each mask that `library` has at that time. The application's lifespan need not run: it only logs statistics.
    Raises ValueError, TypeError or KeyError for flags that the model cannot be served with.
    """
    from fastapi import FastAPI
    from vllm.entrypoints.generate.api_router import register_generate_api_routers
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.openai.models.api_router import attach_router as attach_models
    from vllm.entrypoints.scale_out.factories import register_scale_out_api_routers
    from vllm.entrypoints.serve.exception_handling.handlers.http import http_exception_handler
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
    from vllm.entrypoints.serve.instrumentator.basic import router as basic_router
    from vllm.entrypoints.serve.tokenize.api_router import attach_router as attach_tokenize
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    if arguments.tool_parser_plugin:
        ToolParserManager.import_tool_parser(arguments.tool_parser_plugin)
    if arguments.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(arguments.reasoning_parser_plugin)
    arguments.served_model_name = list(model_names)
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
    guard(app)
    await init_app_state(engine, app.state, arguments, _TASKS)
    _name_masks(app.state.openai_serving_models, library)
    return app


def _name_masks(models: Any, library: MaskLibrary) -> None:
    """Have vLLM's OpenAIServingModels list the masks, and answer under the names that were asked for."""
    from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

    base_name, base_models = models.model_name, models.show_available_models

    def model_name(lora_request: Any = None) -> str:
        return _answering_as.get() or str(base_name(lora_request))

    async def show_available_models() -> Any:
        listing = await base_models()
        base = listing.data[0]
        for name in library.masks:
            card = ModelCard(
                id=f"{base.id}:{public_name(library, name)}",
                root=name,
                parent=base.id,
                max_model_len=base.max_model_len,
                permission=[ModelPermission()],
            )
            listing.data.append(card)
        return listing

    models.model_name, models.show_available_models = model_name, show_available_models
