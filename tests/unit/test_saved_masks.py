"""Masks that are saved while an engine serves: disk, engine cores and front end change together or not at all."""

import asyncio
import os
import random
from collections.abc import AsyncGenerator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.engine.exceptions import EngineDeadError

from crane_serve.common.masks import (
    Fingerprint,
    FingerprintError,
    MaskFileError,
    MaskInfo,
    MaskLibrary,
    NeuronMask,
    StoredMask,
    UnknownMask,
    decode_mask,
    encode_mask,
    write_mask,
)
from crane_serve.engine.live_masks import CHANGE_METHOD, FORGET_METHOD
from crane_serve.engine.service import EngineDead, EngineService
from tests.failing_disk import interrupted, is_full, killed_at
from tests.tiny import byte_tokenizer

FULL = OSError("disk full")


class Core:
    """An engine core that keeps what it is told; it can fail, or wait until it is let through."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.masks: dict[str, bytes] = {}
        self.forgotten: list[str] = []
        self.told = 0
        self.error: Exception | None = None
        self.asked = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.files_then: list[str] = []

    async def call_utility_async(self, method: str, *arguments: Any) -> None:
        self.files_then = finished_files(self._directory)
        self.asked.set()
        await self.go_on.wait()
        if self.error is not None:
            raise self.error
        self.told += 1
        if method == FORGET_METHOD:
            self.forgotten += arguments[0]
            return
        assert method == CHANGE_METHOD
        name, content = arguments
        if content is None:
            self.masks.pop(name, None)
        else:
            self.masks[name] = content


def finished_files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("[!.]*"))


def all_files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def _generate(*_: object, **__: object) -> AsyncGenerator[Any]:
    raise AssertionError("nothing is generated here")
    yield


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "masks"
    directory.mkdir()
    return directory


@pytest.fixture
def core(directory: Path) -> Core:
    return Core(directory)


@pytest.fixture
async def service(directory: Path, core: Core, fingerprint: Fingerprint) -> EngineService:
    write_mask(directory, "old", mask_of(0), info_of(fingerprint))
    (directory / "broken.safetensors").write_bytes(b"broken")
    return service_over(directory, core, fingerprint, outputs=False)


def service_over(
    directory: Path, core: Core, fingerprint: Fingerprint, *, outputs: bool, offsets: bool = False
) -> EngineService:
    library = MaskLibrary.load(directory, fingerprint)
    config = SimpleNamespace(library=lambda: library, masks=directory, outputs=outputs, offsets=offsets, rows=4)
    model = SimpleNamespace(hf_config=None, hf_text_config=None, try_get_generation_config=dict)
    engine = SimpleNamespace(
        get_tokenizer=byte_tokenizer,
        generate=_generate,
        engine_core=core,
        errored=False,
        model_config=model,
        vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4)),
    )
    return EngineService(engine, config, ["tiny"])  # type: ignore[arg-type]


def mask_of(*neurons: int) -> NeuronMask:
    return NeuronMask.switching_off([neurons, []], (6, 5))


def info_of(fingerprint: Fingerprint) -> MaskInfo:
    return MaskInfo(language="xx", method="test", fingerprint=fingerprint, parameters={"seed": 1})


@pytest.fixture
def stored(fingerprint: Fingerprint) -> StoredMask:
    return StoredMask("new", mask_of(1), info_of(fingerprint))


def content_of(stored: StoredMask) -> bytes:
    return encode_mask(stored.name, stored.mask, stored.info)


def state(service: EngineService, core: Core, directory: Path) -> tuple[Any, ...]:
    """What every part has."""
    contents = {path.name: path.read_bytes() for path in directory.iterdir()}
    library = service.library
    served = {name: (stored.mask.digest, stored.info) for name, stored in library.masks.items()}
    return contents, dict(core.masks), served, dict(library.invalid), library.retired


def assert_disk_is_served(service: EngineService, directory: Path, fingerprint: Fingerprint) -> None:
    reloaded = MaskLibrary.load(directory, fingerprint)
    assert reloaded.manifest == service.library.manifest
    assert {name: stored.info for name, stored in reloaded.masks.items()} == {
        name: stored.info for name, stored in service.library.masks.items()
    }
    assert reloaded.invalid.keys() == service.library.invalid.keys()
    assert all(path.name[0] != "." for path in directory.iterdir())


async def test_a_saved_mask_is_everywhere(
    service: EngineService, core: Core, directory: Path, fingerprint: Fingerprint, stored: StoredMask
) -> None:
    await service.put_mask(stored, save=True)
    assert (directory / "new.safetensors").read_bytes() == core.masks["new"] == content_of(stored)
    assert service.library.masks["new"] is stored
    assert core.files_then == ["broken.safetensors", "old.safetensors"]  # in place only when every process has it
    assert_disk_is_served(service, directory, fingerprint)


async def test_a_replaced_mask_is_replaced_everywhere(
    service: EngineService, core: Core, directory: Path, fingerprint: Fingerprint
) -> None:
    replacement = StoredMask("old", mask_of(1), info_of(fingerprint))
    await service.put_mask(replacement, save=True)
    assert (directory / "old.safetensors").read_bytes() == core.masks["old"] == content_of(replacement)
    assert service.library.get("old") is replacement
    assert core.forgotten == [mask_of(0).digest]
    assert_disk_is_served(service, directory, fingerprint)


async def test_a_mask_that_is_not_saved_leaves_the_disk_alone(
    service: EngineService, core: Core, directory: Path, stored: StoredMask
) -> None:
    files = all_files(directory)
    await service.put_mask(stored)
    await service.remove_mask("old")
    assert all_files(directory) == files
    assert list(service.library.masks) == ["new"]
    assert core.masks == {"new": content_of(stored)}


async def test_a_name_that_had_an_unusable_file_gets_a_mask(
    service: EngineService, directory: Path, fingerprint: Fingerprint
) -> None:
    await service.put_mask(StoredMask("broken", mask_of(1), info_of(fingerprint)), save=True)
    assert service.library.invalid == {}
    assert_disk_is_served(service, directory, fingerprint)


def fail(*_: object, **__: object) -> None:
    raise FULL


@pytest.mark.parametrize("name", ["new", "old"])
@pytest.mark.parametrize("function", ["fsync", "write"])
async def test_a_full_disk_is_noticed_before_anybody_is_told(
    service: EngineService,
    core: Core,
    directory: Path,
    fingerprint: Fingerprint,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    function: str,
) -> None:
    before = state(service, core, directory)
    stored = StoredMask(name, mask_of(1), info_of(fingerprint))
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(OSError, match="disk full"):
            await service.put_mask(stored, save=True)
    assert core.told == 0
    assert state(service, core, directory) == before
    await service.put_mask(stored, save=True)
    assert_disk_is_served(service, directory, fingerprint)


@pytest.mark.parametrize("name", ["new", "old"])
async def test_a_file_that_cannot_be_put_in_place_changes_no_name_and_leaves_no_content(
    service: EngineService,
    core: Core,
    directory: Path,
    fingerprint: Fingerprint,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            await service.put_mask(StoredMask(name, mask_of(1), info_of(fingerprint)), save=True)
    assert list(service.library.masks) == ["old"]
    assert service.library.get("old").mask.digest == mask_of(0).digest
    assert core.masks == ({"old": content_of(service.library.get("old"))} if name == "old" else {})
    assert core.forgotten == [mask_of(1).digest]
    assert_disk_is_served(service, directory, fingerprint)


async def test_content_that_is_served_under_another_name_is_not_taken_back(
    service: EngineService, core: Core, fingerprint: Fingerprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        await service.put_mask(StoredMask("new", mask_of(0), info_of(fingerprint)), save=True)
    assert (core.masks, core.forgotten) == ({}, [])


@pytest.mark.parametrize("name", ["new", "old"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [(EngineDeadError(), EngineDead), (RuntimeError("a worker has failed"), RuntimeError)],
    ids=["dead", "failed"],
)
async def test_a_core_that_fails_leaves_no_file(
    service: EngineService,
    core: Core,
    directory: Path,
    fingerprint: Fingerprint,
    name: str,
    error: Exception,
    raised: type[Exception],
) -> None:
    before = state(service, core, directory)
    core.error = error
    with pytest.raises(raised):
        await service.put_mask(StoredMask(name, mask_of(1), info_of(fingerprint)), save=True)
    assert state(service, core, directory) == before
    assert_disk_is_served(service, directory, fingerprint)


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("offsets", [True, False])
async def test_masks_that_this_engine_cannot_run_are_refused_first(
    directory: Path, core: Core, fingerprint: Fingerprint, outputs: bool, offsets: bool
) -> None:
    service = service_over(directory, core, fingerprint, outputs=outputs, offsets=offsets)
    output = torch.ones(2, 4)
    output[0, 0] = 0
    info = info_of(fingerprint)
    other = info_of(fingerprint.model_copy(update={"weights_digest": "c" * 64}))
    refused = [
        (StoredMask("new", mask_of(1), other), FingerprintError),
        (StoredMask("../new", mask_of(1), info), MaskFileError),
        (StoredMask("none", mask_of(1), info), MaskFileError),
    ]
    scaling_output = StoredMask("new", NeuronMask(torch.ones(2, 6), (6, 5), output), info)
    adding = StoredMask("adding", NeuronMask(torch.ones(2, 6), (6, 5), offset=torch.eye(2, 6)), info)
    if not outputs:
        refused.append((scaling_output, MaskFileError))
    if not offsets:
        refused.append((adding, MaskFileError))
    for stored, error in refused:
        with pytest.raises(error):
            await service.put_mask(stored, save=True)
    assert (core.told, all_files(directory), all_files(directory.parent)) == (0, [], ["masks"])
    if outputs:
        await service.put_mask(scaling_output, save=True)
    if offsets:
        await service.put_mask(adding, save=True)
    if outputs or offsets:
        assert_disk_is_served(service, directory, fingerprint)


async def test_a_removed_mask_is_gone_everywhere(
    service: EngineService, core: Core, directory: Path, fingerprint: Fingerprint, stored: StoredMask
) -> None:
    await service.put_mask(stored, save=True)
    await service.remove_mask("new", save=True)
    assert all_files(directory) == ["broken.safetensors", "old.safetensors"]
    assert core.masks == {}
    assert core.forgotten == [stored.mask.digest]
    with pytest.raises(UnknownMask):
        service.library.get("new")
    assert_disk_is_served(service, directory, fingerprint)


async def test_an_unusable_file_is_removed(service: EngineService, directory: Path, fingerprint: Fingerprint) -> None:
    with pytest.raises(UnknownMask):
        await service.remove_mask("broken")
    assert "broken.safetensors" in all_files(directory)
    await service.remove_mask("broken", save=True)
    assert all_files(directory) == ["old.safetensors"]
    assert service.library.invalid == {}
    assert_disk_is_served(service, directory, fingerprint)


async def test_a_removal_is_on_the_disk_before_it_is_acknowledged(service: EngineService, directory: Path) -> None:
    """Its directory is synced, so that a power cut does not bring the mask back."""
    with interrupted(0, is_full) as made:
        await service.remove_mask("old", save=True)
    assert "fsync" in made[made.index("unlink") :]


CHANGES = {
    "new": lambda service, fingerprint: service.put_mask(
        StoredMask("new", mask_of(1), info_of(fingerprint)), save=True
    ),
    "replaced": lambda service, fingerprint: service.put_mask(
        StoredMask("old", mask_of(1), info_of(fingerprint)), save=True
    ),
    "removed": lambda service, _: service.remove_mask("old", save=True),
    "unusable removed": lambda service, _: service.remove_mask("broken", save=True),
}


def served_at(directory: Path, fingerprint: Fingerprint) -> tuple[dict[str, str], list[str]]:
    """What a server that starts now has, and the files that are not usable."""
    library = MaskLibrary.load(directory, fingerprint)
    return {name: stored.mask.digest for name, stored in library.masks.items()}, list(library.invalid)


def change_at(place: Path, fingerprint: Fingerprint, change: Any) -> tuple[EngineService, Core]:
    """Make a change over the directory `place`, which gets the usual masks if it is new."""
    if not place.exists():
        write_mask(place, "old", mask_of(0), info_of(fingerprint))
        (place / "broken.safetensors").write_bytes(b"broken")
    core = Core(place)

    async def run() -> EngineService:
        core.go_on.set()
        service = service_over(place, core, fingerprint, outputs=False)
        await change(service, fingerprint)
        return service

    return asyncio.run(run()), core


async def _nothing(*_: object) -> None:
    pass


@pytest.mark.parametrize("what", CHANGES)
def test_a_disk_that_fails_at_any_call_of_a_change(tmp_path: Path, fingerprint: Fingerprint, what: str) -> None:
    change_at(tmp_path / "before", fingerprint, _nothing)
    before = served_at(tmp_path / "before", fingerprint)
    change_at(tmp_path / "after", fingerprint, CHANGES[what])
    after = served_at(tmp_path / "after", fingerprint)
    for at in count(1):
        place, refused = tmp_path / str(at), False
        service, core = change_at(place, fingerprint, _nothing)

        async def change(service: EngineService = service) -> None:
            await CHANGES[what](service, fingerprint)

        with interrupted(at, is_full) as made:
            try:
                asyncio.run(change())
            except OSError:
                refused = True
        if len(made) < at:
            break
        assert served_at(place, fingerprint) == (before if refused else after), made
        served = {name: stored.mask.digest for name, stored in service.library.masks.items()}
        assert (served, list(service.library.invalid)) == served_at(place, fingerprint)
        if refused:  # the content of a mask that was not acknowledged is in no process
            assert {
                name: decode_mask(name, content, source="x").mask.digest for name, content in core.masks.items()
            } in (
                {},
                {"old": mask_of(0).digest},
            )
            assert not core.told or mask_of(1).digest in core.forgotten
            change_at(place, fingerprint, CHANGES[what])
            assert served_at(place, fingerprint) == after
    assert at > 2


@pytest.mark.parametrize("what", CHANGES)
def test_a_server_that_is_killed_at_any_call_of_a_change(tmp_path: Path, fingerprint: Fingerprint, what: str) -> None:
    change_at(tmp_path / "before", fingerprint, _nothing)
    before = served_at(tmp_path / "before", fingerprint)
    change_at(tmp_path / "after", fingerprint, CHANGES[what])
    after = served_at(tmp_path / "after", fingerprint)
    for at in count(1):
        place = tmp_path / str(at)
        change_at(place, fingerprint, _nothing)
        if not killed_at(at, lambda place=place: change_at(place, fingerprint, CHANGES[what])):
            break
        found = served_at(place, fingerprint)
        assert found in (before, after)
        if found == before:
            change_at(place, fingerprint, CHANGES[what])
            assert served_at(place, fingerprint) == after
    assert at > 2


@pytest.mark.parametrize("save", [True, False])
async def test_what_is_not_there_is_not_removed(
    service: EngineService, core: Core, directory: Path, save: bool
) -> None:
    before = state(service, core, directory)
    for name in ("new", "../masks/old", "", service.library.masks["old"].mask.digest):
        with pytest.raises(UnknownMask):
            await service.remove_mask(name, save=save)
    assert (core.told, state(service, core, directory)) == (0, before)


async def test_a_file_that_is_already_gone_is_no_obstacle(service: EngineService, directory: Path) -> None:
    (directory / "old.safetensors").unlink()
    await service.remove_mask("old", save=True)
    assert dict(service.library.masks) == {}


async def test_a_file_that_cannot_be_removed_keeps_its_mask(
    service: EngineService, core: Core, directory: Path, fingerprint: Fingerprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(service, core, directory)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        with pytest.raises(OSError, match="disk full"):
            await service.remove_mask("old", save=True)
    assert (core.told, state(service, core, directory)) == (0, before)


async def test_a_directory_that_has_gone_is_made_again(
    service: EngineService, directory: Path, stored: StoredMask
) -> None:
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    await service.put_mask(stored, save=True)
    assert all_files(directory) == ["new.safetensors"]


async def test_a_cancelled_caller_leaves_a_whole_new_mask(
    service: EngineService, core: Core, directory: Path, fingerprint: Fingerprint, stored: StoredMask
) -> None:
    core.go_on.clear()
    caller = asyncio.create_task(service.put_mask(stored, save=True))
    await core.asked.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert "new" not in service.library.masks
    assert "new.safetensors" not in all_files(directory)
    core.go_on.set()
    await service.put_mask(StoredMask("next", mask_of(2), info_of(fingerprint)), save=True)  # waits for its turn
    assert service.library.masks["new"] is stored
    assert core.masks["new"] == (directory / "new.safetensors").read_bytes() == content_of(stored)
    assert_disk_is_served(service, directory, fingerprint)


async def test_a_cancelled_caller_leaves_a_mask_wholly_removed(
    service: EngineService, core: Core, directory: Path, fingerprint: Fingerprint, stored: StoredMask
) -> None:
    await service.put_mask(stored, save=True)
    core.asked.clear()
    core.go_on.clear()
    caller = asyncio.create_task(service.remove_mask("new", save=True))
    await core.asked.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    core.go_on.set()
    await service.put_mask(StoredMask("next", mask_of(2), info_of(fingerprint)), save=True)
    assert list(core.masks) == ["next"]
    assert list(service.library.masks) == ["next", "old"]
    assert_disk_is_served(service, directory, fingerprint)


@pytest.mark.parametrize("seed", range(5))
async def test_a_crowd_of_changes_ends_with_one_state(
    service: EngineService, core: Core, directory: Path, fingerprint: Fingerprint, seed: int
) -> None:
    choose = random.Random(seed)

    async def change(number: int) -> None:
        name = choose.choice(["old", "new", "broken"])
        if choose.random() < 0.4:
            await service.remove_mask(name, save=True)
        else:
            neurons = [neuron for neuron in range(6) if number >> neuron & 1]
            await service.put_mask(StoredMask(name, mask_of(*neurons), info_of(fingerprint)), save=True)

    changes = [asyncio.create_task(change(number)) for number in range(1, 41)]
    await asyncio.sleep(0)  # so that each has begun
    for task in choose.sample(changes, 8):
        task.cancel()
    results = await asyncio.gather(*changes, return_exceptions=True)
    assert {type(result) for result in results} <= {type(None), UnknownMask, asyncio.CancelledError}
    await service.put_mask(StoredMask("last", mask_of(5), info_of(fingerprint)), save=True)
    assert_disk_is_served(service, directory, fingerprint)
    on_disk = {path.stem: path.read_bytes() for path in directory.iterdir()}
    for untouched in on_disk.keys() - core.masks.keys():
        assert untouched in ("old", "broken")
    assert {name: on_disk.get(name) for name in core.masks} == core.masks
