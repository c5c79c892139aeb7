"""Mask files: what is written is read back, and anything else is refused with the reason."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from crane_serve.common.masks import Fingerprint, MaskFileError, MaskInfo, NeuronMask, read_mask, write_mask

Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


@pytest.fixture
def info(fingerprint: Fingerprint) -> MaskInfo:
    return MaskInfo(
        language="zh",
        method="attnlrp",
        fingerprint=fingerprint,
        budget=0.01,
        corpus_digest="c" * 64,
        parameters={"seed": 3, "contrast": {"kind": "share"}, "note": "汉语"},
    )


@pytest.fixture
def mask(fingerprint: Fingerprint) -> NeuronMask:
    intermediate = torch.ones(2, 6)
    intermediate[0, 1], intermediate[1, 2] = 0.0, 0.5
    output = torch.ones(2, 4)
    output[1, 3] = 0.0
    return NeuronMask(intermediate, fingerprint.intermediate_sizes, output)


@pytest.fixture
def path(tmp_path: Path, mask: NeuronMask, info: MaskInfo) -> Path:
    return write_mask(tmp_path / "masks", "attnlrp-zh", mask, info)


def rewrite(path: Path, change: Change) -> None:
    """Write the file again with changed tensors and metadata, but a consistent safetensors header."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = json.loads(file.metadata()["crane"])
    change(tensors, metadata)
    save_file(tensors, path, metadata={"crane": json.dumps(metadata)})


def test_reads_back_what_was_written(path: Path, mask: NeuronMask, info: MaskInfo) -> None:
    stored = read_mask(path)
    assert path.name == "attnlrp-zh.safetensors"
    assert stored.name == "attnlrp-zh"
    assert stored.mask.digest == mask.digest
    assert torch.equal(stored.mask.intermediate, mask.intermediate)
    assert stored.mask.output is not None
    assert mask.output is not None
    assert torch.equal(stored.mask.output, mask.output)
    assert stored.info == info


def test_reads_back_where_a_mask_was_transferred_from(tmp_path: Path, mask: NeuronMask, info: MaskInfo) -> None:
    origin = info.fingerprint.model_copy(update={"weights_digest": "e" * 64})
    transferred = info.model_copy(update={"transferred_from": origin})
    assert read_mask(write_mask(tmp_path, "zh", mask, transferred)).info == transferred


def test_reads_a_file_that_does_not_speak_of_transfers(path: Path, info: MaskInfo) -> None:
    rewrite(path, lambda _, metadata: metadata.pop("transferred_from"))
    assert read_mask(path).info == info
    assert info.transferred_from is None


def test_leaves_out_an_absent_output(tmp_path: Path, info: MaskInfo) -> None:
    written = write_mask(tmp_path, "zh", NeuronMask.switching_off([[0], []], (6, 5)), info)
    assert read_mask(written).mask.output is None


def test_writes_over_a_file_of_the_same_name(path: Path, info: MaskInfo) -> None:
    other = NeuronMask.switching_off([[0], []], (6, 5))
    assert write_mask(path.parent, path.stem, other, info) == path
    assert read_mask(path).mask.digest == other.digest
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_provenance_is_no_part_of_the_identity(path: Path, mask: NeuronMask, info: MaskInfo) -> None:
    other = write_mask(path.parent, "other", mask, info.model_copy(update={"language": "vi", "budget": None}))
    assert read_mask(other).mask.digest == read_mask(path).mask.digest


def test_written_files_are_readable_by_others(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o644


def cut(keep: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(len(content) * keep)]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(cut(0.99), id="last bytes missing"),
        pytest.param(cut(0.5), id="half"),
        pytest.param(cut(0.005), id="first bytes only"),
        pytest.param(lambda _: b"", id="empty"),
        pytest.param(lambda _: bytes(range(256)) * 8, id="random bytes"),
        pytest.param(lambda _: b"\xff" * 100, id="huge header"),
        pytest.param(lambda content: content + b"\0" * 4, id="bytes too many"),
    ],
)
def test_refuses_a_damaged_file(path: Path, damage: Callable[[bytes], bytes]) -> None:
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(MaskFileError, match=rf"^{path}: not a readable mask file"):
        read_mask(path)


def test_refuses_every_flipped_byte_of_the_tensors(path: Path) -> None:
    content = path.read_bytes()
    tensor_bytes = 4 * (2 * 6 + 2 * 4)
    for position in range(len(content) - tensor_bytes, len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x11]) + content[position + 1 :])
        with pytest.raises(MaskFileError):
            read_mask(path)


def test_refuses_a_number_format_without_arithmetic(path: Path) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    del header["output"]
    header["intermediate"] = {"dtype": "F4", "shape": [2, 12], "data_offsets": [0, 12]}
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + bytes(12))
    with pytest.raises(MaskFileError, match="not a readable mask file"):
        read_mask(path)


@pytest.mark.parametrize("name", ["missing.safetensors", "folder.safetensors"])
def test_refuses_a_path_that_is_no_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(MaskFileError, match="not a readable mask file"):
        read_mask(tmp_path / name)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "no 'crane' metadata; this is not a mask file"),
        ({"format": "pt"}, "no 'crane' metadata"),
        ({"crane": "{"}, "metadata 'crane'.*[Ii]nvalid JSON"),
        ({"crane": "[]"}, "metadata 'crane'"),
        ({"crane": "{}"}, "metadata field 'language': Field required"),
    ],
)
def test_refuses_a_file_without_usable_metadata(tmp_path: Path, metadata: dict[str, str] | None, message: str) -> None:
    path = tmp_path / "zh.safetensors"
    save_file({"intermediate": torch.ones(2, 6)}, path, metadata=metadata)
    with pytest.raises(MaskFileError, match=message):
        read_mask(path)


def _set(key: str, value: object) -> Change:
    return lambda tensors, metadata: metadata.update({key: value})


def _tensor(name: str, value: Tensor) -> Change:
    return lambda tensors, metadata: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format_version", 2), "format version 2, this program reads 1"),
        (_set("format_version", "one"), "metadata field 'format_version'"),
        (_set("digest", "0" * 64), "content digest is .* metadata says 0000"),
        (_set("neurons", [[1], []]), "neuron sets in the metadata differ"),
        (_set("neurons", [[1]]), "neuron sets in the metadata differ"),
        (_set("fingerprint", {}), "metadata field 'fingerprint.architecture': Field required"),
        (lambda tensors, metadata: metadata["fingerprint"].update(extra=1), "metadata field 'fingerprint.extra'"),
        (lambda tensors, metadata: metadata["fingerprint"].update(hidden_size=5), "'output' has 4 columns, expected 5"),
        (
            lambda tensors, metadata: metadata["fingerprint"].update(intermediate_sizes=[6, 6]),
            "content digest is",
        ),
        (
            lambda tensors, metadata: metadata["fingerprint"].update(intermediate_sizes=[6]),
            r"shape \[2, 6\], expected \[1, 6\]",
        ),
        (
            lambda tensors, metadata: metadata["fingerprint"].update(intermediate_sizes=[]),
            r"shape \[2, 6\], expected \[0, 0\]",
        ),
        (_tensor("intermediate", torch.ones(2, 6)), "content digest is"),
        (_tensor("intermediate", torch.full((2, 6), float("nan"))), "not finite"),
        (_tensor("intermediate", torch.ones(2, 6, dtype=torch.int32)), "expected floating point"),
        (_tensor("output", torch.ones(2, 4)), "content digest is"),
        (_tensor("output", torch.ones(2, 3)), "'output' has 3 columns, expected 4"),
        (_tensor("output", torch.ones(1, 4)), r"'output' has shape \[1, 4\]"),
        (_tensor("surplus", torch.ones(1)), r"tensors \['intermediate', 'output', 'surplus'\], expected"),
        (lambda tensors, metadata: tensors.pop("intermediate"), r"tensors \['output'\], expected 'intermediate'"),
        (lambda tensors, metadata: tensors.pop("output"), "content digest is"),
    ],
)
def test_refuses_what_contradicts_itself(path: Path, change: Change, message: str) -> None:
    rewrite(path, change)
    with pytest.raises(MaskFileError, match=message) as refused:
        read_mask(path)
    assert str(path) in str(refused.value)


BAD_NAMES = ["", "ZH", "attnlrp.zh", "../zh", "a/b", "a b", "zh,vi", "汉语", "zh\n", "x" * 129, "none"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_writes_no_mask_that_could_not_be_asked_for(
    tmp_path: Path, mask: NeuronMask, info: MaskInfo, name: str
) -> None:
    with pytest.raises(MaskFileError, match="mask name"):
        write_mask(tmp_path / "masks", name, mask, info)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["ZH", "attnlrp.zh", "none"])
def test_reads_no_mask_that_could_not_be_asked_for(path: Path, name: str) -> None:
    with pytest.raises(MaskFileError, match=f"mask name '{name}'"):
        read_mask(path.rename(path.with_name(f"{name}.safetensors")))


@pytest.mark.parametrize("name", ["a", "0", "-", "_", "x" * 128, "none-zh", "lape-none"])
def test_reads_every_name_it_writes(tmp_path: Path, mask: NeuronMask, info: MaskInfo, name: str) -> None:
    assert read_mask(write_mask(tmp_path, name, mask, info)).name == name


@pytest.mark.parametrize(
    ("sizes", "message"), [((6, 6), r"intermediate sizes"), ((6, 5), r"'output' has 3 columns, expected 4")]
)
def test_writes_no_mask_that_contradicts_its_fingerprint(
    tmp_path: Path, info: MaskInfo, sizes: tuple[int, ...], message: str
) -> None:
    with pytest.raises(MaskFileError, match=message):
        write_mask(tmp_path, "zh", NeuronMask(torch.ones(2, 6), sizes, torch.ones(2, 3)), info)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("owner", "function"), [(os, "fsync"), (Path, "chmod"), (Path, "replace")])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "interrupt"])
def test_failed_write_leaves_no_file(
    tmp_path: Path,
    mask: NeuronMask,
    info: MaskInfo,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    function: str,
    error: BaseException,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(owner, function, fail)
    with pytest.raises(type(error)):
        write_mask(tmp_path, "zh", mask, info)
    assert list(tmp_path.iterdir()) == []


def test_failed_write_keeps_the_old_file(path: Path, info: MaskInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    digest = read_mask(path).mask.digest
    with pytest.raises(OSError, match="disk full"):
        write_mask(path.parent, path.stem, NeuronMask.switching_off([[0], []], (6, 5)), info)
    assert read_mask(path).mask.digest == digest
