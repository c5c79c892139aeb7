"""Import of LAPE's published files: every index is checked, no code runs, and it is all or nothing."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crane_serve.common.masks import Fingerprint, MaskFileError, read_mask
from crane_serve.common.masks.lape import import_lape

Neurons = list[list[Tensor]]


def neurons() -> Neurons:
    """Published shape for two languages and layers of 6 and 5 neurons: [language][layer] -> LongTensor."""
    return [
        [torch.tensor([0, 5]), torch.tensor([], dtype=torch.int64)],
        [torch.tensor([3]), torch.tensor([4, 0, 4])],
    ]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "activation_mask.tiny"
    torch.save(neurons(), path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "masks"


def test_writes_one_mask_per_language(file: Path, out: Path, fingerprint: Fingerprint) -> None:
    paths = import_lape(file, ["en", "zh_hant-2"], fingerprint, out)
    assert paths == [out / "lape-en.safetensors", out / "lape-zh_hant-2.safetensors"]
    first, second = map(read_mask, paths)
    assert first.mask.neuron_sets() == [[0, 5], []]
    assert second.mask.neuron_sets() == [[3], [0, 4]]
    assert bool((second.mask.intermediate[1, [0, 4]] == 0).all())
    assert first.info.fingerprint == fingerprint
    assert (second.info.language, second.info.method) == ("zh_hant-2", "lape")
    assert second.info.budget == pytest.approx(3 / 11)
    assert second.info.parameters == {"imported_from": "activation_mask.tiny"}


@pytest.mark.parametrize(
    "save",
    [
        pytest.param(lambda path: torch.save(tuple(map(tuple, neurons())), path), id="tuples"),
        pytest.param(
            lambda path: torch.save(neurons(), path, _use_new_zipfile_serialization=False), id="old file format"
        ),
        pytest.param(
            lambda path: torch.save([[row.flip(0) for row in layers] for layers in neurons()], path), id="another order"
        ),
    ],
)
def test_reads_other_ways_to_save_the_same(
    file: Path, out: Path, fingerprint: Fingerprint, save: Callable[[Path], None]
) -> None:
    save(file)
    masks = [read_mask(path).mask for path in import_lape(file, ["en", "zh"], fingerprint, out)]
    assert [mask.neuron_sets() for mask in masks] == [[[0, 5], []], [[3], [0, 4]]]


PAIRS = [[[0, 0], [0, 5], [0, 0]], [[0, 3], [1, 4], [1, 0]]]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(PAIRS, id="lists of pairs"),
        pytest.param([[tuple(pair) for pair in pairs] for pairs in PAIRS], id="tuples"),
        pytest.param([torch.tensor(pairs) for pairs in PAIRS], id="tensors of pairs"),
        pytest.param({"zh": torch.tensor(PAIRS[1]), "en": PAIRS[0]}, id="pairs by language"),
        pytest.param([[[0, 5], []], [[3], [0, 4]]], id="lists of numbers"),
        pytest.param([[row.int() for row in layers] for layers in neurons()], id="int32"),
        pytest.param({"zh": neurons()[1], "en": neurons()[0]}, id="by language"),
        pytest.param({"zh": dict(enumerate(neurons()[1])), "en": {"0": [0, 5]}}, id="by language and layer"),
    ],
)
def test_reads_other_forms(file: Path, out: Path, fingerprint: Fingerprint, content: Any) -> None:
    torch.save(content, file)
    masks = [read_mask(path).mask for path in import_lape(file, ["en", "zh"], fingerprint, out)]
    assert [mask.neuron_sets() for mask in masks] == [[[0, 5], []], [[3], [0, 4]]]


@pytest.mark.parametrize("content", [[[0, 5], [1, 3], [1, 4]], torch.tensor([[1, 4], [0, 5], [1, 3]])])
def test_pairs_alone_are_one_language(file: Path, out: Path, fingerprint: Fingerprint, content: Any) -> None:
    torch.save(content, file)
    (path,) = import_lape(file, ["en"], fingerprint, out)
    assert read_mask(path).mask.neuron_sets() == [[5], [3, 4]]


def _last(value: Any) -> list[list[Any]]:
    content: list[list[Any]] = neurons()
    content[1][1] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_last(torch.tensor([5])), "zh: layer 1: neuron 5 is out of range, expected 0 to 4"),
        (_last(torch.tensor([-1])), "zh: layer 1: neuron -1 is out of range"),
        (_last(torch.tensor([2**62])), "neuron 4611686018427387904 is out of range"),
        (_last(torch.tensor([1.0])), r"zh, layer 1: expected a one-dimensional .* found a tensor of float32 \[1\]"),
        (_last(torch.tensor([True])), r"one-dimensional .* a tensor of bool \[1\]"),
        (_last(torch.tensor([[1]])), r"one-dimensional .* a tensor of int64 \[1, 1\]"),
        (_last(torch.tensor(1)), r"one-dimensional .* a tensor of int64 \[\]"),
        (_last(torch.tensor([0, 1]).to_sparse()), "one-dimensional"),
        (_last(torch.zeros(3, dtype=torch.int64, device="meta")), "one-dimensional"),
        (_last([1, True]), "one-dimensional .* found list of 2"),
        (_last([1, 2.0]), "one-dimensional .* found list of 2"),
        (_last(None), "one-dimensional .* found NoneType"),
        ([layers[:1] for layers in neurons()], "en: neuron sets for 1 layers, expected 2"),
        ([[*layers, layers[0]] for layers in neurons()], "en: neuron sets for 3 layers, expected 2"),
        (neurons()[:1], "holds 1 languages, but 2 labels were given"),
        ([*neurons(), neurons()[0]], "holds 3 languages, but 2 labels were given"),
        ([], "holds 0 languages"),
        ({"en": neurons()[0]}, "holds the languages en; expected the labels en, zh"),
        ({"en": neurons()[0], "zh": {2: [1]}}, "zh: there is no layer '2' of 2"),
        ({"en": neurons()[0], "zh": {"up": [1]}}, "zh: there is no layer 'up' of 2"),
        ({"en": neurons()[0], "zh": 7}, "zh: expected .* found int"),
        (torch.tensor([[1], [2]]), r"expected list.* found a tensor of int64 \[2, 1\]"),
        ([neurons()[0], torch.tensor([1, 2])], r"expected list.* found a tensor of int64 \[2\] in a list"),
        ([neurons()[0], torch.zeros(2, 6, dtype=torch.bool)], r"found a tensor of bool \[2, 6\] in a list"),
        ([neurons()[0], None], "expected list.* found NoneType in a list"),
        ("text", "found str"),
        (torch.tensor([[0, 5]]), r"found a tensor of int64 \[1, 2\]"),
        ([[0, 5], [1, 3], [1, 4]], r"holds 3 languages, but 2 labels were given \(pairs"),
        ([neurons()[0], torch.tensor([[2, 3]])], r"zh: pair \[2, 3\]: there is no layer 2 of 2"),
        ([neurons()[0], torch.tensor([[-1, 3]])], r"zh: pair \[-1, 3\]: there is no layer -1 of 2"),
        ([neurons()[0], torch.tensor([[1, 5]])], "zh: layer 1: neuron 5 is out of range, expected 0 to 4"),
        ([neurons()[0], [[0, 3], [1, 4]]], "zh: 2 lists of two numbers may be pairs"),
    ],
)
def test_refuses_other_content(file: Path, out: Path, fingerprint: Fingerprint, content: Any, message: str) -> None:
    torch.save(content, file)
    with pytest.raises(MaskFileError, match=message):
        import_lape(file, ["en", "zh"], fingerprint, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["en"], "holds 2 languages, but 1 labels"),
        ([], "holds 2 languages, but 0 labels"),
        (["en", "en"], "labels en, en are not all different"),
        (["en", "ZH"], "mask name 'ZH' is not allowed"),
        (["en", ""], "mask name '' is not allowed"),
        (["en", "../zh"], "is not allowed"),
        (["en", "none"], "reserved"),
        (["en", "x" * 124], "is not allowed"),
    ],
)
def test_refuses_labels(file: Path, out: Path, fingerprint: Fingerprint, labels: list[str], message: str) -> None:
    with pytest.raises(MaskFileError, match=message):
        import_lape(file, labels, fingerprint, out)
    assert not out.exists()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda _: b"", id="empty"),
        pytest.param(lambda _: b"hello", id="text"),
        pytest.param(lambda _: bytes(range(256)) * 20, id="random bytes"),
        pytest.param(lambda content: content[: len(content) // 2], id="half"),
        pytest.param(lambda _: pickle.dumps([[1, 2]], protocol=2)[:-2], id="half a pickle"),
        pytest.param(lambda _: b"\x80\x02t.", id="pickle of nothing"),
        pytest.param(lambda _: b"\x80\x02J.", id="pickle with a cut number"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_refuses_damaged_files(
    file: Path, out: Path, fingerprint: Fingerprint, damage: Callable[[bytes], bytes]
) -> None:
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(MaskFileError, match=f"^{file}: not a LAPE neuron file: .") as refused:
        import_lape(file, ["en", "zh"], fingerprint, out)
    assert "\n" not in str(refused.value)
    assert not out.exists()


def test_names_a_missing_file(tmp_path: Path, out: Path, fingerprint: Fingerprint) -> None:
    with pytest.raises(MaskFileError, match=r"missing: not a LAPE neuron file: .*No such file"):
        import_lape(tmp_path / "missing", ["en"], fingerprint, out)


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize(
    "save",
    [
        pytest.param(lambda content, path: torch.save(content, path), id="torch"),
        pytest.param(
            lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False), id="old torch"
        ),
        pytest.param(lambda content, path: path.write_bytes(pickle.dumps(content)), id="pickle"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_runs_no_code_of_the_file(
    tmp_path: Path, file: Path, out: Path, fingerprint: Fingerprint, save: Callable[[Any, Path], None]
) -> None:
    trace = tmp_path / "trace"
    save([neurons()[0], [Payload(trace)]], file)
    with pytest.raises(MaskFileError, match="not a LAPE neuron file"):
        import_lape(file, ["en", "zh"], fingerprint, out)
    assert not trace.exists()
    assert not out.exists()
