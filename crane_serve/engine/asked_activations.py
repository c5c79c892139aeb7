"""AskedActivations: values of neurons, from the request that asks for them to its answer."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from crane_serve.common.masks import Fingerprint
from crane_serve.engine.activations import (
    MAX_REQUESTS,
    TAKE_METHOD,
    ActivationRequest,
    Activations,
    ActivationsBusy,
    ActivationsOff,
    joined,
)
from crane_serve.engine.answers import EngineDead, FailedRequest
from crane_serve.engine.config import MaskConfig
from crane_serve.engine.cores import Cores


class AskedActivations:
    """The requests of an engine that ask for activations. fingerprint: of its model."""

    def __init__(self, config: MaskConfig, fingerprint: Fingerprint, cores: Cores) -> None:
        self._config = config
        self._fingerprint = fingerprint
        self._cores = cores
        self._running = 0

    def require(self, asked: ActivationRequest | None, prompt: int, most: int) -> None:
        """Raise ActivationsOff if some are asked for and the engine keeps none, ActivationsError for others that cannot
        be had. prompt: its tokens; most: that can be computed."""
        if asked is None:
            return
        if not self._config.activations:
            raise ActivationsOff("the server was started without activations; `crane serve --activations` has them")
        if asked.of_gates and not self._config.gates:
            raise ActivationsOff("the server was started without act(gate) and up; `crane serve --gates` has them")
        asked.require(self._fingerprint, prompt, most)

    @asynccontextmanager
    async def kept(
        self, asked: ActivationRequest | None, parameters: dict[str, Any]
    ) -> AsyncIterator[Callable[[int], Coroutine[Any, Any, Activations | None]]]:
        """Have a request with `parameters` keep its activations, if any are asked for; gives the function that takes
        those of so many tokens. What is not taken is forgotten. They were required before.

        Raises ActivationsBusy, and FailedRequest, from the function, if some are missing.
        """
        if asked is None:

            async def nothing(computed: int) -> Activations | None:
                return None

            yield nothing
            return
        if self._running >= MAX_REQUESTS:
            raise ActivationsBusy(f"{MAX_REQUESTS} requests are asking for activations; wait for one to end")
        key = uuid.uuid4().hex
        parameters["extra_args"] = {**parameters.get("extra_args", {}), **asked.argument(key)}
        taken = False

        async def take(computed: int) -> Activations | None:
            nonlocal taken
            taken = True
            parts = await self._take(key, computed)
            if parts is None:
                raise FailedRequest("the engine does not have the activations of all tokens")
            return joined(asked, self._fingerprint.intermediate_sizes, parts)

        self._running += 1
        try:
            yield take
        finally:
            self._running -= 1
            if not taken:
                with suppress(EngineDead):  # then there is nobody left to forget
                    await asyncio.shield(self._take(key, 0))

    async def _take(self, key: str, end: int) -> list[dict[str, Any]] | None:
        """Those of the engine core that ran the request."""
        return next((of_core for of_core in await self._cores.ask(TAKE_METHOD, key, end) if of_core is not None), None)
