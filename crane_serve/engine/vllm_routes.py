"""MaskGuard: refuses, on vLLM's own server, a request that asks for a mask in a place where vLLM would ignore it.

Most of vLLM's request models ignore fields they do not know, and several routes make sampling parameters of their own,
so that a mask would be dropped in silence. Of vLLM 0.32, with the first three rows tested route by route, and by
reading of 0.33:

| route                                                 | a mask arrives if it is in               |
|-------------------------------------------------------|------------------------------------------|
| /v1/completions, /v1/chat/completions, /v1/responses, | vllm_xargs, unless use_beam_search       |
| /v1/messages, and /render of each                     |                                          |
| /v1/chat/completions/batch                            | vllm_xargs, which it does not declare    |
| /inference/v1/generate                                | sampling_params.extra_args               |
| /invocations                                          | vllm_xargs or nowhere, by the model's    |
|                                                       | task: refused                            |
| /v1/audio/transcriptions, /v1/audio/translations      | vllm_xargs, but language detection and   |
|                                                       | beam search drop it: refused             |
| /generative_scoring, /v1/systemone, /v1/decisions,    | nowhere: they make their own parameters  |
| /cohere/v2/chat, /v1/realtime                         |                                          |
| embeddings, score, rerank, classify, pooling          | nowhere: they have none                  |
| all others: tokenize, count_tokens, derender, ...     | nowhere: they run no model               |

A mask on any route that is not in `CARRYING` is refused, also on a route of an endpoint plugin. Names that begin with
"crane" count everywhere. In the query, at the top of a body and in objects that hold parameters, names that could be a
misspelt mask count too, such as `masks`, `neuron_mask` or `maks`.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from email.message import Message as Header
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crane_serve.common.masks import MaskError
from crane_serve.engine.admission import ACTIVATIONS_ARGUMENT, MASK_ARGUMENT, OUR_WORDS, looks_like_ours
from crane_serve.engine.wrapping import wrap

_XARGS = ("vllm_xargs",)
CARRYING: Mapping[str, tuple[str, ...]] = {
    **{
        f"/v1/{name}{render}": _XARGS
        for name in ("completions", "chat/completions", "responses", "messages")
        for render in ("", "/render")
    },
    "/v1/chat/completions/batch": _XARGS,
    "/inference/v1/generate": ("sampling_params", "extra_args"),
}
"""Per route that carries a mask: the object of the body whose keys reach the engine."""

CHECKED = "crane.checked"
"""In the scope of a request: whoever sends it to vLLM's app has refused, with `asking_names`, what is refused here."""

_PREFIX = "crane"
# Objects that hold parameters, or that a client may take for such. Elsewhere in a body "mask" is data of the user.
_PARAMETERS = frozenset({"vllm_xargs", "extra_args", "extra_body", "sampling_params", "metadata"})
# The names in a schema are data of the user too, even if they begin with "crane".
_SCHEMA_NAMES = frozenset({"properties", "patternProperties", "$defs", "definitions"})
# \u004X to \u007X are letters; no common encoder writes them so.
_SIGNS = (*(word.encode() for word in OUR_WORDS), b'"position', b"\\u004", b"\\u005", b"\\u006", b"\\u007")
_TWICE = " (given twice)"
_OVERLAP_BYTES = 32  # the longest text that `may_ask` looks for, in UTF-32


def refusal(path: str, query: str, body: bytes, content_type: str = "application/json") -> str | None:
    """Why vLLM would ignore the mask that this request asks for. None if it asks for no mask, or if the mask takes
    effect.

    path: of the route, without the prefix of a mount. query: raw, without "?". body: JSON, or a form if `content_type`
    says so. Whether the mask exists is for admission to say.
    """
    for name, _ in parse_qsl(query, keep_blank_values=True):
        if looks_like_ours(name):
            return _reason(path, f"query parameter {name!r}")
    if not may_ask(body):
        return None
    try:
        is_form = content_type.lower().startswith("multipart/")
        return _misplaced(path, _form(body, content_type) if is_form else _json(body))
    except RecursionError:
        return "the body is nested too deeply to see whether it asks for a mask"
    except ValueError:
        return None  # vLLM cannot read it either


def _misplaced(path: str, content: Any) -> str | None:
    place = CARRYING.get(path.rstrip("/"))
    carried = False
    for *parents, name in asking_names(content):
        if name == ACTIVATIONS_ARGUMENT:
            return f"{name}: no route of vLLM returns activations; /generate and /score of crane serve do"
        if place is None or tuple(parents) != place or not name.startswith(_PREFIX) or name.endswith(_TWICE):
            return _reason(path, repr(".".join((*parents, name))))
        carried = True
    if carried and any(name == "use_beam_search" and value for name, value in content):
        return f"{MASK_ARGUMENT}: beam search cannot be masked"
    return None


def _reason(path: str, name: str) -> str:
    place = CARRYING.get(path.rstrip("/"))
    if place is None:
        return f"{name}: {path} cannot run under a mask; /v1/completions can, if it is in vllm_xargs.{MASK_ARGUMENT}"
    return f"{name} would be ignored; the place for a mask in {path} is {'.'.join((*place, MASK_ARGUMENT))}"


def may_ask(body: bytes) -> bool:
    """A test without parsing: false for almost every body that asks for no mask, true for every one that does."""
    text = body.replace(b"\0", b"").lower()  # JSON may be UTF-16 or UTF-32
    return any(sign in text for sign in _SIGNS)


class _Object(list[tuple[str, Any]]):
    """A JSON object as pairs, so that both values of a duplicate name are seen."""


CONTAINERS = frozenset({dict, list, _Object})
"""The types of JSON objects and lists."""


def _json(body: bytes | str) -> Any:
    return json.loads(body, object_pairs_hook=_Object)


def _form(body: bytes, content_type: str) -> _Object:
    """The fields of a multipart form without its files; JSON in a field is parsed, and a[b] is b in a."""
    header = Header()
    header["content-type"] = content_type
    fields = _Object()
    for part in body.split(f"--{header.get_boundary('')}".encode())[1:]:
        head, _, text = part.partition(b"\r\n\r\n")
        disposition = Header()
        for line in head.decode("latin-1").split("\r\n"):
            if line.lower().startswith("content-disposition:"):
                disposition["content-disposition"] = line.partition(":")[2].strip()
        name = disposition.get_param("name", header="content-disposition")
        if not isinstance(name, str) or disposition.get_filename() is not None:
            continue
        try:
            value = _json(text)
        except ValueError:
            value = None
        outer, bracket, inner = name.partition("[")
        fields.append((outer, _Object([(inner.rstrip("]"), value)]) if bracket else value))
    return fields


class Place(NamedTuple):
    """Where something stands in a JSON document: a name, or an index, in the object or list that stands at `parent`."""

    parent: "Place | None"
    name: str

    @property
    def path(self) -> tuple[str, ...]:
        """All names from the outermost on."""
        names = []
        place: Place | None = self
        while place is not None:
            names.append(place.name)
            place = place.parent
        return tuple(reversed(names))


def asking_names(content: Any) -> Iterator[tuple[str, ...]]:
    """The paths of all names in a JSON document that ask for a mask, in the right place or not.

    Objects are dictionaries, or lists of pairs; the path of a duplicate name says that it is one.
    """
    pending: list[tuple[Place | None, Any, bool]] = [(None, content, True)]
    while pending:
        place, value, are_parameters = pending.pop()
        if isinstance(value, dict | _Object):
            pairs = value.items() if isinstance(value, dict) else value
            twice: Collection[str] = () if isinstance(value, dict) else _twice(value)
            is_tool_call = ("type", "tool_use") in pairs
            for name, child in pairs:
                inner = Place(place, name + _TWICE if name in twice else name)
                if name.lower().startswith(_PREFIX) or (are_parameters and looks_like_ours(name)):
                    yield inner.path
                elif type(child) in CONTAINERS and name not in _SCHEMA_NAMES and not (is_tool_call and name == "input"):
                    pending.append((inner, child, are_parameters and name in _PARAMETERS))
        elif isinstance(value, list) and not CONTAINERS.isdisjoint(map(type, value)):
            pending.extend(
                (Place(place, str(index)), child, False)
                for index, child in enumerate(value)
                if type(child) in CONTAINERS
            )


def _twice(pairs: _Object) -> Collection[str]:
    """The names that an object has more than once."""
    if len(dict(pairs)) == len(pairs):
        return ()
    return {name for name, count in Counter(name for name, _ in pairs).items() if count > 1}


def nested(value: Any) -> list[Any]:
    """The objects and lists that stand directly in a JSON value."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [child for child in children if type(child) in CONTAINERS]


class MaskGuard:
    """ASGI middleware: answers 400 (or closes a websocket) if `refusal` has a reason. Responses pass through unchanged.

    query: whether query parameters are examined; not needed by an app that translates them into the body.
    """

    def __init__(self, app: ASGIApp, *, query: bool = True) -> None:
        self.app = app
        self.query = query

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get(CHECKED):
            await self.app(scope, receive, send)
            return
        messages: list[Message] = []
        body = b""
        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            messages, asks = await _read(receive)
            if asks:
                body = b"".join(message.get("body", b"") for message in messages)
        content_type = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1")
        reason = refusal(_route(scope), self._query(scope), body, content_type)
        if reason is not None:
            error = {"message": reason, "type": "BadRequestError", "param": MASK_ARGUMENT, "code": 400}
            await JSONResponse({"error": error}, status_code=400)(scope, receive, send)
            return
        del body
        replay = iter(messages)

        async def receive_again() -> Message:
            message = next(replay, None)
            return await receive() if message is None else message

        await self.app(scope, receive_again, send)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = _route(scope)

        async def close(reason: str) -> None:
            short = reason.encode()[:123].decode(errors="ignore")  # what fits into a close frame
            await send({"type": "websocket.close", "code": 1008, "reason": short})

        async def receive_checked() -> Message:
            message = await receive()
            frame = message.get("text") or message.get("bytes") or b""
            reason = refusal(path, "", frame.encode() if isinstance(frame, str) else frame)
            if reason is None:
                return message
            await close(reason)
            return {"type": "websocket.disconnect", "code": 1008}

        reason = refusal(path, self._query(scope), b"")
        if reason is None:
            await self.app(scope, receive_checked, send)
        else:
            await close(reason)

    def _query(self, scope: Scope) -> str:
        return scope["query_string"].decode("latin-1") if self.query else ""


async def _read(receive: Receive) -> tuple[list[Message], bool]:
    """All messages of a request's body, and whether it may ask for a mask."""
    messages, asks, text = [await receive()], False, b""
    while True:
        text = text[-_OVERLAP_BYTES:] + messages[-1].get("body", b"")
        asks = asks or may_ask(text)
        if not messages[-1].get("more_body"):
            return messages, asks
        messages.append(await receive())


def _route(scope: Scope) -> str:
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def guard(app: Starlette, *, query: bool = True) -> None:
    """Put a MaskGuard behind all other middleware of an app. An older one is replaced.

    It is the innermost middleware: authentication comes first, and the guard sees bodies as other middleware has
    changed them.
    """
    guards: Any = MaskGuard
    others = [middleware for middleware in app.user_middleware if middleware.cls is not guards]
    app.user_middleware = [*others, Middleware(MaskGuard, query=query)]
    if app.middleware_stack is not None:  # vLLM builds it early
        app.middleware_stack = app.build_middleware_stack()


def install() -> None:
    """Guard each app that vLLM builds and each line of its batch runner, and refuse masks where beam search and prompts
    would ignore them.

    Runs when the plugin is loaded, and again when a front end is made, for modules imported in between.
    """
    from vllm.entrypoints.serve.middleware import register
    from vllm.renderers.inputs import preprocess

    # build_app may have been imported by name already, but looks up what it calls in its own module.
    for owner in (register, sys.modules.get("vllm.entrypoints.launchers.app")):
        wrap(owner, "init_entrypoints_middleware", _init_entrypoints_middleware)
    for module in ("vllm.entrypoints.launchers.run_batch", "__main__"):
        runner = sys.modules.get(module)
        wrap(getattr(runner, "BatchRequestInput", None), "model_validate_json", _read_batch_request)
    beam_search = sys.modules.get("vllm.entrypoints.generate.beam_search.offline")
    wrap(getattr(beam_search, "BeamSearchOfflineMixin", None), "beam_search", _beam_search)
    wrap(preprocess, "_validate_prompt_dict", _validate_prompt_dict)


def _init_entrypoints_middleware(
    original: Callable[..., Any], args: Any, app: Starlette, *rest: Any, **options: Any
) -> None:
    original(args, app, *rest, **options)
    guard(app)


def _read_batch_request(original: Callable[..., Any], json_data: str | bytes, *args: Any, **kwargs: Any) -> Any:
    line = json_data.encode() if isinstance(json_data, str) else json_data
    if may_ask(line):
        try:
            request = dict(_json(line))
        except (TypeError, ValueError):
            return original(json_data, *args, **kwargs)  # vLLM cannot read it either
        url, body = str(request.get("url", "")), request.pop("body", None)
        reason = _misplaced(url, _Object(request.items())) or _misplaced(url, body)
        if reason is not None:
            raise MaskError(f"request {request.get('custom_id')!r} of the batch: {reason}")
    return original(json_data, *args, **kwargs)


def _beam_search(original: Callable[..., Any], self: Any, prompts: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    attributes = getattr(params, "__dict__", {})
    if any(map(looks_like_ours, (*attributes, *(attributes.get("extra_args") or ())))):
        raise MaskError(f"{MASK_ARGUMENT}: beam search cannot be masked")
    return original(self, prompts, params, *args, **kwargs)


def _validate_prompt_dict(original: Callable[..., Any], prompt: Mapping[str, Any]) -> Any:
    for name in prompt:
        if looks_like_ours(name):
            raise MaskError(f"{name!r} would be ignored in a prompt; its place is SamplingParams.extra_args")
    return original(prompt)
