"""Transfer: a mask of one checkpoint serves another of the same shape only after `crane masks transfer`."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from crane_serve.cli import app
from crane_serve.common.masks import (
    Fingerprint,
    InvalidMask,
    MaskFileError,
    MaskInfo,
    MaskLibrary,
    NeuronMask,
    read_mask,
    write_mask,
)
from crane_serve.common.masks.transfer import TransferError, transfer_masks
from tests.tiny import HIDDEN, LAYERS, NEURONS, tiny_model

SIZES = (NEURONS,) * LAYERS
OFF = {"crane-zh": [[0, 7], [], [NEURONS - 1]], "crane-vi": [[], [5], []]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three checkpoints of one shape, and one each of another depth and of another family."""
    directory = tmp_path_factory.mktemp("models")
    same = {
        name: tiny_model("llama", directory / name, seed=seed) for seed, name in enumerate(("base", "chat", "other"))
    }
    deep = tiny_model("llama", directory / "deep", layers=LAYERS + 1)
    return {**same, "deep": deep, "mistral": tiny_model("mistral", directory / "mistral")}


@pytest.fixture(scope="module")
def fingerprints(models: dict[str, Path]) -> dict[str, Fingerprint]:
    return {name: Fingerprint.of(path) for name, path in models.items()}


@pytest.fixture
def masks(tmp_path: Path, fingerprints: dict[str, Fingerprint]) -> Path:
    """Two masks of the base model, the first of which scales an output dimension, too."""
    for name, neurons in OFF.items():
        output = torch.ones(LAYERS, HIDDEN)
        output[1, 3] = 0.5
        mask = NeuronMask.switching_off(neurons, SIZES)
        mask = NeuronMask(mask.intermediate, SIZES, output if name == "crane-zh" else None)
        info = MaskInfo(
            language=name[-2:],
            method="crane",
            fingerprint=fingerprints["base"],
            budget=0.01,
            corpus_digest="c" * 64,
            parameters={"seed": 3},
            created_by="a test",
        )
        write_mask(tmp_path / "masks", name, mask, info)
    return tmp_path / "masks"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_mask_is_refused_before_and_accepted_after(
    masks: Path, out: Path, fingerprints: dict[str, Fingerprint]
) -> None:
    chat = fingerprints["chat"]
    before = MaskLibrary.load(masks, chat)
    assert list(before.masks) == []
    with pytest.raises(InvalidMask, match="made for another model: its weights_digest"):
        before.resolve("crane-zh")

    written = transfer_masks(masks, chat, out)
    assert written == [out / "crane-vi.safetensors", out / "crane-zh.safetensors"]
    after = MaskLibrary.load(out, chat)
    assert list(after.masks) == ["crane-vi", "crane-zh"]
    assert after.invalid == {}
    resolved = after.resolve("crane-zh")
    assert resolved is not None
    assert resolved.mask.whole().neuron_sets() == OFF["crane-zh"]
    assert MaskLibrary.load(masks, fingerprints["base"]).masks.keys() == after.masks.keys()  # the old ones stay


def test_only_the_fingerprints_change(masks: Path, out: Path, fingerprints: dict[str, Fingerprint]) -> None:
    (path,) = transfer_masks(masks, fingerprints["chat"], out, ["crane-zh"])
    old, new = read_mask(masks / path.name), read_mask(path)
    assert new.mask.digest == old.mask.digest
    assert new.info.fingerprint == fingerprints["chat"]
    assert new.info.transferred_from == fingerprints["base"]
    changed = {"fingerprint", "transferred_from"}
    assert new.info.model_dump(exclude=changed) == old.info.model_dump(exclude=changed)


def test_a_transferred_mask_is_no_mask_of_its_origin(
    masks: Path, out: Path, fingerprints: dict[str, Fingerprint]
) -> None:
    transfer_masks(masks, fingerprints["chat"], out)
    assert list(MaskLibrary.load(out, fingerprints["base"]).masks) == []


def test_the_origin_survives_further_transfers(
    masks: Path, out: Path, tmp_path: Path, fingerprints: dict[str, Fingerprint]
) -> None:
    transfer_masks(masks, fingerprints["chat"], out, ["crane-vi"])
    (further,) = transfer_masks(out, fingerprints["other"], tmp_path / "further")
    assert read_mask(further).info.fingerprint == fingerprints["other"]
    assert read_mask(further).info.transferred_from == fingerprints["base"]

    (home,) = transfer_masks(tmp_path / "further", fingerprints["base"], tmp_path / "home")
    assert read_mask(home).info == read_mask(masks / home.name).info


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("deep", rf"'crane-vi' cannot be .*the layers of its model is {LAYERS}, .*new checkpoint {LAYERS + 1}$"),
        ("mistral", r"the architecture of its model is LlamaForCausalLM, .* MistralForCausalLM$"),
    ],
)
def test_other_models_are_refused(
    masks: Path, out: Path, fingerprints: dict[str, Fingerprint], to: str, message: str
) -> None:
    with pytest.raises(TransferError, match=message):
        transfer_masks(masks, fingerprints[to], out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 65}, "hidden size of its model is 64, that of the new checkpoint 65"),
        ({"intermediate_sizes": (160, 128, 160)}, "intermediate size in layer 1 of its model is 160, .* 128$"),
    ],
)
def test_other_shapes_are_refused(
    masks: Path, out: Path, fingerprints: dict[str, Fingerprint], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(TransferError, match=message):
        transfer_masks(masks, fingerprints["chat"].model_copy(update=changes), out)
    assert not out.exists()


def test_nothing_is_written_unless_all_can_be(masks: Path, out: Path, fingerprints: dict[str, Fingerprint]) -> None:
    (masks / "zz.safetensors").write_bytes(b"nothing")
    with pytest.raises(MaskFileError, match=r"zz\.safetensors: not a readable mask file"):
        transfer_masks(masks, fingerprints["chat"], out)
    assert not out.exists()
    assert len(transfer_masks(masks, fingerprints["chat"], out, ["crane-vi", "crane-zh", "crane-vi"])) == 2


def test_the_source_is_never_written(masks: Path, tmp_path: Path, fingerprints: dict[str, Fingerprint]) -> None:
    content = {path.name: path.read_bytes() for path in masks.iterdir()}
    (tmp_path / "link").symlink_to(masks)
    for same in (masks, masks / ".." / "masks", tmp_path / "link"):
        with pytest.raises(TransferError, match="expected another directory"):
            transfer_masks(masks, fingerprints["chat"], same)
    assert {path.name: path.read_bytes() for path in masks.iterdir()} == content


def test_missing_masks_are_named(masks: Path, out: Path, tmp_path: Path, fingerprints: dict[str, Fingerprint]) -> None:
    chat = fingerprints["chat"]
    with pytest.raises(MaskFileError, match=r"crane-fr\.safetensors: not a readable mask file"):
        transfer_masks(masks, chat, out, ["crane-vi", "crane-fr"])
    with pytest.raises(MaskFileError, match=r"'\.\./crane-vi' is not allowed"):
        transfer_masks(masks, chat, out, ["../crane-vi"])
    with pytest.raises(MaskFileError, match="nowhere is not a directory"):
        transfer_masks(tmp_path / "nowhere", chat, out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MaskFileError, match="empty holds no mask files"):
        transfer_masks(tmp_path / "empty", chat, out)
    assert not out.exists()


def crane(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(argument) for argument in arguments])


def test_the_command_transfers_and_the_others_tell(
    masks: Path, out: Path, models: dict[str, Path], fingerprints: dict[str, Fingerprint]
) -> None:
    result = crane("masks", "transfer", masks, "--to", models["chat"], "--out", out, "crane-vi")
    assert result.exit_code == 0
    assert result.stdout == f"{out / 'crane-vi.safetensors'}\n"
    assert "crane, transferred" in crane("masks", "list", out).stdout
    assert "transferred" not in crane("masks", "list", masks).stdout
    shown = json.loads(crane("masks", "show", out / "crane-vi.safetensors").stdout)
    assert shown["transferred_from"] == fingerprints["base"].model_dump(mode="json")
    assert shown["fingerprint"] == fingerprints["chat"].model_dump(mode="json")
    assert json.loads(crane("masks", "show", masks, "crane-vi").stdout)["transferred_from"] is None


def test_the_command_refuses_in_one_line(masks: Path, out: Path, models: dict[str, Path]) -> None:
    result = crane("masks", "transfer", masks, "--to", models["deep"], "--out", out)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: mask 'crane-vi' cannot be transferred: the layers of its model")
    assert result.stderr.count("\n") == 1
