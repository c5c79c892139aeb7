"""Evaluations without asyncio: one call that runs a plan, and an iterator over its answers."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

from clients.client import AsyncCraneClient
from clients.evaluation import Evaluation
from clients.permissions import Permissions
from clients.plan import Plan
from clients.results import ItemResult
from clients.run import Run, evaluate
from crane_serve.common.defaults import DEFAULT_SERVER

CONCURRENCY = 64


def run_evaluation(
    plan: Plan,
    out: Path,
    *,
    server: str = DEFAULT_SERVER,
    base: Path = Path(),
    concurrency: int = CONCURRENCY,
    wait_s: float = 60.0,
    allowed: Permissions | None = None,
) -> Evaluation:
    """Run a plan to its end, or continue an unfinished run, and write results.json and the reports into `out`.

    Must not be called in a running event loop. Arguments and errors: `clients.run.Run.start`.
    """

    async def run() -> Evaluation:
        async with AsyncCraneClient(server, concurrency=concurrency) as client:
            return await evaluate(client, plan, out, base=base, wait_s=wait_s, allowed=allowed)

    return asyncio.run(run())


def iterate_answers(
    plan: Plan,
    out: Path,
    *,
    server: str = DEFAULT_SERVER,
    base: Path = Path(),
    concurrency: int = CONCURRENCY,
    wait_s: float = 60.0,
    allowed: Permissions | None = None,
) -> Iterator[ItemResult]:
    """The missing answers of a plan, one by one. Each is already saved in `out`, so the iteration can stop at any time.

    Requests run only while the iterator waits for the next answer. Arguments and errors: `clients.run.Run.start`.
    """
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()

        async def start() -> Run:
            client = await stack.enter_async_context(AsyncCraneClient(server, concurrency=concurrency))
            return await stack.enter_async_context(
                Run.start(client, plan, out, base=base, wait_s=wait_s, allowed=allowed)
            )

        async def end() -> None:
            await results.aclose()

        try:
            results = aiter(runner.run(start()))
            try:
                while (result := runner.run(_next(results))) is not None:
                    yield result
            finally:
                runner.run(end())
        finally:
            runner.run(stack.aclose())


async def _next(results: AsyncGenerator[ItemResult]) -> ItemResult | None:
    return await anext(results, None)
