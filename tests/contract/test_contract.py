"""The contract with the vLLM that is installed, whether its table is complete, and what the check says of changes."""

import argparse
import asyncio
import json
import re
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import ContextVar
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from fastapi import FastAPI
from pydantic.fields import FieldInfo

from crane_serve.engine.versions import READ_VERSIONS, TESTED_VERSIONS
from tests.contract import __main__ as command
from tests.contract import expected, ours, wheel
from tests.contract.check import BODIES, Report, check
from tests.contract.source import Source

PYTHON = (
    int,
    *(str, bytes, dict, list, set, tuple, deque, Counter, OrderedDict, Path, re.Match, re.Pattern, BaseException, type),
    *(argparse.ArgumentParser, asyncio.AbstractEventLoop, asyncio.Task, ThreadPoolExecutor, ExitStack, ContextVar),
    *(Message, torch.Tensor, torch.nn.Module, FastAPI, FieldInfo),
)
TRANSFORMERS = {"get_vocab", "convert_ids_to_tokens", "bos_token_id"}
HTTP = {"cls", "middleware_stack", "user_middleware", "body_field", "validate"}
MODELS = {"field_info", "model_dump", "model_fields", "__struct_fields__"}  # pydantic, msgspec
MODELS |= {"_type_adapter", "core_schema", "validator"}
OF_OTHERS = {
    "register_fake",
    *TRANSFORMERS,
    *HTTP,
    *MODELS,
    "_load_model",
    "tobytes",  # of NumPy
    "crane_activation_request",
    "crane_masked_tokens",
    "crane_window_salts",
}  # the last three, and _load_model, are ours
VERSION = wheel.installed_version() or "none"


@pytest.fixture(scope="module")
def installed() -> Source:
    return Source(wheel.installed())


def changed(installed: Source, changes: Sequence[tuple[str, str, str]]) -> Report:
    """The report of the installed version, as if texts of its modules were others: module, text, the other text."""
    texts: dict[str, str] = {}
    for module, old, new in changes:
        text = texts.get(module) or installed.text(module) or ""
        assert old in text, f"{module} has no {old!r}; change the test"
        texts[module] = text.replace(old, new)
    return check(Source(wheel.installed(), texts), VERSION)


def test_the_installed_version_has_what_the_engine_needs(installed: Source) -> None:
    report = check(installed, VERSION)
    assert report.breaches == [], str(report)
    assert report.notices == [], str(report)
    assert report.checked.total() > 300


def test_bodies_of_every_supported_version_have_been_read() -> None:
    recorded = json.loads(BODIES.read_text())
    assert set(recorded) == {*TESTED_VERSIONS, *READ_VERSIONS}
    assert all(set(digests) == set(expected.BODIES) and all(digests.values()) for digests in recorded.values())


def test_all_that_is_wrapped_is_in_the_table() -> None:
    found = {(each.by, each.attribute) for each in ours.wrappings()}
    listed = {(by, re.split(r"[:.]", target)[-1]) for by, targets in expected.WRAPPED.items() for target in targets}
    by_hand = {(by, name) for by, name in listed if by.startswith("runner_v1.MaskedRunner.")}  # of one instance
    assert {name for _, name in by_hand} == {"load_model", "_prepare_inputs", "_dummy_run", "_get_prompt_logprobs_dict"}
    assert found == listed - by_hand


def test_all_that_is_added_and_mixed_in_is_in_the_table() -> None:
    assert ours.added() == set(expected.ADDED)
    assert ours.mixins() == set(expected.MIXED_IN)


def test_every_attribute_that_is_neither_ours_nor_pythons_is_in_the_table() -> None:
    targets = [
        *expected.CALLED,
        *expected.READ,
        *expected.SAYS,
        *(t for each in expected.WRAPPED.values() for t in each),
    ]
    listed = {part for target in targets for part in re.split(r"[:.]", target)[-2:]}
    listed |= {name for names in (*expected.READ.values(), *expected.ONLY_SOME_HAVE.values()) for name in names.split()}
    listed |= {
        name for line in expected.SAYS.values() for text in line for name in re.findall(r"state\.(\w+) = ", text)
    }
    known = {name for kind in PYTHON for name in dir(kind)} | OF_OTHERS | ours.own_names()
    unknown = {name: place for name, place in ours.attributes().items() if name not in listed | known}
    assert unknown == {}, "names of vLLM that tests/contract/expected.py does not list"
    assert set(ours.attributes()) >= OF_OTHERS, "names that the engine no longer uses"


BREAKING = [
    ("vllm.v1.worker.gpu_input_batch", "num_computed_tokens_cpu", "computed_tokens_cpu"),
    ("vllm.sampling_params", "class RequestOutputKind", "class OutputKind"),
    ("vllm.v1.engine.core", "def preprocess_add_request(self, ", "def preprocess_add_request(self, client, "),
    ("vllm.v1.engine.core", "return req, request.current_wave", "return req"),
    ("vllm.v1.engine.input_processor", "prompt_len: int,", "prompt_len: int, limit: int,"),
    (
        "vllm.v1.worker.gpu.model_states.interface",
        "request(self, req_id: str)",
        "request(self, req_id: str, *, end: int)",
    ),
    ("vllm.v1.engine.async_llm", "data_parallel_rank: int | None = None,", "rank: int | None = None,"),
    ("vllm.v1.worker.gpu_model_runner", "= self._update_states(scheduler_output)", "= None"),
    ("vllm.entrypoints.openai.completion.api_router", '"/v1/completions"', '"/v2/completions"'),
    ("vllm.v1.worker.worker_base", "class WorkerWrapperBase:", "class WorkerWrapperBase:\n    crane_change_mask = 1"),
    ("vllm.envs", "VLLM_USE_RUST_FRONTEND", "VLLM_FRONTEND"),
    ("vllm.inputs", "tokens_input", "text_input"),
]
BREACHES = [
    "vllm.v1.worker.gpu_input_batch:InputBatch has no num_computed_tokens_cpu; near: computed_tokens_cpu",
    "vllm.sampling_params:RequestOutputKind is imported in engine/service.py:",
    "vllm.v1.engine.core:EngineCore.preprocess_add_request takes other names: (self, client, request: ",
    "vllm.v1.engine.core:EngineCore.preprocess_add_request does not return 2 things any more",
    "vllm.v1.engine.input_processor:InputProcessor._validate_prompt_len takes other names: (self, prompt_len: ",
    "vllm.v1.worker.gpu.model_states.interface:ModelState.remove_request takes also end: (self, req_id: str, *, end",
    "(prompt, sampling_params, request_id, data_parallel_rank=)",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model does not say 'self._update_states('",
    "there is no route /v1/completions, from which a mask was carried",
    "vllm.v1.worker.worker_base:WorkerWrapperBase.crane_change_mask is a name of vLLM's own now",
    "the environment variable VLLM_USE_RUST_FRONTEND is not in vllm.envs",
    "and is not there (there is one in vllm.inputs.engine)",
]


def test_each_change_that_breaks_something_is_named(installed: Source) -> None:
    report = changed(installed, BREAKING)
    said = str(report)
    for breach in BREACHES:
        assert breach in said, said
    assert said.count("  BROKEN  ") == len(report.breaches)
    assert said.endswith(f"{len(report.breaches)} broken, {len(report.notices)} changed")


def test_one_renamed_attribute_is_one_breach(installed: Source) -> None:
    report = changed(installed, BREAKING[:1])
    (breach,) = report.breaches
    assert breach.startswith(BREACHES[0])
    assert report.notices == []


def test_a_changed_body_and_a_new_route_are_no_breach_but_must_be_read(installed: Source) -> None:
    worker, completions = "vllm.v1.worker.worker_base", "vllm.entrypoints.openai.completion.api_router"
    call = "self.worker.init_device()  # type: ignore"
    route = '@router.post(\n    "/v1/more",\n)\nasync def more(): ...\n'
    report = changed(
        installed,
        [
            (worker, call, f"{call}\n            self.ready = True"),
            (completions, "router = APIRouter()", f"router = APIRouter()\n\n\n{route}"),
        ],
    )
    assert report.breaches == []
    body, path = report.notices
    assert f"WorkerWrapperBase.init_device is not as it was read in {VERSION}; look at: the model runner exists" in body
    assert path == f"/v1/more ({completions}) is a new route: read whether a mask reaches the engine from there"


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


DERIVED = """
from .b import *
from pydantic import BaseModel
from vllm.c.d import Name as Other
if TYPE_CHECKING:
    late: int

class Child(Other[int], BaseModel):
    field: int = 1
"""
BASE = """
class Name:
    def __init__(self):
        self.kept, self.also = 1, 2

    @property
    def read(self): ...
"""


def test_names_are_followed_to_where_they_are_defined(tmp_path: Path) -> None:
    files = {"__init__.py": "", "a.py": DERIVED, "b.py": "def made(): ...\n", "c/d.py": BASE}
    source = Source(tree(tmp_path / "vllm", files))
    found = {
        "vllm.a": ("vllm.a", "late", "Child", "Child.field"),
        "vllm.b": ("made",),
        "vllm.c.d": ("Other", "Child.kept", "Child.read"),
    }
    for module, names in found.items():
        for name in names:
            target = name if name.startswith("vllm") else f"vllm.a:{name}"
            each = source.find(target)
            assert each is not None, target
            assert each.module == module
    for target in ("vllm:b", "vllm.x|vllm.b:made"):
        assert source.find(target) is not None
    for target in ("vllm.a:gone", "vllm.a:Child.gone", "vllm.c:gone", "vllm.x", "vllm.a:made.gone"):
        assert source.find(target) is None
    child = source.find("vllm.a:Child")
    assert child is not None
    has = {name: source.has(child, name) for name in ("field", "also", "model_validate_json", "gone")}
    assert has == {"field": True, "also": True, "model_validate_json": True, "gone": False}


def test_an_import_that_has_an_alternative_needs_one_of_both(tmp_path: Path) -> None:
    text = (
        "def f():\n    try:\n        from vllm.new import a\n    except ImportError:\n        from vllm.old import a\n"
    )
    (found,) = ours.imports(tree(tmp_path, {"ours.py": text}))
    assert [need.target for needs in found for need in needs] == ["vllm.new:a", "vllm.old:a"]


def test_only_the_python_files_of_a_wheel_are_kept_and_say_that_they_are_the_cpus(tmp_path: Path) -> None:
    with ZipFile(tmp_path / "some.whl", "w") as archive:
        for name in ("vllm/__init__.py", "vllm/_C.abi3.so", "vllm/data.json"):
            archive.writestr(name, "x = 1")
        archive.writestr("vllm-9.9.9.dist-info/METADATA", "Name: vllm\nVersion: 9.9.9\n\nVersion: of the text\n")
    out = wheel.unpack(tmp_path / "some.whl", tmp_path / "out")
    assert sorted(file.name for file in out.rglob("*") if file.is_file()) == ["METADATA", "__init__.py"]
    assert (out / "vllm-9.9.9.dist-info" / "METADATA").read_text().splitlines()[1] == "Version: 9.9.9+cpu"


def test_a_version_without_a_wheel_fails_where_it_is_named_or_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing(version: str) -> Path:
        raise wheel.NoWheel("its wheel cannot be downloaded: no network")

    monkeypatch.setattr(command, "source_of", nothing)
    assert command.main([]) == 0
    versions = (*TESTED_VERSIONS, *READ_VERSIONS)
    why = "NOT CHECKED, its wheel cannot be downloaded: no network"
    assert capsys.readouterr().out.splitlines() == [f"vLLM {version}: {why}" for version in versions]
    assert command.main(["0.33.0"]) == 1
    monkeypatch.setenv("CRANE_REQUIRE_CONTRACT", "1")
    assert command.main([]) == 1
