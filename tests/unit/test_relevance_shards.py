import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import relevance.shards
from crane_serve.common.text.corpus import Corpus, Document
from relevance.accumulators import NonFiniteError
from relevance.encoding import EncodedDocuments
from relevance.methods import find_scored
from relevance.progress import Done
from relevance.scores import Scores
from relevance.scoring import Execution, score
from relevance.shards import Job, Shard, WorkerError, deal
from relevance.shards import _work as work
from tests.tiny import tiny_model

CPU = torch.device("cpu")
ADDRESS = "RAY_ADDRESS"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No cluster of the environment, and one thread, as the workers have."""
    monkeypatch.delenv(ADDRESS, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def corpus(documents: int) -> Corpus:
    return Corpus(
        {
            language: tuple(Document(str(n), f"{text} {n} " * (1 + n % 4)) for n in range(documents))
            for language, text in {"en": "rain falls", "zh": "下雨了"}.items()
        }
    )


def scores_of(checkpoint: Path, documents: int, execution: Execution, batch_tokens: int = 200) -> Scores:
    return score(
        checkpoint,
        corpus(documents),
        find_scored(None),
        batch_tokens=batch_tokens,
        max_tokens=100,
        dtype=torch.float32,
        device=CPU,
        output_dimensions=True,
        execution=execution,
    )


def assert_same(found: Scores, expected: Scores) -> None:
    """To 1e-5 of the largest score: float32 activations differ with the batch, and kurtoses magnify that."""
    for mine, theirs in ((found.by_method, expected.by_method), (found.outputs, expected.outputs)):
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            tolerance = 1e-5 * max(1.0, tensor.abs().max().item())
            torch.testing.assert_close(mine[name], tensor, rtol=1e-5, atol=tolerance, msg=name)


def test_documents_are_dealt_out_by_length() -> None:
    documents = {"en": EncodedDocuments(([0] * 3, [0] * 9, [0] * 5, [0] * 4)), "zh": EncodedDocuments(([0, 1],))}
    shards = deal(documents, 2)
    assert [[len(ids) for ids in shard.documents["en"]] for shard in shards] == [[9, 4], [5, 3]]
    assert [list(shard.documents) for shard in shards] == [["en", "zh"], ["en"]]


@pytest.fixture
def lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of who has worked on the second shard: the first is killed when it has written its third piece."""
    lives = tmp_path / "lives"

    def work_and_die(job: Job, shard: Shard, threads: int) -> None:  # sent by value: a worker cannot import this file
        if shard.index == 1:
            with lives.open("a") as file:
                print(os.getpid(), file=file)
            if len(lives.read_text().split()) == 1:
                save = job.progress.save

                def save_and_die(*arguments: Any) -> Done:
                    done = save(*arguments)
                    if done.pieces == 3:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return done

                job.progress.save = save_and_die
        work(job, shard, threads)

    monkeypatch.setattr(relevance.shards, "_work", work_and_die)
    return lives


@pytest.mark.timeout(300)
def test_a_run_survives_the_death_of_a_worker(checkpoint: Path, tmp_path: Path, lives: Path) -> None:
    execution = Execution(workers=2, progress=tmp_path / "progress")
    found = scores_of(checkpoint, 40, execution, batch_tokens=1)
    assert len(set(lives.read_text().split())) == 2
    assert_same(found, scores_of(checkpoint, 40, Execution(), batch_tokens=1))


def test_a_cluster_that_is_not_there(checkpoint: Path) -> None:
    with pytest.raises(WorkerError, match=r"no Ray cluster answers at 127\.0\.0\.1:1: "):
        scores_of(checkpoint, 5, Execution(workers=2, ray_address="127.0.0.1:1"))


@pytest.fixture
def nodes() -> Iterator[str]:
    """The address of a cluster of four nodes, which have a core each."""
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    for _ in range(3):
        cluster.add_node(wait=False, **size)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


@pytest.mark.timeout(300)
def test_a_cluster_by_its_address(nodes: str, checkpoint: Path, tmp_path: Path) -> None:
    """Half of its cores are more than any node has."""
    execution = Execution(workers=2, ray_address=nodes, progress=tmp_path / "progress")
    assert_same(scores_of(checkpoint, 11, execution), scores_of(checkpoint, 11, Execution()))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster that is there already, so that its workers need not load everything again for each test."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()


def test_merged_shards_equal_one_process(cluster: None, checkpoint: Path, tmp_path: Path) -> None:
    done: list[int] = []
    found = score(
        checkpoint,
        corpus(11),
        find_scored(None),
        batch_tokens=200,
        max_tokens=100,
        dtype=torch.float32,
        device=CPU,
        output_dimensions=True,
        execution=Execution(workers=2),
        advance=done.append,
    )
    assert sum(done) == 22
    assert_same(found, scores_of(checkpoint, 11, Execution()))


def test_errors_of_workers_are_those_of_this_process(cluster: None, tmp_path: Path) -> None:
    checkpoint = tiny_model("llama", tmp_path / "model")
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].fill_(torch.nan)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match="layer 1: activations are not finite"):
        scores_of(checkpoint, 5, Execution(workers=2))
