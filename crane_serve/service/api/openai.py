"""The OpenAI-compatible routes: vLLM's own application. All ways to name a mask are translated into vLLM's own.

A mask may be named in the query (`?mask=zh`), in the body (`"mask": "zh"`), in the model's name (`tiny:zh`), and where
vLLM's own server takes it (`vllm_xargs.crane_mask`); if several places name one, they must mean the same. The body and
vLLM's place may also hold the mask itself.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, cast
from urllib.parse import parse_qsl, urlencode

from fastapi import FastAPI
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from crane_serve.common.masks import (
    INLINE_PREFIX,
    MaskError,
    MaskLibrary,
    Positions,
    ResolvedMask,
    inline_content,
)
from crane_serve.engine.admission import MASK_ARGUMENT, POSITIONS_ARGUMENT, mask_arguments
from crane_serve.engine.answers import EngineDead
from crane_serve.engine.openai_app import answering_as, public_name, split_model
from crane_serve.engine.service import EngineService
from crane_serve.engine.vllm_routes import CARRYING, CHECKED
from crane_serve.service.api import openai_body
from crane_serve.service.api.body import replayed
from crane_serve.service.api.context import context_of
from crane_serve.service.api.dependencies import Asked, check_headers, choose_mask, named_masks
from crane_serve.service.api.errors import ApiError, BadRequest, error_event, error_response
from crane_serve.service.api.gate import MAX_LOGPROBS, Gate
from crane_serve.service.api.openai_body import MASK, POSITIONS, Body
from crane_serve.service.api.page import check_page_query
from crane_serve.service.api.turns import Turns

_INTEGER = TypeAdapter(int)
_LONGEST = 100  # characters of a model's name that is quoted
_MODELS, MODEL = "/v1/models/", "/v1/models/{model}"
_WITHOUT_MODEL = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")
ROUTES: Mapping[str, str] = {
    **dict.fromkeys((*CARRYING, *_WITHOUT_MODEL), "POST"),
    **dict.fromkeys(("/v1/models", MODEL, "/tokenizer_info", "/version"), "GET"),
}
"""The paths of vLLM that are served, with the method of each."""

# Query parameters that client libraries send, and vLLM ignores.
_HARMLESS_PARAMETERS = frozenset({"api-version", "beta"})


class OpenAIRoutes:
    """ASGI application for the paths that no other route of the service has; what is not in ROUTES is a 404.

    Found in the application's state: `engine`, whose `openai` answers, and `gate`. vLLM gets a body in one of `turns`,
    since it reads it once more.
    """

    def __init__(self, turns: Turns | None = None) -> None:
        self._turns = turns or Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000, "reason": "no such websocket"})
            return
        path = str(scope["path"])
        route = MODEL if path.startswith(_MODELS) else path
        method = ROUTES.get(route)
        if method is None:
            if path == "/":
                check_page_query(scope["query_string"].decode("latin-1"))
            raise HTTPException(404)
        scope["crane_route"] = route
        if scope["method"] != method:
            raise HTTPException(405, headers={"Allow": method})
        check_headers(scope)
        app = cast(FastAPI, scope["app"])
        engine, gate = cast(EngineService, app.state.engine), cast(Gate, app.state.gate)
        if method == "POST" and path not in engine.openai_fields:
            raise HTTPException(404)  # vLLM has it only with --enable-scale-out
        if route == MODEL:
            _check_model(path.removeprefix(_MODELS), engine)
        content = b"" if method == "GET" else await _read(receive)
        if content is None:
            return
        request = _TranslatedRequest(route, scope["query_string"].decode("latin-1"), content, engine)
        context = context_of(scope)
        context.mask = request.mask
        if method == "POST":
            gate.admit(context, *_asked(path, request.body))
        translated = {**scope, CHECKED: True, "state": {}, "query_string": request.query.encode("latin-1")}
        translated.pop("router", None)
        if request.content is not content:
            headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
            translated["headers"] = [*headers, (b"content-length", b"%d" % len(request.content))]
        async with AsyncExitStack() as held:
            if _runs(path):
                await held.enter_async_context(engine.row(request.mask))
            held.enter_context(answering_as(request.model))
            answer = _Answer(scope, receive, send, engine)
            try:
                body: Message = {"type": "http.request", "body": request.content, "more_body": False}
                await engine.openai(translated, self._in_turn(replayed(body, receive)), answer)
            except Exception:
                if not engine.is_dead:
                    raise
                await answer.end()  # vLLM fails in the middle of some of its streams

    def _in_turn(self, receive: Receive) -> Receive:
        async def give() -> Message:
            message = await receive()
            if message.get("body"):
                await self._turns.take()
            return message

        return give


async def _read(receive: Receive) -> bytes | None:
    """The whole body, None if the client has gone. A middleware limits its length."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


class _Answer:
    """`send` for an answer of vLLM.

    If the engine dies, the answer says so, also in the middle of a stream. A stream whose first event is a refusal
    becomes an error with the matching status: vLLM checks some requests only after it has begun to answer.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, engine: EngineService) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._engine = engine
        self._head: Message | None = None  # of a stream of events, held back until the first event
        self._has_begun = False
        self._is_of_events = False
        self._is_over = False

    async def __call__(self, message: Message) -> None:
        if self._is_over:
            return
        if self._engine.is_dead and (self._is_of_events or message.get("status", 0) >= 500):
            await self.end()
            return
        if message["type"] == "http.response.start":
            kind = Headers(raw=message["headers"]).get("content-type", "")
            self._is_of_events = kind.startswith("text/event-stream")
            if self._is_of_events:
                self._head = message
                return
        else:
            self._is_over = not message.get("more_body", False)
        if self._head is not None:
            refusal = _refusal(message.get("body", b""))
            if refusal is not None:
                self._is_over = True
                answer = JSONResponse({"error": refusal}, status_code=refusal["code"])
                await answer(self._scope, self._receive, self._send)
                return
            head, self._head = self._head, None
            self._has_begun = True
            await self._send(head)
        self._has_begun = True
        await self._send(message)

    async def end(self) -> None:
        """Say that the engine has died, if the answer is not over. Raises EngineDead if the answer cannot say it any
        more."""
        if self._is_over:
            return
        self._is_over = True
        error = EngineDead("the engine has died")
        if not self._has_begun:
            await error_response(error)(self._scope, self._receive, self._send)
        elif self._is_of_events:
            last = error_event(error, self._scope["path"])
            await self._send({"type": "http.response.body", "body": last, "more_body": False})
        else:
            raise error


def _refusal(event: bytes) -> dict[str, Any] | None:
    """The error in a server-sent event, if the client has caused it."""
    _, is_data, data = event.partition(b"data: ")
    if not is_data or b'"error"' not in data:
        return None
    try:
        error = json.loads(data.partition(b"\n")[0])["error"]
        is_refusal = 400 <= error["code"] < 500
    except (ValueError, KeyError, TypeError):
        return None
    return cast(dict[str, Any], error) if is_refusal else None


class _TranslatedRequest:
    """The mask and model that a request asks for, and the request in vLLM's form.

    mask: that it runs under; model: the name to answer under, None for the model's own; body: the JSON object; content:
    the bytes of the body, unchanged if nothing has to be translated; query: without the service's own parameters.
    Raises MaskError, or ApiError for a request that is malformed or contradicts itself.
    """

    def __init__(self, path: str, query: str, content: bytes, engine: EngineService) -> None:
        self._path = path
        parameters = _parameters(query)
        self.query = urlencode([pair for pair in parameters if pair[0] not in (MASK, POSITIONS)])
        self.body: Body = {}
        if ROUTES[path] == "POST":
            self.body = openai_body.read(content, engine.openai_fields[path], CARRYING.get(path, ()))
        self._arguments = self._carried()
        masks, positions = self._masks(parameters), self._positions(parameters)
        base, expression = split_model(self.body.get("model"), engine.model_names)
        if expression is not None:
            masks.append(("the model's name", expression))
        mask = _choose(engine.library, masks, positions)
        self.mask = mask if path in CARRYING else None
        self.model = None if expression is None else str(self.body["model"])
        if self.mask is not None and self.body.get("use_beam_search"):
            raise BadRequest("beam_search", "beam search cannot be masked", "use_beam_search")
        changed = self._translate(None if expression is None else base)
        self.content = json.dumps(self.body, ensure_ascii=False).encode() if changed else content

    def _carried(self) -> Body | None:
        """The object whose keys vLLM hands to the engine, None if there is none."""
        parent: Any = self.body
        for name in CARRYING.get(self._path, ("",)):
            parent = parent.get(name)
            if not isinstance(parent, dict):
                return None
        return cast(Body, parent)

    def _masks(self, parameters: Sequence[tuple[str, str]]) -> list[tuple[str, Asked]]:
        """The masks that the request asks for outside its model's name: pairs of a place and what stands there."""
        in_query = [value for name, value in parameters if name == MASK]
        in_body = self.body.get(MASK)
        named = named_masks(in_query, in_body if isinstance(in_body, dict) else _text(self.body, MASK))
        carried = None if self._arguments is None else _text(self._arguments, MASK_ARGUMENT)
        if carried is not None:
            named.append((MASK_ARGUMENT, _content(carried) if carried.startswith(INLINE_PREFIX) else carried))
        self._require_model(named, MASK)
        return named

    def _positions(self, parameters: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """The positions that the request names: pairs of a place and a value."""
        named = [("the query", value) for name, value in parameters if name == POSITIONS]
        if len(named) > 1:
            raise BadRequest("mask_conflict", "'positions' is given twice in the query", POSITIONS)
        arguments = self._arguments or {}
        places = (("the body", self.body, POSITIONS), (POSITIONS_ARGUMENT, arguments, POSITIONS_ARGUMENT))
        named += [(place, value) for place, content, name in places if (value := _text(content, name)) is not None]
        self._require_model(named, POSITIONS)
        return named

    def _require_model(self, named: Sequence[object], name: str) -> None:
        if named and self._path not in CARRYING:
            raise BadRequest("mask_conflict", f"{self._path} runs no model that could be masked", name)

    def _translate(self, base: str | None) -> bool:
        """Put the mask where vLLM takes it, and the name of the base model; say whether that changed the body."""
        names = [name for name in (MASK, POSITIONS) if name in self.body]
        carried = [name for name in (MASK_ARGUMENT, POSITIONS_ARGUMENT) if name in (self._arguments or ())]
        for name in names:
            del self.body[name]
        for name in carried:
            del cast(Body, self._arguments)[name]
        if base is not None:
            self.body["model"] = base
        if self.mask is not None:
            self._place().update(mask_arguments(self.mask))
        return bool(names or carried or base is not None or self.mask is not None)

    def _place(self) -> Body:
        """The object whose keys vLLM hands to the engine, made if there is none."""
        parent = self.body
        for name in CARRYING[self._path]:
            if parent.get(name) is None:
                parent[name] = {}
            if not isinstance(parent[name], dict):
                raise ApiError(422, "malformed_body", f"{name}: expected an object", name)
            parent = parent[name]
        return parent


def _parameters(query: str) -> list[tuple[str, str]]:
    parameters = parse_qsl(query, keep_blank_values=True)
    for name, _ in parameters:
        if name not in (MASK, POSITIONS) and name not in _HARMLESS_PARAMETERS:
            raise ApiError(
                422, "malformed_query", f"unknown query parameter {name!r}; expected mask or positions", name
            )
    return parameters


def _check_model(model: str, engine: EngineService) -> None:
    """Raises ApiError, in the form of OpenAI's API, if a request could not name this model."""
    base, expression = split_model(model, engine.model_names)
    reason = None
    try:
        if expression is not None:
            engine.library.resolve(expression)
    except MaskError as error:
        reason = str(error)
    if reason is not None or (base is None and model not in engine.model_names):
        masks = (f"{engine.model_name}:{public_name(engine.library, name)}" for name in engine.library.masks)
        known = ", ".join((*engine.model_names, *masks))
        message = f"the model {model[:_LONGEST]!r} does not exist; this server has {known}"
        raise ApiError(404, "model_not_found", message if reason is None else f"{message} ({reason})", "model")


def _text(content: Body, name: str) -> str | None:
    value = content.get(name)
    if value is not None and not isinstance(value, str):
        raise ApiError(422, "malformed_body", f"{name}: expected a string, got {type(value).__name__}", name)
    return value


def _content(text: str) -> dict[str, Any]:
    try:
        return inline_content(text)
    except ValueError as error:
        raise MaskError(f"{MASK_ARGUMENT}: {error}") from None


def _choose(
    library: MaskLibrary, masks: Sequence[tuple[str, Asked]], positions: Sequence[tuple[str, str]]
) -> ResolvedMask | None:
    """The requested mask, if all places agree. masks, positions: pairs of a place and its value."""
    if not positions:
        return choose_mask(library, masks)
    read = [(place, _positions(place, value)) for place, value in positions]
    first_place, first = read[0]
    for place, value in read[1:]:
        if value != first:
            message = f"{first_place} says positions={first}, {place} {value}"
            raise BadRequest("mask_conflict", message, POSITIONS)
    if not masks:
        raise BadRequest("mask_conflict", f"positions={first} without a mask", POSITIONS)
    return choose_mask(library, masks, first)


def _positions(place: str, value: str) -> Positions:
    try:
        return Positions.parse(value)
    except ValueError as error:
        raise ApiError(422, "malformed_body", f"positions in {place}: {error}", POSITIONS) from None


def _runs(path: str) -> bool:
    """Whether a route has the model run under a request's mask; `render` only shows what would run."""
    return path in CARRYING and not path.endswith("/render")


def _asked(path: str, body: Body) -> tuple[int, int]:
    """How many sequences the engine will run for a request, and how many log-probabilities of each it gives for a
    position, as far as its body can be understood."""
    if not _runs(path):
        return 0, 0
    place: Any = body.get("sampling_params") if path == "/inference/v1/generate" else body
    if not isinstance(place, dict):
        return 1, 0
    sequences = max(_integer(place.get("n")), 1)
    logprobs = [_integer(place.get(name)) for name in ("logprobs", "top_logprobs", "prompt_logprobs")]
    most = MAX_LOGPROBS if -1 in logprobs else max(logprobs)  # -1 is the whole vocabulary
    if place.get("use_beam_search"):
        most = max(most, 2 * sequences)  # of each beam, n wide
    if path == "/v1/completions":
        sequences *= _prompts(body.get("prompt")) + _prompts(body.get("prompt_embeds")) or 1
    if path == "/v1/chat/completions/batch" and isinstance(body.get("messages"), list):
        sequences *= len(body["messages"])
    return sequences, most


def _integer(value: Any) -> int:
    """A number as vLLM reads it, which takes "2", and 2.0; 0 for what it refuses."""
    try:
        return _INTEGER.validate_python(value)
    except ValidationError:
        return 0


def _prompts(prompt: Any) -> int:
    """One text, several, one list of token ids, or several."""
    if isinstance(prompt, list):
        return 1 if prompt and isinstance(prompt[0], int | float) else len(prompt)
    return 0 if prompt is None else 1
