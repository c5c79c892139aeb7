"""/masks: which masks this server has, what they contain, and how to add and remove them while it serves."""

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, WithJsonSchema

from crane_serve.common.masks import MaskLibrary, StoredMask, decode_mask, encode_mask
from crane_serve.common.masks.files import MAX_NAME, NAME, SUFFIX, check_name
from crane_serve.service.api.dependencies import Engine, TheDownloads
from crane_serve.service.api.errors import ANY_ROUTE, ApiError, responses
from crane_serve.service.api.schemas import InvalidMaskFile, MaskDetails, MaskList, MaskNeurons, MaskSummary

router = APIRouter()

_FILE_TYPES = ("application/octet-stream", "application/x-safetensors")
_PIECE_BYTES = 256 * 2**10  # of a file
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TAG = r'(?:W/)?"[\x21\x23-\x7e]*"'
_TAGS = rf"[ \t]*(?:\*|{_TAG}(?:[ \t]*,[ \t]*{_TAG})*)[ \t]*"
_DESCRIBED_TAGS = r'^(\*|(W/)?"[!#-~]*"(, ?(W/)?"[!#-~]*")*)$'
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_TAGGED = {"headers": {"ETag": {"description": "The digest, in quotes", "schema": {"type": "string"}}}}
_PLACED = {"headers": {**_TAGGED["headers"], "Location": {"description": "Its path", "schema": {"type": "string"}}}}

_T = TypeVar("_T")


def _new_name(name: str) -> str:
    if _DIGEST.fullmatch(name):
        raise ValueError("64 hexadecimal digits always mean the mask with this digest; expected another name")
    return check_name(name)


def _tags(condition: str) -> str:
    if not re.fullmatch(_TAGS, condition):
        raise ValueError("expected *, or digests in double quotes, joined with commas")
    return condition


class _NoQuery(BaseModel):
    """The query of a request that has none: a misspelt or misplaced parameter must not be ignored."""

    model_config = ConfigDict(extra="forbid")


async def _no_query(query: Annotated[_NoQuery, Query()]) -> None:
    pass


class _Changes:
    """Runs the changes of an application's masks one after the other, so that the state that a change checks is the
    state that it changes."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def run(self, change: Callable[[], Awaitable[_T]]) -> _T:
        """The result of `change`, which runs to its end before the next even if the caller is cancelled meanwhile."""
        await self._lock.acquire()
        task = asyncio.ensure_future(change())
        task.add_done_callback(lambda _: self._lock.release())
        return await asyncio.shield(task)


async def _get_changes(request: Request) -> _Changes:
    state = request.app.state
    if not hasattr(state, "mask_changes"):
        state.mask_changes = _Changes()
    changes: _Changes = state.mask_changes
    return changes


# The lines of a header, an empty list without the header. Described as one line, which is how most clients send it.
_Condition = Annotated[
    list[Annotated[str, AfterValidator(_tags)]], WithJsonSchema({"type": "string", "pattern": _DESCRIBED_TAGS})
]
_IF_MATCH = "Change it only if it has this digest, in quotes; * if it exists"
_IF_NONE_MATCH = "Only if its digest is not this one, in quotes; * if there is no such mask"
IfMatch = Annotated[_Condition, Header(description=_IF_MATCH, default_factory=list)]
IfNoneMatch = Annotated[_Condition, Header(description=_IF_NONE_MATCH, default_factory=list)]
MaskReference = Annotated[
    str,
    Path(description="Mask name, digest, or bare language", json_schema_extra={"pattern": f"^{NAME}$"}),
]
Name = Annotated[str, Path(description="Mask name", pattern=f"^{NAME}$", max_length=MAX_NAME)]
NewName = Annotated[Name, AfterValidator(_new_name)]
Changes = Annotated[_Changes, Depends(_get_changes)]
NoQuery = Depends(_no_query)


@router.get(
    "/masks", response_model=MaskList, responses={200: _TAGGED, **responses(304, *ANY_ROUTE)}, dependencies=[NoQuery]
)
async def masks(engine: Engine, downloads: TheDownloads, if_none_match: IfNoneMatch) -> Response:
    """All masks, and the mask files that cannot be used with the reason."""
    content, digest = await downloads.make(lambda: _listed(engine.library))
    return _not_changed(if_none_match, digest) or _json(content, digest)


@router.get(
    "/masks/{name}",
    response_model=MaskDetails,
    responses={200: _TAGGED, **responses(304, 404, 409, *ANY_ROUTE)},
    dependencies=[NoQuery],
)
async def mask(name: MaskReference, engine: Engine, downloads: TheDownloads, if_none_match: IfNoneMatch) -> Response:
    """One mask by name, digest, or bare language."""
    stored = engine.library.get(name)
    if unchanged := _not_changed(if_none_match, stored.mask.digest):
        return unchanged
    return await downloads.make(lambda: _details(stored))


@router.get(
    "/masks/{name}/neurons",
    response_model=MaskNeurons,
    responses={200: _TAGGED, **responses(304, 404, 409, *ANY_ROUTE)},
    dependencies=[NoQuery],
)
async def neurons(name: MaskReference, engine: Engine, downloads: TheDownloads, if_none_match: IfNoneMatch) -> Response:
    """What a mask changes: per layer, the neurons whose scale is not 1."""
    stored = engine.library.get(name)
    if unchanged := _not_changed(if_none_match, stored.mask.digest):
        return unchanged
    return downloads.answer(MaskNeurons.pieces(stored), "application/json", {"ETag": _tag(stored.mask.digest)})


@router.get(
    "/masks/{name}/file",
    response_class=Response,
    responses={
        200: {**_TAGGED, "description": "The mask file", "content": {_FILE_TYPES[0]: _BINARY}},
        **responses(304, 404, 409, *ANY_ROUTE),
    },
    dependencies=[NoQuery],
)
async def file(name: MaskReference, engine: Engine, downloads: TheDownloads, if_none_match: IfNoneMatch) -> Response:
    """A mask as a file, which `PUT /masks/{name}` takes."""
    stored = engine.library.get(name)
    if unchanged := _not_changed(if_none_match, stored.mask.digest):
        return unchanged
    headers = {
        "ETag": _tag(stored.mask.digest),
        "Content-Disposition": f'attachment; filename="{stored.name}{SUFFIX}"',
    }
    return downloads.answer(_file_pieces(stored), _FILE_TYPES[0], headers)


@router.put(
    "/masks/{name}",
    response_model=MaskDetails,
    responses={
        200: {**_TAGGED, "description": "The mask has replaced the one of its name"},
        201: {**_PLACED, "description": "The mask is new", "model": MaskDetails},
        **responses(400, 409, 412, 507, *ANY_ROUTE),
    },
    openapi_extra={"requestBody": {"required": True, "content": dict.fromkeys(_FILE_TYPES, _BINARY)}},
    dependencies=[NoQuery],
)
async def put_mask(
    name: NewName,
    request: Request,
    engine: Engine,
    changes: Changes,
    downloads: TheDownloads,
    if_match: IfMatch,
    if_none_match: IfNoneMatch,
) -> Response:
    """Add a mask, or replace the one of its name. The body is a mask file.

    Requests that arrive after the answer use the new mask; requests under way finish with the old one.
    """
    _require_type(request)
    content = await request.body()

    async def change() -> Response:
        # Inside the change, so that many simultaneous uploads are decoded one by one.
        stored = await asyncio.to_thread(decode_mask, name, content, source=f"mask {name!r}")
        _require(engine.library, name, if_match, if_none_match)
        is_new = not _exists(engine.library, name)
        with _disk(f"mask {name!r} was not saved"):
            await engine.put_mask(stored, save=True)
        return await downloads.make(lambda: _details(stored, is_new=is_new))

    return await changes.run(change)


@router.delete(
    "/masks/{name}",
    status_code=204,
    responses=responses(404, 409, 412, 507, *ANY_ROUTE),
    dependencies=[NoQuery],
)
async def remove_mask(
    name: Name, engine: Engine, changes: Changes, if_match: IfMatch, if_none_match: IfNoneMatch
) -> Response:
    """Remove the mask of exactly this name. Requests that use it finish with it."""

    async def change() -> None:
        if _exists(engine.library, name):
            _require(engine.library, name, if_match, if_none_match)
        with _disk(f"mask {name!r} was not removed"):
            await engine.remove_mask(name, save=True)

    await changes.run(change)
    return Response(status_code=HTTPStatus.NO_CONTENT)


def _listed(library: MaskLibrary) -> tuple[str, str]:
    """The answer of /masks, and its digest."""
    answer = MaskList(
        masks=[MaskSummary.of(stored) for stored in library.masks.values()],
        invalid=[InvalidMaskFile(name=name, reason=reason) for name, reason in library.invalid.items()],
        default_method=library.default_method,
    )
    content = answer.model_dump_json()
    # Not the library's manifest, which has neither the provenance nor the unusable files.
    return content, hashlib.sha256(content.encode()).hexdigest()


def _file_pieces(stored: StoredMask) -> Iterator[bytes]:
    content = encode_mask(stored.name, stored.mask, stored.info)
    for start in range(0, len(content), _PIECE_BYTES):
        yield content[start : start + _PIECE_BYTES]


def _require_type(request: Request) -> None:
    media_type = request.headers.get("content-type", _FILE_TYPES[0]).partition(";")[0].strip().lower()
    if media_type not in _FILE_TYPES:
        raise ApiError(
            415, "unsupported_media_type", f"a mask file is sent with Content-Type: {' or '.join(_FILE_TYPES)}"
        )


def _exists(library: MaskLibrary, name: str) -> bool:
    return name in library.masks or name in library.invalid


def _require(library: MaskLibrary, name: str, if_match: _Condition, if_none_match: _Condition) -> None:
    """Raises a 412 unless the mask of exactly this name, or its absence, meets the conditions."""
    stored = library.masks.get(name)
    digest, exists = None if stored is None else stored.mask.digest, _exists(library, name)
    if if_match and not _means(if_match, digest, exists=exists):
        message = f"If-Match does not match the current mask {name!r}"
    elif if_none_match and _means(if_none_match, digest, exists=exists, weak=True):
        message = f"If-None-Match matches the current mask {name!r}"
    else:
        return
    now = f"its digest is {digest}" if digest else "its file is invalid" if exists else "there is none"
    raise ApiError(412, "condition_failed", f"{message}: {now}", "name")


def _means(condition: list[str], digest: str | None, *, exists: bool = True, weak: bool = False) -> bool:
    """Whether a condition names the current state. weak: accept weak tags (`W/`), too."""
    tags = {tag for line in condition for tag in re.findall(rf"\*|{_TAG}", line)}
    named = digest is not None and (_tag(digest) in tags or (weak and f"W/{_tag(digest)}" in tags))
    return named or (exists and "*" in tags)


def _not_changed(condition: _Condition, digest: str) -> Response | None:
    if not condition or not _means(condition, digest, weak=True):
        return None
    return Response(status_code=HTTPStatus.NOT_MODIFIED, headers={"ETag": _tag(digest)})


def _tag(digest: str) -> str:
    return f'"{digest}"'


def _json(content: str, digest: str) -> Response:
    return Response(content, media_type="application/json", headers={"ETag": _tag(digest)})


def _details(stored: StoredMask, *, is_new: bool = False) -> Response:
    response = _json(MaskDetails.of(stored).model_dump_json(), stored.mask.digest)
    if is_new:
        response.status_code = HTTPStatus.CREATED
        response.headers["Location"] = f"/masks/{stored.name}"
    return response


@contextmanager
def _disk(failure: str) -> Iterator[None]:
    """Answer an OSError with a 507 that does not show the path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or "the disk fails"
        raise ApiError(507, "mask_not_saved", f"{failure} and nothing has changed: {reason}") from error
