"""Cores: the engine's processes, as the front end calls our own methods in them."""

from typing import Any

from crane_serve.engine.answers import EngineDead


class Cores:
    """The engine cores of an asynchronous engine of vLLM."""

    def __init__(self, engine: Any) -> None:
        self._client = engine.engine_core

    async def tell(self, method: str, *arguments: Any) -> None:
        """Call a method in every engine core. Raises EngineDead, and what the method raises."""
        await self._call(self._client.call_utility_async, method, *arguments)

    async def ask(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method in every engine core, for what each answers. Raises as `tell` does."""
        return list(await self._call(self._client.call_utility_all_async, method, *arguments))

    @staticmethod
    async def _call(call: Any, *arguments: Any) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return await call(*arguments)
        except EngineDeadError as error:
            raise EngineDead("the engine has died") from error
