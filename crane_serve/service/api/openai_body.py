"""The body of a request for vLLM: parsed as vLLM parses it, and refused if vLLM would ignore part of it.

vLLM ignores unknown fields: a request with a misspelt mask would run unmasked, and other misspelt parameters would have
no effect. Here a field that neither vLLM nor the service knows is refused by its name.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from crane_serve.common.unique_names import unique_names
from crane_serve.engine.admission import MASK_ARGUMENT, POSITIONS_ARGUMENT, looks_like_ours
from crane_serve.engine.vllm_routes import CONTAINERS, Place, asking_names, nested
from crane_serve.service.api.errors import ApiError, BadRequest, lone_surrogate

MASK, POSITIONS = _OURS = ("mask", "positions")
Body = dict[str, Any]

_LONGEST = 100  # characters of a name that is quoted
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

# Parameters of OpenAI's and Anthropic's own services, which their packages send, and which vLLM takes and ignores.
_OF_OPENAI = """
    access_programs audio background_options context_management conversation function_call functions image metadata
    modalities moderation prediction prompt_cache_key prompt_cache_options prompt_cache_retention reasoning_effort
    safety_identifier service_tier store stream_options user verbosity web_search_options
"""
_OF_ANTHROPIC = """
    billing_policy cache_control compaction container context_management diagnostics fallback_credit_token fallbacks
    inference_geo mcp_servers metadata service_tier speed thread user_profile_id workspace_id
"""
# Arguments for transformers that lm-evaluation-harness passes on from its tasks, besides those under vLLM's names.
_OF_THE_HARNESS = "do_sample max_gen_toks max_new_tokens"
IGNORED = frozenset((_OF_OPENAI + _OF_ANTHROPIC + _OF_THE_HARNESS).split())
"""Fields that vLLM may ignore: they cannot be meant as a mask."""

MAX_PARTS = {"messages": 4096, "input": 256}
"""Most objects and lists in a field: messages, their parts and tool calls. vLLM takes 10 to 20 us for each in
`messages`, and 100 to 200 us in `input`."""

MAX_STOPS = 64
"""Most stop strings."""

_ONE = ("best_of", "num_beams")  # vLLM no longer has them; some clients send the value 1


def read(content: bytes, fields: Mapping[str, frozenset[str]], place: Sequence[str]) -> Body:
    """The JSON object in a body.

    fields: the names that vLLM knows, by object of the body, "" for the body itself; place: the object whose keys vLLM
    hands to the engine, where it names a mask. Raises BadRequest if the body is not an object, or if it has a duplicate
    name; ApiError, naming the field, for invalid text and for a field that vLLM would ignore.
    """
    body = _parse(content)
    _check_values(body, with_texts=_may_hold_surrogates(content))
    _check_names(body, fields)
    _check_sizes(body)
    ours = {*((name,) for name in _OURS), *((*place, argument) for argument in (MASK_ARGUMENT, POSITIONS_ARGUMENT))}
    for path in asking_names(body):
        if path not in ours:
            raise _unknown(path, ())
    return body


def _parse(content: bytes) -> Body:
    try:
        body = json.loads(content, object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise BadRequest("malformed_body", f"the body cannot be read as JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequest("malformed_body", "the body is not a JSON object")
    return body


def _check_names(body: Body, fields: Mapping[str, frozenset[str]]) -> None:
    for name in _ONE:
        if body.get(name) not in (None, 1):
            raise ApiError(422, "malformed_body", f"{name}: vLLM would ignore it; expected 1", name)
    for outer, known in fields.items():
        content = body.get(outer) if outer else body
        others = known if outer else known.union(_OURS, IGNORED, _ONE)
        for name in content if isinstance(content, dict) else ():
            if name not in others:
                raise _unknown((outer, name) if outer else (name,), known if outer else known.union(_OURS))


def _check_sizes(body: Body) -> None:
    """Raises ApiError for more than vLLM can read in a moment: it tries each message as one of many kinds."""
    for name, most in MAX_PARTS.items():
        pending, parts = [body.get(name)], 0
        while pending:
            inner = nested(pending.pop())
            parts += len(inner)
            if parts > most:
                message = f"{name}: more than {most} objects and lists in it, the most that this server reads"
                raise ApiError(413, "body_too_complex", message, name)
            pending.extend(inner)
    stops = body.get("stop")
    if isinstance(stops, list) and len(stops) > MAX_STOPS:
        message = f"stop: {len(stops)} texts; at most {MAX_STOPS} are looked for in every token"
        raise ApiError(422, "malformed_body", message, "stop")


def _unknown(path: Sequence[str], known: Iterable[str]) -> ApiError:
    name, param = path[-1][:_LONGEST], _dotted(path)
    nearest = get_close_matches(name.lower(), known, n=1)
    if nearest:
        hint = f"did you mean {nearest[0]!r}?"
    elif looks_like_ours(name):
        hint = f"a mask is named in {MASK!r}, or in the model's name"
    else:
        hint = "vLLM would ignore it"
    return ApiError(422, "malformed_body", f"{param}: not a parameter of this route; {hint}", param)


def _dotted(path: Iterable[str]) -> str:
    name = ".".join(path)
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..."


def _may_hold_surrogates(content: bytes) -> bool:
    """A test without parsing: false for almost every body that holds none, true for every one that does."""
    is_escaped = (rb"\ud" in content or rb"\uD" in content) and _ESCAPED_SURROGATE.search(content) is not None
    return is_escaped or b"\xed" in content


def _check_values(body: Body, *, with_texts: bool) -> None:
    """Raises BadRequest for an integer on which vLLM fails, ApiError for a text that cannot be encoded."""
    pending: list[tuple[Place | None, Any]] = [(None, body)]
    while pending:
        place, value = pending.pop()
        children = value.values() if isinstance(value, dict) else value
        kinds = set(map(type, children))
        if int in kinds:
            integers = children if len(kinds) == 1 else [child for child in children if type(child) is int]
            if min(integers) < -(2**63) or max(integers) >= 2**63:
                raise BadRequest("malformed_body", "the body has an integer that does not fit into 64 bits")
        if with_texts and (str in kinds or isinstance(value, dict)):
            _check_texts(value, place)
        if not CONTAINERS.isdisjoint(kinds):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            pending.extend((Place(place, str(name)), child) for name, child in pairs if type(child) in CONTAINERS)


def _check_texts(value: Any, place: Place | None) -> None:
    children = (*value, *value.values()) if isinstance(value, dict) else value
    if not lone_surrogate("".join(child for child in children if isinstance(child, str))):
        return
    names = list(value) if isinstance(value, dict) else []
    pairs: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
    texts = [(name, text) for name, text in pairs if isinstance(text, str)]
    for text, where in (*((name, place) for name in names), *((text, Place(place, str(name))) for name, text in texts)):
        if problem := lone_surrogate(text):
            param = None if where is None else _dotted(where.path)
            raise ApiError(422, "malformed_body", f"{param or 'body'}: {problem}", param)
