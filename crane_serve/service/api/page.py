"""The files of the playground, to be read without a key."""

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from crane_serve.service.api.errors import ApiError
from crane_serve.service.playground import FILES, HEADERS, ROUTE


async def _file(request: Request) -> Response:
    request.scope["crane_route"] = ROUTE
    if "mask" in request.query_params:  # of a client that puts a path behind an address ending in `?mask=`
        message = "the page takes no mask; where a path follows the address, name the mask in the model: MODEL:MASK"
        raise ApiError(422, "malformed_query", message, "mask")
    file = FILES.get(request.scope["path"])
    if file is None:  # a route's pattern also matches its path with a line break behind it
        raise HTTPException(404)
    return Response(file.content, media_type=file.media_type, headers=HEADERS)


router = APIRouter(include_in_schema=False)
for path in FILES:
    router.add_api_route(path, _file, methods=["GET", "HEAD"])
