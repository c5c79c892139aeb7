"""MaskLibrary: which masks a directory holds, and which one a request means."""

import math
import tracemalloc
from pathlib import Path

import pytest
import torch

from crane_serve.common.masks import (
    Fingerprint,
    InvalidMask,
    MaskError,
    MaskFileError,
    MaskInfo,
    MaskLibrary,
    Member,
    NeuronMask,
    UnknownMask,
    write_mask,
)

NEURONS = {
    "attnlrp-en": [[0], [1]],
    "attnlrp-zh": [[1, 2], []],
    "attnlrp-vi": [[], [3, 4]],
    "lape-zh": [[5], []],
    "vi": [[3], [0]],
}


def write(directory: Path, name: str, neurons: list[list[int]], fingerprint: Fingerprint) -> NeuronMask:
    mask = NeuronMask.switching_off(neurons, fingerprint.intermediate_sizes)
    write_mask(directory, name, mask, MaskInfo(language="xx", method="test", fingerprint=fingerprint))
    return mask


@pytest.fixture
def directory(tmp_path: Path, fingerprint: Fingerprint) -> Path:
    for name, neurons in NEURONS.items():
        write(tmp_path, name, neurons, fingerprint)
    return tmp_path


@pytest.fixture
def library(directory: Path, fingerprint: Fingerprint) -> MaskLibrary:
    return MaskLibrary.load(directory, fingerprint, "attnlrp")


def test_lists_unusable_files_with_the_reason(directory: Path, fingerprint: Fingerprint) -> None:
    (directory / "corrupt.safetensors").write_bytes(b"nothing")
    (directory / "Bad.Name.safetensors").write_bytes(b"nothing")
    other = fingerprint.model_copy(update={"weights_digest": "d" * 64})
    write(directory, "foreign", [[0], []], other)
    (directory / "notes.txt").write_text("not a mask")
    (directory / ".scratch.safetensors").write_bytes(b"half-written")

    library = MaskLibrary.load(directory, fingerprint)
    assert list(library.masks) == sorted(NEURONS)
    assert list(library.invalid) == ["Bad.Name", "corrupt", "foreign"]
    assert "not a readable mask file" in library.invalid["corrupt"]
    assert "mask name 'Bad.Name' is not allowed" in library.invalid["Bad.Name"]
    reason = "mask 'foreign' was made for another model: its weights_digest is dddddddddddddddd..., this model has bbbb"
    assert reason in library.invalid["foreign"]
    assert not any(str(directory) in reason for reason in library.invalid.values())
    with pytest.raises(InvalidMask, match=r"mask 'corrupt' cannot be used: .*not a readable mask file"):
        library.resolve("corrupt")
    assert library.resolve("vi") is not None


def test_a_file_with_scales_beyond_the_bound_is_listed_with_it(
    directory: Path, fingerprint: Fingerprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("crane_serve.common.masks.mask.MAX_SCALE", math.inf)
        mask = NeuronMask(torch.full((2, 6), 3e38).where(torch.tensor([[1] * 6, [1] * 5 + [0]]) == 1, 1), (6, 5))
        write_mask(directory, "large", mask, MaskInfo(language="xx", method="test", fingerprint=fingerprint))
    library = MaskLibrary.load(directory, fingerprint)
    assert "'intermediate' holds a scale of size 3e+38, expected at most 10000 in absolute" in library.invalid["large"]
    with pytest.raises(InvalidMask, match="at most 10000"):
        library.resolve("large,vi@100")


def test_an_empty_directory_is_a_library(tmp_path: Path, fingerprint: Fingerprint) -> None:
    library = MaskLibrary.load(tmp_path, fingerprint)
    assert library.masks == {}
    with pytest.raises(UnknownMask, match="unknown mask 'zh'; this server has no masks"):
        library.resolve("zh")


def test_refuses_what_is_no_directory(tmp_path: Path, fingerprint: Fingerprint) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(MaskFileError, match=f"{path} is not a directory of mask files"):
            MaskLibrary.load(path, fingerprint)


@pytest.mark.parametrize(
    ("expression", "name"),
    [
        ("attnlrp-zh", "attnlrp-zh"),
        ("zh", "attnlrp-zh"),
        ("en", "attnlrp-en"),
        ("vi", "vi"),  # the exact name beats the default method
        ("lape-zh", "lape-zh"),
        ("zh,en", "attnlrp-en,attnlrp-zh"),
        (" en , zh ", "attnlrp-en,attnlrp-zh"),
        ("zh,attnlrp-zh", "attnlrp-zh"),
        ("vi,attnlrp-vi", "attnlrp-vi,vi"),
    ],
)
def test_resolves_names(library: MaskLibrary, expression: str, name: str) -> None:
    resolved = library.resolve(expression)
    assert resolved is not None
    assert resolved.name == name
    members = [library.masks[member].mask for member in name.split(",")]
    product = torch.stack([mask.intermediate for mask in members]).prod(dim=0)
    assert torch.equal(resolved.mask.whole().intermediate, product)
    assert resolved.wire == ",".join(sorted(mask.digest for mask in members))


@pytest.mark.parametrize("expression", ["zh", "zh,en", "vi,attnlrp-vi,en", "zh@0.1", "en@2,zh"])
def test_the_wire_form_means_the_same(library: MaskLibrary, expression: str) -> None:
    resolved = library.resolve(expression)
    assert resolved is not None
    again = library.resolve(resolved.wire)
    assert again is not None
    assert (again.name, again.wire, again.mask.digest) == (resolved.name, resolved.wire, resolved.mask.digest)


@pytest.mark.parametrize(("expression", "factor"), [("zh@0.5", 0.5), ("attnlrp-zh@2", 2.0), ("zh@1e-1", 0.1)])
def test_a_factor_scales_a_mask(library: MaskLibrary, expression: str, factor: float) -> None:
    resolved = library.resolve(expression)
    assert resolved is not None
    assert resolved.name == f"attnlrp-zh@{factor}"
    mask = library.masks["attnlrp-zh"].mask
    assert resolved.wire == f"{mask.digest}@{factor}"
    expected = mask.intermediate.clone()
    expected[expected == 0] = factor
    assert torch.equal(resolved.mask.whole().intermediate, expected)


def test_factors_join_with_other_masks(library: MaskLibrary) -> None:
    resolved = library.resolve("en@0.5,zh")
    assert resolved is not None
    assert resolved.name == "attnlrp-en@0.5,attnlrp-zh"
    assert resolved.mask.whole().intermediate[0, :3].tolist() == [0.5, 0.0, 0.0]


@pytest.mark.parametrize("expression", ["zh,zh", "zh@0", "zh@-0.0", "zh@0,attnlrp-zh", "zh@1e-999", "DIGEST@0,zh"])
def test_one_mask_as_it_is_has_one_identity(library: MaskLibrary, expression: str) -> None:
    plain = library.resolve("zh")
    assert plain is not None
    same = library.resolve(expression.replace("DIGEST", plain.mask.digest))
    assert same is not None
    assert (same.name, same.wire, same.mask.digest) == (plain.name, plain.wire, plain.mask.digest)
    assert same.mask.digest == library.masks["attnlrp-zh"].mask.digest


def test_different_contents_have_different_identities(library: MaskLibrary) -> None:
    names = ["en", "zh", "vi", "en@0.5", "zh@0.5", "zh@0.05", "en@1", "en,zh", "en,zh@0.5", "en@0.5,zh", "en,zh,vi"]
    resolved = [library.resolve(name) for name in [*names, "zh,zh@0.5", "zh@2,zh@0.5"]]
    assert len({one.mask.digest for one in resolved if one}) == len(resolved)


def test_a_digest_means_its_content_whatever_files_are_called(directory: Path, fingerprint: Fingerprint) -> None:
    digest = NeuronMask.switching_off(NEURONS["lape-zh"], fingerprint.intermediate_sizes).digest
    write(directory, digest, [[4], [4]], fingerprint)
    write(directory, f"attnlrp-{digest}", [[3], [4]], fingerprint)
    resolved = MaskLibrary.load(directory, fingerprint, "attnlrp").resolve(digest)
    assert resolved is not None
    assert resolved.mask.digest == digest


@pytest.mark.parametrize("expression", [None, "none"])
def test_none_means_unmasked(library: MaskLibrary, expression: str | None) -> None:
    assert library.resolve(expression) is None


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "malformed"),
        (" ", "malformed"),
        (",", "malformed"),
        ("zh,", "mask 'zh,' is malformed; expected a name, or names joined with commas"),
        (",zh", "malformed"),
        ("zh,,vi", "malformed"),
        ("none,zh", "joins 'none' with other masks"),
        ("zh, none", "joins 'none' with other masks"),
        ("zh@", "mask 'zh@': '' is no factor; expected a number from 0 to 100"),
        ("zh@half", "'half' is no factor"),
        ("zh@-1", "'-1' is no factor"),
        ("zh@nan", "'nan' is no factor"),
        ("zh@inf", "'inf' is no factor"),
        ("zh@101", "'101' is no factor"),
        ("zh@0.5@2", "'0.5@2' is no factor"),
        (",".join(["zh"] * 17), "joins 17 masks; at most 16 are allowed"),
        ("zh," * 100_000, "has 300000 characters; at most 4096 are allowed"),
        ("z" * 4097, "has 4097 characters; at most 4096 are allowed"),
        ("zh@100,en@100,vi@100", "scales that may multiply to 1e\\+06, expected at most 10000"),
        ("zh@100,zh@99,zh@98", "'zh@100,zh@99,zh@98': scales that may multiply to 9.7e\\+05, expected at most 10000"),
    ],
)
def test_refuses_malformed_expressions(library: MaskLibrary, expression: str, message: str) -> None:
    with pytest.raises(MaskError, match=message) as refused:
        library.resolve(expression)
    assert type(refused.value) is MaskError


@pytest.mark.parametrize("expression", ["fr", "zh,fr", "ZH", "attnlrp", "../zh", "0" * 64])
def test_unknown_masks_are_answered_with_the_known(library: MaskLibrary, expression: str) -> None:
    with pytest.raises(UnknownMask, match=r"this server has attnlrp-en, attnlrp-vi, attnlrp-zh, lape-zh, vi$"):
        library.resolve(expression)


def test_without_default_method_a_language_is_no_name(directory: Path, fingerprint: Fingerprint) -> None:
    library = MaskLibrary.load(directory, fingerprint)
    assert library.resolve("vi") is not None
    with pytest.raises(UnknownMask, match="unknown mask 'zh'"):
        library.resolve("zh")


def test_a_broken_default_mask_is_not_silently_another(directory: Path, fingerprint: Fingerprint) -> None:
    (directory / "attnlrp-zh.safetensors").write_bytes(b"nothing")
    with pytest.raises(InvalidMask, match="mask 'attnlrp-zh' cannot be used"):
        MaskLibrary.load(directory, fingerprint, "attnlrp").resolve("zh")


def test_nothing_is_multiplied_to_know_what_a_request_means(
    library: MaskLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the front end nor where a worker looks a wire form up: only rows are multiplied, layer by layer."""
    monkeypatch.setattr(Member, "moved", None)
    resolved = library.resolve("en@0.5,zh,vi")
    assert resolved is not None
    mask = library.mask_of(resolved.wire)
    assert (mask.digest, mask.neurons) == (resolved.mask.digest, 6)
    parts = {member.mask.digest for member in mask.members}
    assert parts == {library.get(name).mask.digest for name in ("en", "zh", "vi")}
    assert all(member.mask is library.get(member.mask.digest).mask for member in mask.members)


def test_what_is_remembered_of_many_expressions_is_small(library: MaskLibrary) -> None:
    """No more than 1,024 of the longest, 8 KB each; before, every one kept scales of its own."""

    def remember(first: int, last: int) -> None:
        for number in range(first, last):
            parts = (
                f"{name}@{(number + place) / 16384!r}" for place, name in enumerate(["en", "zh", "vi", "lape-zh"] * 4)
            )
            library.mask_of(",".join(parts))

    remember(0, 10)
    tracemalloc.start()
    try:
        remember(0, 4096)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1024 * 8192


def test_the_manifest_follows_names_and_contents(directory: Path, fingerprint: Fingerprint) -> None:
    def manifest() -> str:
        return MaskLibrary.load(directory, fingerprint).manifest

    seen = [manifest()]
    assert manifest() == seen[0]
    write(directory, "vi", [[3], [1]], fingerprint)
    seen.append(manifest())
    (directory / "vi.safetensors").rename(directory / "vietnamese.safetensors")
    seen.append(manifest())
    (directory / "vietnamese.safetensors").unlink()
    seen.append(manifest())
    assert len(set(seen)) == len(seen)
