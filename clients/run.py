"""evaluate: score every document under every mask, resumably, and write the matrix."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clients.answers import MaskListing, Readiness
from clients.client import AsyncCraneClient
from clients.errors import CraneError, EvaluationError
from clients.matrix import Failure, Matrix
from clients.plan import UNMASKED, Item, Plan, PlannedMask, text_digest
from clients.report import write_all
from clients.results import ItemResult, ResultLog, Settings
from relevance.corpus import Corpus


@dataclass(frozen=True)
class Progress:
    """How far a run is. done: items with a result or a failure, `resumed` of them from earlier sessions; tokens:
    scored in this session."""

    done: int
    total: int
    resumed: int
    tokens: int


async def evaluate(
    client: AsyncCraneClient,
    corpus: Corpus,
    out: Path,
    *,
    masks: Sequence[str] | None = None,
    limit: int | None = None,
    wait_s: float = 60.0,
    seed: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
) -> Matrix:
    """Score `corpus` under every mask and write results.jsonl, matrix.json, matrix.csv, matrix.png and report.md.

    masks: names, or bare languages where the server has a default method; None for all masks of the server. `none`
    is always evaluated. limit: documents per language. wait_s: how long to wait for the server, at the start and
    when it stops answering in between. seed: of the bootstrap. `out` may hold an unfinished run, which is continued.

    Items that fail in spite of the client's retries are listed in `Matrix.failed`. Raises CraneError if the server
    is not ready in time, and EvaluationError for masks it does not have, for results in `out` that belong to another
    corpus, model or mask content, and for a server that changes its model or a mask during the run.
    """
    readiness = await client.wait_until_ready(wait_s)
    plan = Plan(corpus, await _find_masks(client, masks), limit)
    settings = Settings(
        corpus_digest=corpus.digest,
        split=corpus.split,
        languages=corpus.languages,
        limit=limit,
        masks={name: mask.digest for name, mask in plan.masks.items()},
        model=readiness.model,
        fingerprint=readiness.fingerprint,
        server_version=readiness.version,
    )
    with ResultLog(out, settings) as log:
        run = _Run(client, plan, log, readiness, wait_s, on_progress)
        await run.finish()
        matrix = Matrix.of(
            plan,
            log.results,
            model={"name": readiness.model, **readiness.fingerprint},
            failed=run.failures,
            seed=seed,
        )
    write_all(matrix, out)
    return matrix


class _Run:
    """The scoring of one session: as many workers as the client allows requests draw from one stream of items."""

    def __init__(
        self,
        client: AsyncCraneClient,
        plan: Plan,
        log: ResultLog,
        readiness: Readiness,
        wait_s: float,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.failures: list[Failure] = []
        self._client = client
        self._plan = plan
        self._log = log
        self._readiness = readiness
        self._wait_s = wait_s
        self._on_progress = on_progress
        self._missing = [item for item in plan.items() if item not in log.results]
        self._resumed = len(plan) - len(self._missing)
        self._answered = 0
        self._tokens = 0
        self._given_up: str | None = None
        self._start = time.monotonic()

    async def finish(self) -> None:
        """Ask for everything that is missing."""
        self._report()
        stream = iter(self._missing)
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(self._client.concurrency, len(self._missing))):
                    workers.create_task(self._work(stream))
        except ExceptionGroup as group:
            evaluation_errors, _ = group.split(EvaluationError)
            if evaluation_errors is None:
                raise
            raise evaluation_errors.exceptions[0] from None

    async def _work(self, stream: Iterator[Item]) -> None:
        for item in stream:
            try:
                if self._given_up is not None:
                    raise CraneError(None, "not_asked", f"not asked, because {self._given_up}")
                result = await self._ask(item)
            except CraneError as error:
                self.failures.append(
                    Failure(mask=item.mask, language=item.language, document=item.document, error=str(error))
                )
            else:
                self._log.append(result)
                self._answered += 1
                self._tokens += result.tokens
            self._report()

    async def _ask(self, item: Item) -> ItemResult:
        """One item; a server that went away is waited for and then asked once more."""
        try:
            return await self._score(item)
        except CraneError as error:
            if not error.transient:
                raise
        try:
            readiness = await self._client.wait_until_ready(self._wait_s)
        except CraneError as error:
            self._given_up = f"the server did not come back within {self._wait_s:g} s: {error}"
            raise
        if readiness.fingerprint != self._readiness.fingerprint:
            raise EvaluationError(
                f"the server now serves another model ({readiness.model}) than when the run began "
                f"({self._readiness.model})"
            )
        return await self._score(item)

    async def _score(self, item: Item) -> ItemResult:
        mask = self._plan.masks[item.mask]
        text = self._plan.text(item)
        answer = await self._client.score_text(text, mask=None if item.mask == UNMASKED else item.mask)
        digest = answer.mask.digest if answer.mask is not None else None
        if digest != mask.digest:
            raise EvaluationError(
                f"the server answered for mask {item.mask!r} with content {digest}, expected {mask.digest}: "
                "it was changed during the run"
            )
        if len(answer.scores) != 1 or answer.scores[0].tokens < 1:
            raise CraneError(
                200,
                "invalid_answer",
                f"expected one score of at least one token for one text, got {len(answer.scores)} scores"
                + "".join(f", {score.tokens} tokens" for score in answer.scores[:1]),
            )
        score = answer.scores[0]
        return ItemResult(
            mask=item.mask,
            mask_digest=mask.digest,
            language=item.language,
            document=item.document,
            text_digest=text_digest(text),
            logprob=score.logprob,
            tokens=score.tokens,
            bytes=score.bytes,
            session=self._log.session,
            elapsed_s=round(time.monotonic() - self._start, 3),
        )

    def _report(self) -> None:
        if self._on_progress is not None:
            done = self._resumed + self._answered + len(self.failures)
            self._on_progress(Progress(done, len(self._plan), self._resumed, self._tokens))


async def _find_masks(client: AsyncCraneClient, names: Sequence[str] | None) -> list[PlannedMask]:
    """The masks that `names` mean on the server, by canonical name, each once. Raises EvaluationError for others."""
    listing = await client.masks()
    if names is None:
        return [PlannedMask.of(summary) for summary in listing.masks]
    known = {summary.name: PlannedMask.of(summary) for summary in listing.masks}
    found: dict[str, PlannedMask] = {}
    for name in names:
        if name == UNMASKED:
            continue
        mask = known.get(name) or await _default_mask(client, name, listing)
        found[mask.name] = mask
    return list(found.values())


async def _default_mask(client: AsyncCraneClient, name: str, listing: MaskListing) -> PlannedMask:
    for unusable in listing.invalid:
        if unusable.name == name:
            raise EvaluationError(f"mask {name!r} cannot be used by the server: {unusable.reason}")
    try:
        return PlannedMask.of(await client.mask(name))
    except CraneError as error:
        if error.status != 404:
            raise
        known = ", ".join([UNMASKED, *(summary.name for summary in listing.masks)])
        hint = "" if listing.default_method else "; bare language names need a server with a default method"
        raise EvaluationError(f"the server has no mask {name!r}; it has {known}{hint}") from error
