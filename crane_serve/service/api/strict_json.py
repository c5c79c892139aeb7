"""StrictJson: routes whose bodies have no name twice. Of two masks, or two lists of a layer, only one would be read."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from crane_serve.common.unique_names import RepeatedName, unique_names


class StrictJson(APIRoute):
    """A route that refuses a body with a repeated name, as it refuses what is no JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, given a request that reads its body so."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_Request(request.scope, request.receive))

        return handle_strictly


class _Request(Request):
    async def json(self) -> Any:
        try:
            return json.loads(await self.body(), object_pairs_hook=unique_names)
        except RepeatedName as error:
            raise json.JSONDecodeError(str(error), "", 0) from None
