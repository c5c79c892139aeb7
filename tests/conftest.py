"""Session fixtures. Engines take long to start, so the ones a session needs start together, behind the quick tests."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import tests.tiny
from crane_serve.common.masks import MaskLibrary
from tests.architectures import SHORT_LIST, tiny_checkpoint
from tests.engines import Oracle, Server, add_output_mask, random_masks
from tests.jobs import Jobs
from tests.tiny import FAMILIES, add_token_beyond, tiny_model

GEMMA = Path(__file__).parent.parent / "models" / "gemma-3-270m"
TINY_CHUNK_TOKENS = 64
# As `crane serve` does: vLLM 0.32 cannot load what it has compiled ahead of time for a CPU.
os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")

TINY_FLAGS = ("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8", "--block-size", "32")
TINY_FLAGS += ("--max-num-batched-tokens", str(TINY_CHUNK_TOKENS))
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
# Token ids in place of texts, for which random models need not have any.
OPENAI_FLAGS = ("--chat-template", TEMPLATE, "--return-tokens-as-token-ids", "--enable-scale-out")
TOOL_FLAGS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
RANKS = {
    "tensor parallel": ("--tensor-parallel-size", "2", "--enforce-eager"),
    "data parallel": ("--data-parallel-size", "2", "--enforce-eager"),
    # vLLM 0.32 on the CPU makes the buffers between stages only where it compiles.
    "pipeline parallel": ("--pipeline-parallel-size", "2"),
}


@dataclass(frozen=True)
class Tiny:
    """A tiny random Llama in float32 with three masks."""

    checkpoint: Path
    masks: Path
    library: MaskLibrary


class Engines:
    """The engine processes of a session, by the name of the fixture that needs them."""

    def __init__(self, directory: Path, kept: Path, wanted: set[str]) -> None:
        """kept: what outlives the session."""
        self.directory = directory
        checkpoint, masks = _kept_checkpoint(kept), directory / "tiny-masks"
        self.tiny = Tiny(checkpoint, masks, random_masks(checkpoint, masks, share=0.4))
        self.output_masks = directory / "tiny-output-masks"
        self.output_library = add_output_mask(self.tiny.library, self.output_masks)
        (masks / "corrupt.safetensors").write_bytes(b"not a mask")
        random_masks(tiny_model("llama", directory / "other", seed=1), directory / "other-masks", share=0.1)
        shutil.copy(directory / "other-masks" / "attnlrp-zh.safetensors", masks / "foreign.safetensors")
        self.servers: dict[str, Server] = {}
        if "gemma_server" in wanted:
            gemma_masks = directory / "gemma-masks"
            random_masks(GEMMA, gemma_masks, share=0.05)
            flags = ("--max-model-len", "1024", "--max-num-seqs", "16")
            self.servers["gemma_server"] = Server.of(
                GEMMA, gemma_masks, directory / "gemma.log", *flags, core=1 % (os.cpu_count() or 1)
            )
        if "tiny_server" in wanted:
            flags = (*TINY_FLAGS, "--enforce-eager", "--inline-masks", "--gates", *OPENAI_FLAGS, *TOOL_FLAGS)
            # vLLM's own variable for keys is not ours.
            keys = {"VLLM_API_KEY": "not asked for"}
            self.servers["tiny_server"] = Server.of(checkpoint, masks, directory / "tiny.log", *flags, core=0, **keys)
        self.jobs = Jobs(directory)
        self._add_jobs(wanted)

    def _add_jobs(self, wanted: set[str]) -> None:
        scripts = Path(__file__).parent / "engine"
        here = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        in_process = {**here, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

        if "baseline" in wanted:
            out = self.directory / "baseline.json"
            environment = {"VLLM_PLUGINS": "", "VLLM_CPU_KVCACHE_SPACE": "1"}
            self.jobs.add("baseline", scripts / "baseline.py", self.tiny.checkpoint, out, **environment)
        if wanted & {"families", "eager_idle"}:
            checkpoints = self.directory / "families"
            checkpoints.mkdir()
            (checkpoints / "tiny").symlink_to(self.tiny.checkpoint)
            (checkpoints / "tiny-masks").symlink_to(self.tiny.masks)
            for family in FAMILIES:
                made = tiny_model(family, checkpoints / family)
                random_masks(made, checkpoints / f"{family}-masks", share=0.4, offsets=True)
            for name in SHORT_LIST:
                made = tiny_checkpoint(name, checkpoints / name)
                random_masks(made, checkpoints / f"{name}-masks", share=0.4, offsets=True)
            self.jobs.add(
                "families", scripts / "families.py", checkpoints, checkpoints / "answers.json", "gates", **in_process
            )
        for ranks, flags in RANKS.items() if "over_ranks" in wanted else ():
            out, foreign = self.directory / f"{ranks}.json", self.directory / "other-masks" / "attnlrp-zh.safetensors"
            arguments = (self.tiny.checkpoint, self.tiny.masks, out, foreign, *TINY_FLAGS, *flags)
            environment = {**here, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
            self.jobs.add(ranks, scripts / "run_service.py", *arguments, **environment)

    def stop(self) -> None:
        self.jobs.stop()
        for server in self.servers.values():
            server.stop()


def _kept_checkpoint(directory: Path) -> Path:
    """The tiny Llama, at the same place in every session: vLLM finds what it has compiled for it before."""
    made_by = hashlib.sha256(Path(tests.tiny.__file__).read_bytes()).hexdigest()[:16]
    checkpoint = directory / made_by / "tiny"
    if not checkpoint.exists():
        with tempfile.TemporaryDirectory(dir=directory) as making:
            add_token_beyond(tiny_model("llama", Path(making) / made_by / "tiny"))
            (Path(making) / made_by).rename(checkpoint.parent)
    return checkpoint


_ENGINES = pytest.StashKey[Engines]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("engine") is not None)  # stable: quick tests first


def pytest_collection_finish(session: pytest.Session) -> None:
    wanted = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if session.config.option.collectonly or "engines" not in wanted:
        return
    directory = session.config._tmp_path_factory.mktemp("engines")  # type: ignore[attr-defined]
    session.config.stash[_ENGINES] = Engines(directory, session.config.cache.mkdir("crane"), wanted)


def pytest_sessionfinish(session: pytest.Session) -> None:
    engines = session.config.stash.get(_ENGINES, None)
    if engines is not None:
        engines.stop()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small model, for tests without engines."""
    return tiny_model("llama", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def engines(request: pytest.FixtureRequest) -> Engines:
    return request.config.stash[_ENGINES]


@pytest.fixture(scope="session")
def tiny(engines: Engines) -> Tiny:
    return engines.tiny


@pytest.fixture(scope="session")
def tiny_oracle(tiny: Tiny) -> Oracle:
    return Oracle(tiny.checkpoint)


@pytest.fixture(scope="session")
def tiny_server(engines: Engines) -> Server:
    return engines.servers["tiny_server"].wait()


@pytest.fixture(scope="session")
def gemma_server(engines: Engines) -> Server:
    return engines.servers["gemma_server"].wait()


@pytest.fixture(scope="session")
def gemma_library(engines: Engines, gemma_server: Server) -> MaskLibrary:
    from crane_serve.common.masks import Fingerprint

    return MaskLibrary.load(engines.directory / "gemma-masks", Fingerprint.of(GEMMA), "attnlrp")


@pytest.fixture(scope="session")
def baseline(engines: Engines) -> dict[str, list[dict[str, object]]]:
    """Generations of vLLM without the plugin, "compiled" and "eager", from a process of its own."""
    engines.jobs.wait("baseline")
    return json.loads((engines.directory / "baseline.json").read_text())
