"""Masks that are saved while an engine serves: disk, engine cores and front end change together or not at all."""

import asyncio
import os
import random
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
from crane_serve.engine.answers import EngineDead
from crane_serve.engine.cores import Cores
from crane_serve.engine.live_masks import CHANGE_METHOD, FORGET_METHOD
from crane_serve.engine.mask_changes import MaskChanges
from tests.failing_disk import interrupted, is_full, killed_at

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


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "masks"
    directory.mkdir()
    return directory


@pytest.fixture
def core(directory: Path) -> Core:
    return Core(directory)


@pytest.fixture
async def changes(directory: Path, core: Core, fingerprint: Fingerprint) -> MaskChanges:
    write_mask(directory, "old", mask_of(0), info_of(fingerprint))
    (directory / "broken.safetensors").write_bytes(b"broken")
    return changes_over(directory, core, fingerprint, outputs=False)


def changes_over(
    directory: Path, core: Core, fingerprint: Fingerprint, *, outputs: bool, offsets: bool = False
) -> MaskChanges:
    config: Any = SimpleNamespace(masks=directory, outputs=outputs, offsets=offsets)
    engine = SimpleNamespace(engine_core=core)
    return MaskChanges(config, MaskLibrary.load(directory, fingerprint), Cores(engine))


def mask_of(*neurons: int) -> NeuronMask:
    return NeuronMask.switching_off([neurons, []], (6, 5))


def info_of(fingerprint: Fingerprint) -> MaskInfo:
    return MaskInfo(language="xx", method="test", fingerprint=fingerprint, parameters={"seed": 1})


@pytest.fixture
def stored(fingerprint: Fingerprint) -> StoredMask:
    return StoredMask("new", mask_of(1), info_of(fingerprint))


def content_of(stored: StoredMask) -> bytes:
    return encode_mask(stored.name, stored.mask, stored.info)


def state(changes: MaskChanges, core: Core, directory: Path) -> tuple[Any, ...]:
    """What every part has."""
    contents = {path.name: path.read_bytes() for path in directory.iterdir()}
    library = changes.library
    served = {name: (stored.mask.digest, stored.info) for name, stored in library.masks.items()}
    return contents, dict(core.masks), served, dict(library.invalid), library.retired


def assert_disk_is_served(changes: MaskChanges, directory: Path, fingerprint: Fingerprint) -> None:
    reloaded = MaskLibrary.load(directory, fingerprint)
    assert reloaded.manifest == changes.library.manifest
    assert {name: stored.info for name, stored in reloaded.masks.items()} == {
        name: stored.info for name, stored in changes.library.masks.items()
    }
    assert reloaded.invalid.keys() == changes.library.invalid.keys()
    assert all(path.name[0] != "." for path in directory.iterdir())


async def test_a_saved_mask_is_everywhere(
    changes: MaskChanges, core: Core, directory: Path, fingerprint: Fingerprint, stored: StoredMask
) -> None:
    await changes.put(stored, save=True)
    assert (directory / "new.safetensors").read_bytes() == core.masks["new"] == content_of(stored)
    assert changes.library.masks["new"] is stored
    assert core.files_then == ["broken.safetensors", "old.safetensors"]  # in place only when every process has it
    assert_disk_is_served(changes, directory, fingerprint)


async def test_a_replaced_mask_is_replaced_everywhere(
    changes: MaskChanges, core: Core, directory: Path, fingerprint: Fingerprint
) -> None:
    replacement = StoredMask("old", mask_of(1), info_of(fingerprint))
    await changes.put(replacement, save=True)
    assert (directory / "old.safetensors").read_bytes() == core.masks["old"] == content_of(replacement)
    assert changes.library.get("old") is replacement
    assert core.forgotten == [mask_of(0).digest]
    assert_disk_is_served(changes, directory, fingerprint)


async def test_a_mask_that_is_not_saved_leaves_the_disk_alone(
    changes: MaskChanges, core: Core, directory: Path, stored: StoredMask
) -> None:
    files = all_files(directory)
    await changes.put(stored)
    await changes.remove("old")
    assert all_files(directory) == files
    assert list(changes.library.masks) == ["new"]
    assert core.masks == {"new": content_of(stored)}


async def test_a_name_that_had_an_unusable_file_gets_a_mask(
    changes: MaskChanges, directory: Path, fingerprint: Fingerprint
) -> None:
    await changes.put(StoredMask("broken", mask_of(1), info_of(fingerprint)), save=True)
    assert changes.library.invalid == {}
    assert_disk_is_served(changes, directory, fingerprint)


def fail(*_: object, **__: object) -> None:
    raise FULL


@pytest.mark.parametrize("name", ["new", "old"])
@pytest.mark.parametrize("function", ["fsync", "write"])
async def test_a_full_disk_is_noticed_before_anybody_is_told(
    changes: MaskChanges,
    core: Core,
    directory: Path,
    fingerprint: Fingerprint,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    function: str,
) -> None:
    before = state(changes, core, directory)
    stored = StoredMask(name, mask_of(1), info_of(fingerprint))
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(OSError, match="disk full"):
            await changes.put(stored, save=True)
    assert core.told == 0
    assert state(changes, core, directory) == before
    await changes.put(stored, save=True)
    assert_disk_is_served(changes, directory, fingerprint)


@pytest.mark.parametrize("name", ["new", "old"])
async def test_a_file_that_cannot_be_put_in_place_changes_no_name_and_leaves_no_content(
    changes: MaskChanges,
    core: Core,
    directory: Path,
    fingerprint: Fingerprint,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            await changes.put(StoredMask(name, mask_of(1), info_of(fingerprint)), save=True)
    assert list(changes.library.masks) == ["old"]
    assert changes.library.get("old").mask.digest == mask_of(0).digest
    assert core.masks == ({"old": content_of(changes.library.get("old"))} if name == "old" else {})
    assert core.forgotten == [mask_of(1).digest]
    assert_disk_is_served(changes, directory, fingerprint)


async def test_content_that_is_served_under_another_name_is_not_taken_back(
    changes: MaskChanges, core: Core, fingerprint: Fingerprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        await changes.put(StoredMask("new", mask_of(0), info_of(fingerprint)), save=True)
    assert (core.masks, core.forgotten) == ({}, [])


@pytest.mark.parametrize("name", ["new", "old"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [(EngineDeadError(), EngineDead), (RuntimeError("a worker has failed"), RuntimeError)],
    ids=["dead", "failed"],
)
async def test_a_core_that_fails_leaves_no_file(
    changes: MaskChanges,
    core: Core,
    directory: Path,
    fingerprint: Fingerprint,
    name: str,
    error: Exception,
    raised: type[Exception],
) -> None:
    before = state(changes, core, directory)
    core.error = error
    with pytest.raises(raised):
        await changes.put(StoredMask(name, mask_of(1), info_of(fingerprint)), save=True)
    assert state(changes, core, directory) == before
    assert_disk_is_served(changes, directory, fingerprint)


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("offsets", [True, False])
async def test_masks_that_this_engine_cannot_run_are_refused_first(
    directory: Path, core: Core, fingerprint: Fingerprint, outputs: bool, offsets: bool
) -> None:
    changes = changes_over(directory, core, fingerprint, outputs=outputs, offsets=offsets)
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
            await changes.put(stored, save=True)
    assert (core.told, all_files(directory), all_files(directory.parent)) == (0, [], ["masks"])
    if outputs:
        await changes.put(scaling_output, save=True)
    if offsets:
        await changes.put(adding, save=True)
    if outputs or offsets:
        assert_disk_is_served(changes, directory, fingerprint)


async def test_a_removed_mask_is_gone_everywhere(
    changes: MaskChanges, core: Core, directory: Path, fingerprint: Fingerprint, stored: StoredMask
) -> None:
    await changes.put(stored, save=True)
    await changes.remove("new", save=True)
    assert all_files(directory) == ["broken.safetensors", "old.safetensors"]
    assert core.masks == {}
    assert core.forgotten == [stored.mask.digest]
    with pytest.raises(UnknownMask):
        changes.library.get("new")
    assert_disk_is_served(changes, directory, fingerprint)


async def test_an_unusable_file_is_removed(changes: MaskChanges, directory: Path, fingerprint: Fingerprint) -> None:
    with pytest.raises(UnknownMask):
        await changes.remove("broken")
    assert "broken.safetensors" in all_files(directory)
    await changes.remove("broken", save=True)
    assert all_files(directory) == ["old.safetensors"]
    assert changes.library.invalid == {}
    assert_disk_is_served(changes, directory, fingerprint)


async def test_a_removal_is_on_the_disk_before_it_is_acknowledged(changes: MaskChanges, directory: Path) -> None:
    """Its directory is synced, so that a power cut does not bring the mask back."""
    with interrupted(0, is_full) as made:
        await changes.remove("old", save=True)
    assert "fsync" in made[made.index("unlink") :]


CHANGES = {
    "new": lambda changes, fingerprint: changes.put(StoredMask("new", mask_of(1), info_of(fingerprint)), save=True),
    "replaced": lambda changes, fingerprint: changes.put(
        StoredMask("old", mask_of(1), info_of(fingerprint)), save=True
    ),
    "removed": lambda changes, _: changes.remove("old", save=True),
    "unusable removed": lambda changes, _: changes.remove("broken", save=True),
}


def served_at(directory: Path, fingerprint: Fingerprint) -> tuple[dict[str, str], list[str]]:
    """What a server that starts now has, and the files that are not usable."""
    library = MaskLibrary.load(directory, fingerprint)
    return {name: stored.mask.digest for name, stored in library.masks.items()}, list(library.invalid)


def change_at(place: Path, fingerprint: Fingerprint, change: Any) -> tuple[MaskChanges, Core]:
    """Make a change over the directory `place`, which gets the usual masks if it is new."""
    if not place.exists():
        write_mask(place, "old", mask_of(0), info_of(fingerprint))
        (place / "broken.safetensors").write_bytes(b"broken")
    core = Core(place)

    async def run() -> MaskChanges:
        core.go_on.set()
        changes = changes_over(place, core, fingerprint, outputs=False)
        await change(changes, fingerprint)
        return changes

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
        changes, core = change_at(place, fingerprint, _nothing)

        async def change(changes: MaskChanges = changes) -> None:
            await CHANGES[what](changes, fingerprint)

        with interrupted(at, is_full) as made:
            try:
                asyncio.run(change())
            except OSError:
                refused = True
        if len(made) < at:
            break
        assert served_at(place, fingerprint) == (before if refused else after), made
        served = {name: stored.mask.digest for name, stored in changes.library.masks.items()}
        assert (served, list(changes.library.invalid)) == served_at(place, fingerprint)
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
async def test_what_is_not_there_is_not_removed(changes: MaskChanges, core: Core, directory: Path, save: bool) -> None:
    before = state(changes, core, directory)
    for name in ("new", "../masks/old", "", changes.library.masks["old"].mask.digest):
        with pytest.raises(UnknownMask):
            await changes.remove(name, save=save)
    assert (core.told, state(changes, core, directory)) == (0, before)


async def test_a_file_that_is_already_gone_is_no_obstacle(changes: MaskChanges, directory: Path) -> None:
    (directory / "old.safetensors").unlink()
    await changes.remove("old", save=True)
    assert dict(changes.library.masks) == {}


async def test_a_file_that_cannot_be_removed_keeps_its_mask(
    changes: MaskChanges, core: Core, directory: Path, fingerprint: Fingerprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(changes, core, directory)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        with pytest.raises(OSError, match="disk full"):
            await changes.remove("old", save=True)
    assert (core.told, state(changes, core, directory)) == (0, before)


async def test_a_directory_that_has_gone_is_made_again(
    changes: MaskChanges, directory: Path, stored: StoredMask
) -> None:
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    await changes.put(stored, save=True)
    assert all_files(directory) == ["new.safetensors"]


async def test_a_cancelled_caller_leaves_a_whole_new_mask(
    changes: MaskChanges, core: Core, directory: Path, fingerprint: Fingerprint, stored: StoredMask
) -> None:
    core.go_on.clear()
    caller = asyncio.create_task(changes.put(stored, save=True))
    await core.asked.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert "new" not in changes.library.masks
    assert "new.safetensors" not in all_files(directory)
    core.go_on.set()
    await changes.put(StoredMask("next", mask_of(2), info_of(fingerprint)), save=True)  # waits for its turn
    assert changes.library.masks["new"] is stored
    assert core.masks["new"] == (directory / "new.safetensors").read_bytes() == content_of(stored)
    assert_disk_is_served(changes, directory, fingerprint)


async def test_a_cancelled_caller_leaves_a_mask_wholly_removed(
    changes: MaskChanges, core: Core, directory: Path, fingerprint: Fingerprint, stored: StoredMask
) -> None:
    await changes.put(stored, save=True)
    core.asked.clear()
    core.go_on.clear()
    caller = asyncio.create_task(changes.remove("new", save=True))
    await core.asked.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    core.go_on.set()
    await changes.put(StoredMask("next", mask_of(2), info_of(fingerprint)), save=True)
    assert list(core.masks) == ["next"]
    assert list(changes.library.masks) == ["next", "old"]
    assert_disk_is_served(changes, directory, fingerprint)


@pytest.mark.parametrize("seed", range(5))
async def test_a_crowd_of_changes_ends_with_one_state(
    changes: MaskChanges, core: Core, directory: Path, fingerprint: Fingerprint, seed: int
) -> None:
    choose = random.Random(seed)

    async def change(number: int) -> None:
        name = choose.choice(["old", "new", "broken"])
        if choose.random() < 0.4:
            await changes.remove(name, save=True)
        else:
            neurons = [neuron for neuron in range(6) if number >> neuron & 1]
            await changes.put(StoredMask(name, mask_of(*neurons), info_of(fingerprint)), save=True)

    tasks = [asyncio.create_task(change(number)) for number in range(1, 41)]
    await asyncio.sleep(0)  # so that each has begun
    for task in choose.sample(tasks, 8):
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} <= {type(None), UnknownMask, asyncio.CancelledError}
    await changes.put(StoredMask("last", mask_of(5), info_of(fingerprint)), save=True)
    assert_disk_is_served(changes, directory, fingerprint)
    on_disk = {path.stem: path.read_bytes() for path in directory.iterdir()}
    for untouched in on_disk.keys() - core.masks.keys():
        assert untouched in ("old", "broken")
    assert {name: on_disk.get(name) for name in core.masks} == core.masks
