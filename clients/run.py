"""Run: every item under every mask, asked in one mixed stream, resumably."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from clients.answers import MaskReference, Readiness, Usage
from clients.client import AsyncCraneClient
from clients.errors import CraneError, EvaluationError
from clients.evaluation import UNMASKED, Evaluation, Failure, PlannedMask
from clients.plan import Plan, matching
from clients.planned_masks import find_masks
from clients.record import Record
from clients.results import ItemResult, ResultLog, Settings, short, write_items
from clients.task import Generate, Generated, Item, Question, ScoreContinuations, Scored, ScoreText

_FAILED_DEPENDENCY = 424
_RETURNS = 3  # how often one item waits for a server that went away
_SEQUENCES = 1024  # under way at a time; half of what a server admits by default

_Answered = tuple[Scored | Generated, MaskReference | None, Usage]
Expectation = Callable[[Settings, Mapping[str, Mapping[str, tuple[Item, ...]]]], None]


@dataclass(frozen=True)
class Progress:
    """How far a run is. done: items with an answer, `resumed` of them from earlier sessions; failed: asked in vain;
    tokens: read and written by the model in this session."""

    done: int
    total: int
    resumed: int
    failed: int
    tokens: int


class Run:
    """One session of an evaluation: `async for result in run` asks what is missing and hands out what comes.

    Made by `start`. Afterwards `evaluation` makes figures of all that is there, and `failures` lists the items that got
    no answer in spite of the client's retries; the next session asks them again.
    """

    def __init__(
        self,
        client: AsyncCraneClient,
        settings: Settings,
        plan: Plan,
        items: Mapping[str, Mapping[str, tuple[Item, ...]]],
        log: ResultLog,
        wait_s: float,
        on_notice: Callable[[str], None],
    ) -> None:
        self.failures: list[Failure] = []
        self._client = client
        self._settings = settings
        self._plan = plan
        self._items = items
        self._log = log
        self._wait_s = wait_s
        self._notice = on_notice
        self._tasks = {task.name: task for task in plan.tasks}
        questions = list(_questions(settings.task_masks, items))
        self._missing = [question for question, _ in questions if question not in log.results]
        self._by_question = dict(questions)
        self._total = len(questions)
        self._resumed = self._total - len(self._missing)
        self._tokens = 0
        self._room = _Room(_SEQUENCES)
        self._recovery = asyncio.Lock()
        self._recoveries = 0
        self._given_up: str | None = None
        self._start = time.monotonic()

    @classmethod
    @asynccontextmanager
    async def start(
        cls,
        client: AsyncCraneClient,
        plan: Plan,
        out: Path,
        *,
        base: Path = Path(),
        wait_s: float = 60.0,
        expect: Expectation | None = None,
        on_notice: Callable[[str], None] = lambda _: None,
    ) -> AsyncIterator["Run"]:
        """Check everything, then open the results in `out`, which may hold an unfinished run; closed at the end.

        base: what relative paths of the plan start from; wait_s: how long to wait for the server, now and whenever it
        goes away; expect: further checks before anything is asked; on_notice: hears when the server goes and comes.

        Raises EvaluationError before anything is asked for sources that cannot be read, a server of another model,
        masks that the server lacks, and results in `out` that are another run's; CraneError if the server is not ready
        in time.
        """
        items = plan.load(base)
        readiness = await client.wait_until_ready(wait_s)
        if plan.model not in (None, readiness.model):
            raise EvaluationError(
                f"the server at {client.server} serves {readiness.model!r}, the plan is for {plan.model!r}"
            )
        settings = _settle(plan, readiness, await find_masks(client, plan))
        if expect is not None:
            expect(settings, items)
        digests = {question: item.digest for question, item in _questions(settings.task_masks, items)}
        with ResultLog(out, settings, digests.get) as log:
            write_items(out, items)
            yield cls(client, settings, plan, items, log, wait_s, on_notice)

    @property
    def progress(self) -> Progress:
        """How far it is."""
        failed = len(self.failures)
        answered = len(self._log.results)
        return Progress(answered, self._total, self._resumed, failed, self._tokens)

    async def __aiter__(self) -> AsyncGenerator[ItemResult]:
        """The answers of this session as they come, each kept on the disk before it is handed out.

        Raises EvaluationError if the server comes back with another model or other masks.
        """
        stream = iter(self._missing)
        finished: asyncio.Queue[ItemResult | Exception | None] = asyncio.Queue()

        async def work_all() -> None:
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(min(self._client.concurrency, len(self._missing))):
                        workers.create_task(self._work(stream, finished))
                finished.put_nowait(None)
            except ExceptionGroup as group:
                evaluation_errors, _ = group.split(EvaluationError)
                finished.put_nowait(evaluation_errors.exceptions[0] if evaluation_errors else group)

        workers = asyncio.create_task(work_all())
        try:
            while (result := await finished.get()) is not None:
                if isinstance(result, Exception):
                    raise result
                yield result
        finally:
            workers.cancel()
            await asyncio.gather(workers, return_exceptions=True)

    def evaluation(self) -> Evaluation:
        """The figures of all answers that there are."""
        return self.record().evaluation(self.failures)

    def record(self) -> Record:
        """All answers that there are, with what was asked."""
        return Record(self._settings, self._plan, self._items, tuple(self._log.results.values()))

    async def _work(self, stream: Iterator[Question], finished: asyncio.Queue[ItemResult | Exception | None]) -> None:
        for question in stream:
            item = self._by_question[question]
            try:
                result = await self._ask(question, item)
            except CraneError as error:
                fields = {"task": question.task, "mask": question.mask, "language": question.language}
                self.failures.append(Failure(**fields, item=question.item, error=str(error)))
            else:
                self._log.append(result)
                self._tokens += result.tokens
                finished.put_nowait(result)

    async def _ask(self, question: Question, item: Item) -> ItemResult:
        """One item; a server that went away is waited for."""
        for _ in range(_RETURNS):
            if self._given_up is not None:
                raise CraneError(None, "not_asked", f"not asked, because {self._given_up}")
            recoveries = self._recoveries
            try:
                return await self._answer(question, item)
            except CraneError as error:
                if not error.transient:
                    raise
                await self._recover(error, recoveries)
        return await self._answer(question, item)

    async def _recover(self, cause: CraneError, recoveries: int) -> None:
        """Wait until the server serves again; once for all workers that noticed its absence."""
        async with self._recovery:
            if self._recoveries > recoveries or self._given_up is not None:
                return
            gone = cause.status != 429
            if gone:
                self._notice(f"the server does not answer ({cause.message}); waiting up to {self._wait_s:g} s for it")
            began = time.monotonic()
            try:
                readiness = await self._client.wait_until_ready(self._wait_s)
            except CraneError as error:
                self._given_up = f"the server did not come back within {self._wait_s:g} s: {error}"
                raise
            if readiness.fingerprint != self._settings.fingerprint:
                raise EvaluationError(
                    f"the server now serves another model ({readiness.model}) than when the run began "
                    f"({self._settings.model})"
                )
            self._recoveries += 1
            if gone:
                self._notice(f"the server is back after {time.monotonic() - began:.0f} s; the run goes on")

    async def _answer(self, question: Question, item: Item) -> ItemResult:
        mask = self._settings.masks[question.mask]
        async with self._room.taken(_sequences(item)):
            answer, used, usage = await self._send(item, None if question.mask == UNMASKED else question.mask)
        digest = used.digest if used is not None else None
        if digest != mask.digest:
            raise EvaluationError(
                f"the server answered for mask {question.mask!r} with content {short(digest)}, expected "
                f"{short(mask.digest)}: it was changed during the run"
            )
        try:
            answer = await self._tasks[question.task].finish(item, answer)
        except CraneError as error:  # of a judge, say, after its own retries: the server is not to be waited for
            raise CraneError(_FAILED_DEPENDENCY, "answer_not_completed", error.message) from error
        return ItemResult(
            task=question.task,
            language=question.language,
            item=question.item,
            mask=question.mask,
            mask_digest=mask.digest,
            item_digest=item.digest,
            answer=answer,
            tokens=usage.total_tokens,
            session=self._log.session,
            elapsed_s=round(time.monotonic() - self._start, 3),
        )

    async def _send(self, item: Item, mask: str | None) -> _Answered:
        match item.request:
            case ScoreText(text, add_bos):
                scores = await self._client.score_text(text, mask=mask, add_bos=add_bos)
                if len(scores.scores) != 1 or scores.scores[0].tokens < 1:
                    raise _unexpected(f"one score of at least one token, got {len(scores.scores)} scores")
                return Scored(scores=scores.scores), scores.mask, scores.usage
            case ScoreContinuations(context, continuations, add_bos, join):
                scores = await self._client.score_continuations(
                    context, continuations, mask=mask, add_bos=add_bos, join=join
                )
                if len(scores.scores) != len(continuations):
                    raise _unexpected(f"{len(continuations)} scores, got {len(scores.scores)}")
                return Scored(scores=scores.scores), scores.mask, scores.usage
            case Generate(prompt, max_tokens, stop, repetition_penalty, add_bos):
                generation = await self._client.generate(
                    prompt,
                    mask=mask,
                    max_tokens=max_tokens,
                    temperature=0.0,
                    stop=list(stop),
                    repetition_penalty=repetition_penalty,
                    add_bos=add_bos,
                )
                if len(generation.outputs) != 1:
                    raise _unexpected(f"one output, got {len(generation.outputs)}")
                (output,) = generation.outputs
                answer = Generated(
                    text=output.text, tokens=output.completion_tokens, finish_reason=output.finish_reason
                )
                return answer, generation.mask, generation.usage


async def evaluate(
    client: AsyncCraneClient,
    plan: Plan,
    out: Path,
    *,
    base: Path = Path(),
    wait_s: float = 60.0,
    expect: Expectation | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_notice: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Run a plan to its end and write results.json and the reports into `out`. Arguments and errors: `Run.start`."""
    from clients.reporting import write_all

    async with Run.start(client, plan, out, base=base, wait_s=wait_s, expect=expect, on_notice=on_notice) as run:
        on_progress(run.progress)
        async with aclosing(aiter(run)) as results:
            async for _ in results:
                on_progress(run.progress)
        on_progress(run.progress)
        record, failures = run.record(), run.failures
    evaluation = await asyncio.to_thread(record.evaluation, failures)
    evaluation.write(out)
    write_all(evaluation, record.answers, out)
    return evaluation


class _Room:
    """So many sequences may be under way; a request that has more than all of them runs alone."""

    def __init__(self, capacity: int) -> None:
        self._capacity = self._free = capacity
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def taken(self, count: int) -> AsyncIterator[None]:
        count = min(count, self._capacity)
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield
        finally:
            async with self._changed:
                self._free += count
                self._changed.notify_all()


def _sequences(item: Item) -> int:
    return len(item.request.continuations) if isinstance(item.request, ScoreContinuations) else 1


def _unexpected(what: str) -> CraneError:
    return CraneError(200, "invalid_answer", f"expected {what}")


def _settle(plan: Plan, readiness: Readiness, masks: dict[str, PlannedMask]) -> Settings:
    of_tasks = {}
    for task in plan.tasks:
        names = list(masks) if task.masks is None else matching([UNMASKED, *task.masks], masks)
        for pattern in task.masks or ():
            if not matching([pattern], masks):
                raise EvaluationError(
                    f"task {task.name!r}: no mask of the plan fits {pattern!r}; it has {', '.join(masks)}"
                )
        of_tasks[task.name] = tuple(names)
    return Settings(
        plan=plan.content(),
        model=readiness.model,
        fingerprint=readiness.fingerprint,
        server_version=readiness.version,
        prompt_start=readiness.prompt_start,
        text_start=readiness.text_start,
        masks=masks,
        task_masks=of_tasks,
    )


def _questions(
    task_masks: Mapping[str, tuple[str, ...]], items: Mapping[str, Mapping[str, tuple[Item, ...]]]
) -> Iterator[tuple[Question, Item]]:
    """Task by task, item by item through all languages, the masks innermost.

    Neighbours differ in their mask, so whatever the server batches together holds all masks alike; items that share a
    prefix stay close together under each mask.
    """
    for task, languages in items.items():
        for row in zip_longest(*languages.values()):
            for item in row:
                if item is not None:
                    for mask in task_masks[task]:
                        yield Question(task, item.language, item.id, mask), item
