"""Shards: parts of the documents, each measured in this process or by a Ray worker."""

import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from relevance.encoding import EncodedDocuments, batches
from relevance.method import Measured, MethodError, Units
from relevance.model import load_model
from relevance.model_passes import ModelPasses
from relevance.progress import Done, Progress
from relevance.random_tokens import KEY

RETRIES = 3
_POLL_S = 0.5
_CONNECT_S = 10.0
_OBJECT_STORE_BYTES = 100 * 2**20


class WorkerError(ValueError):
    """Ray is missing, cannot be reached, or has lost a worker more often than it is restarted."""


@dataclass(frozen=True)
class Job:
    """The common settings of all shards: how to load the model, what to measure, and where to save progress.

    on_random: what to measure on random tokens instead of `kinds`.
    """

    checkpoint: Path
    dtype: torch.dtype
    device: torch.device
    kinds: tuple[type[Measured], ...]
    units: Units
    batch_tokens: int
    checkpointing: bool
    progress: Progress | None
    on_random: tuple[type[Measured], ...] = ()

    def instances(self, language: str) -> list[Measured]:
        """New methods for one language, without observations."""
        kinds = self.on_random if language == KEY else self.kinds
        return [kind(self.units, self.device) for kind in kinds]


@dataclass(frozen=True)
class Shard:
    """A part of the documents. documents: language -> token ids; a language without a document is left out."""

    index: int
    documents: Mapping[str, Sequence[list[int]]]


def deal(documents: Mapping[str, EncodedDocuments], shards: int) -> list[Shard]:
    """Distributes every language's documents one by one, longest first, so that shards have similar amounts of work."""
    ordered = {language: sorted(of.token_ids, key=len, reverse=True) for language, of in documents.items()}
    dealt = [{language: ids[index::shards] for language, ids in ordered.items()} for index in range(shards)]
    return [Shard(index, {lang: ids for lang, ids in of.items() if ids}) for index, of in enumerate(dealt)]


def measure_shard(
    job: Job, shard: Shard, advance: Callable[[int], None] = lambda documents: None
) -> Iterator[tuple[str, list[Measured]]]:
    """Measure one language after the other; yields each with its methods, which have seen all documents of the shard.

    Continues after the last batch in the progress. advance: called with the number of further documents that are done,
    also by earlier runs.
    """
    with ModelPasses(load_model(job.checkpoint, job.dtype, job.device), job.checkpointing) as passes:
        for language, documents in shard.documents.items():
            methods = job.instances(language)
            done = job.progress.load(shard.index, language, methods) if job.progress else Done()
            advance(done.documents)
            for number, batch in enumerate(batches(documents, job.batch_tokens, passes.device)):
                if number < done.batches:
                    continue
                passes.run(batch, methods)
                documents_done = done.documents + batch.documents
                done = done.model_copy(update={"batches": number + 1, "documents": documents_done})
                if job.progress:
                    done = job.progress.save(shard.index, language, done, methods)
                advance(batch.documents)
            yield language, methods


def merged(job: Job, shards: Sequence[Shard]) -> Iterator[tuple[str, list[Measured]]]:
    """The results of finished shards, from their progress, one language after the other.

    Raises WorkerError for a shard whose progress is not complete.
    """
    assert job.progress is not None
    for language in dict.fromkeys(language for shard in shards for language in shard.documents):
        whole = job.instances(language)
        for shard in shards:
            if language not in shard.documents:
                continue
            part = job.instances(language)
            done = job.progress.load(shard.index, language, part)
            if done.documents != len(shard.documents[language]):
                raise WorkerError(
                    f"{job.progress.directory} has {done.documents} of {len(shard.documents[language])} documents of "
                    f"{language} in shard {shard.index}; workers must write to a file system that is seen here too"
                )
            for method, other in zip(whole, part, strict=True):
                method.merge(other)
        yield language, whole


def measure_with_ray(
    job: Job, shards: Sequence[Shard], address: str | None, advance: Callable[[int], None] = lambda documents: None
) -> Iterator[tuple[str, list[Measured]]]:
    """Like `measure_shard`, for all shards at once, each in a Ray task that is restarted if its worker dies.

    address: of a Ray cluster, or None for one on this machine alone. Workers return their results through the progress.
    On a cluster, its directory and the checkpoint must be on a file system that all machines share.

    Raises WorkerError, MethodError for a job without progress, and what `measure_shard` raises.
    """
    if job.progress is None:
        raise MethodError("workers need a directory for their progress")
    ray = _import_ray()
    started = not ray.is_initialized()
    try:
        if started:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            _init(ray, address, max(cores, len(shards)))
        cpus, gpus = _share(ray, len(shards), job.device)
        work = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(_work)
        _wait(ray, [work.remote(job, shard, cpus) for shard in shards], job.progress, advance)
    finally:
        if started:
            ray.shutdown()
    yield from merged(job, shards)


def _share(ray: Any, shards: int, device: torch.device) -> tuple[int, float]:
    """Cores and GPUs of one of so many tasks: its share of the cluster, and at most as many as the largest node has."""
    cluster = ray.cluster_resources()
    largest = max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
    cpus = max(1, int(min(cluster.get("CPU", 1) // shards, largest)))
    return cpus, min(1.0, cluster.get("GPU", 0) / shards) if device.type == "cuda" else 0.0


def _work(job: Job, shard: Shard, threads: int) -> None:
    torch.set_num_threads(threads)
    for _ in measure_shard(job, shard):
        pass


def _wait(ray: Any, tasks: list[Any], progress: Progress, advance: Callable[[int], None]) -> None:
    heard = 0
    pending = tasks
    try:
        while pending:
            ready, pending = ray.wait(pending, num_returns=1, timeout=_POLL_S)
            ray.get(ready)
            documents = progress.documents()
            advance(documents - heard)
            heard = documents
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise WorkerError(f"a worker was lost {RETRIES + 1} times: {str(error).splitlines()[0]}") from error


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise WorkerError("several workers need Ray, which is not installed; expected `pip install ray`") from error
    return ray


def _init(ray: Any, address: str | None, cpus: int) -> None:
    if address is not None:
        _require_answer(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address=address or "local", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise WorkerError(f"Ray cannot be reached or started: {str(error).splitlines()[0]}") from error


def _require_answer(address: str) -> None:
    """Check that the cluster answers: Ray itself would wait minutes for one that does not exist."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto", say
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise WorkerError(f"no Ray cluster answers at {address}: {error}") from error
