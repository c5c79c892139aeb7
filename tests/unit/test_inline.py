"""InlineMask: neurons that a request brings with it; what identifies them, what is refused, and what is kept."""

import gc
import json
import tracemalloc
import weakref
from itertools import combinations
from typing import Any

import pytest
import torch

from crane_serve.common.masks import (
    Composition,
    Fingerprint,
    InlineMask,
    InlineMasksOff,
    MaskError,
    MaskInfo,
    MaskLibrary,
    Member,
    NeuronMask,
    Positions,
    StoredMask,
    inline_content,
)
from crane_serve.common.masks import library as library_module
from crane_serve.common.masks.inline import _MAX_TEXT, MAX_NEURONS
from crane_serve.engine.table import MaskTable, Part

SIZES = (6, 5)
OFF: dict[str, Any] = {"neurons": {"0": [1, 4], "1": [0]}}
MOVED: dict[str, Any] = {"neurons": {"1": [2, 0]}, "scale": 0.1, "offset": -2.5}


def of_file(content: dict[str, Any]) -> Composition:
    """The same content as a mask file has it."""
    scales, offsets = torch.ones(2, 6), torch.zeros(2, 6)
    for layer, neurons in content["neurons"].items():
        scales[int(layer), neurons] = content.get("scale", 0)
        offsets[int(layer), neurons] = content.get("offset", 0)
    return Composition([Member(NeuronMask(scales, SIZES, offset=offsets))])


@pytest.fixture
def library(fingerprint: Fingerprint) -> MaskLibrary:
    info = MaskInfo(language="zh", method="attnlrp", fingerprint=fingerprint)
    mask = NeuronMask.switching_off([OFF["neurons"]["0"], OFF["neurons"]["1"]], SIZES)
    library = MaskLibrary(fingerprint, {"zh": StoredMask("zh", mask, info)})
    library.allows_inline = True
    return library


@pytest.mark.parametrize("content", [OFF, MOVED, {"neurons": {"0": [5]}, "scale": 1, "offset": 1}])
def test_the_neurons_of_a_request_are_those_of_a_file_with_the_same_content(content: dict[str, Any]) -> None:
    inline, stored = InlineMask.read(content, SIZES), of_file(content)
    assert (inline.neurons, inline.offsets) == (stored.neurons, stored.offsets)
    assert (inline.scales_outputs, inline.experts_off) == (stored.scales_outputs, stored.experts_off)
    for layer in range(2):
        assert torch.equal(inline.intermediate(layer), stored.intermediate(layer))
        for start, stop in combinations(range(7), 2):  # shards of any size
            assert torch.equal(inline.intermediate(layer, start, stop), stored.intermediate(layer, start, stop))
            added = [of.offset(layer, start, stop) for of in (inline, stored)]
            mine, theirs = (torch.zeros(stop - start) if offset is None else offset for offset in added)
            assert torch.equal(mine, theirs)
        assert inline.output(layer) is inline.router(layer) is None


def test_rows_of_requests_and_of_files_stand_side_by_side() -> None:
    masks = [InlineMask.read(MOVED, SIZES), of_file(OFF), InlineMask.read(OFF, SIZES), of_file(MOVED)]
    held = {layer: Part(torch.ones(6, size), 0, size, None, torch.zeros(6, size)) for layer, size in enumerate(SIZES)}
    table = MaskTable({layer: [part] for layer, part in held.items()})
    rows = table.assign(masks)
    assert len(set(rows)) == 4
    for part in held.values():
        assert part.offsets is not None
        for inline, stored in ((rows[0], rows[3]), (rows[2], rows[1])):
            assert torch.equal(part.table[inline], part.table[stored])
            assert torch.equal(part.offsets[inline], part.offsets[stored])
    assert table.assign([InlineMask.read({"scale": -0.0, "neurons": {"1": [0], "0": [4, 1]}}, SIZES)]) == [rows[2]]


@pytest.mark.parametrize(
    "other",
    [
        {"neurons": {"1": [0], "0": [4, 1]}},
        {**OFF, "scale": 0},
        {**OFF, "scale": -0.0, "offset": 0.0},
        {**OFF, "offset": 1e-60},  # 0 as a float32
        {"neurons": {**OFF["neurons"]}, "scale": 0.0},
    ],
)
def test_the_same_content_has_one_identity(other: dict[str, Any]) -> None:
    one, same = InlineMask.read(OFF, SIZES), InlineMask.read(other, SIZES)
    assert (same.wire, same.digest) == (one.wire, one.digest)
    assert one.wire == 'neurons:{"neurons":{"0":[1,4],"1":[0]},"scale":0.0}'
    again = InlineMask.parse(one.wire, SIZES)
    assert (again.wire, again.digest, again.neurons) == (one.wire, one.digest, 3)


def test_scales_that_are_equal_in_the_table_are_equal() -> None:
    one, same = (InlineMask.read({**OFF, "scale": scale}, SIZES) for scale in (0.1, 0.1 + 1e-12))
    assert (one.digest, one.wire) == (same.digest, same.wire)
    assert InlineMask.parse(one.wire, SIZES).wire == one.wire


def test_no_two_contents_have_one_identity() -> None:
    contents = [
        OFF,
        {"neurons": {"0": [1], "1": [0]}},
        {"neurons": {"0": [1, 4, 0]}},
        {"neurons": {"1": [1, 4], "0": [0]}},
        *({**OFF, "scale": scale} for scale in (1, 0.5, -0.5, 1e-30)),
        *({**OFF, "offset": offset} for offset in (0.5, -0.5)),
        {**OFF, "scale": 0.5, "offset": 0.5},
    ]
    digests = [InlineMask.read(content, SIZES).digest for content in contents]
    digests += [of_file(content).digest for content in contents] + [InlineMask.read(OFF, (6, 6)).digest]
    assert len(set(digests)) == len(digests)


def test_a_scale_of_1_changes_nothing_and_says_so() -> None:
    assert InlineMask.read({**OFF, "scale": 1}, SIZES).neurons == 0
    assert InlineMask.read({**OFF, "scale": 1, "offset": 2}, SIZES).neurons == 3


LAYERS = ("2", "00", "01", "-0", "-1", "", " 1", "1 ", "1.0", "+1", "\u0660", "x", "9" * 99)
NEURONS: list[tuple[Any, str]] = [
    (None, "'neurons' holds something else"),
    ([[1], [2]], "'neurons' holds something else"),
    ({"0": 3}, "'neurons' holds something else"),
    ({"0": {"1": 2}}, "'neurons' holds something else"),
    ({}, "'neurons' lists 0, expected 1 to 16384"),
    ({"0": []}, "'neurons' lists 0, expected 1 to 16384"),
    ({"0": [0] * (MAX_NEURONS + 1)}, "'neurons' lists 16385, expected 1 to 16384"),
    *(({key: [0]}, 'is none of the model\'s, expected "0" to "1"') for key in LAYERS),
    ({1: [0]}, "layer 1 is none of the model's"),
    ({"1": [5]}, "layer 1: 5 is no neuron, expected whole numbers from 0 to 4"),
    ({"0": [-1]}, "layer 0: -1 is no neuron, expected whole numbers from 0 to 5"),
    *(({"0": [wrong]}, "is no neuron") for wrong in (True, 1.0, "1", None, [1], float("nan"), 10**30)),
    ({"0": [3, 1, 3]}, "layer 0: neuron 3 is listed twice"),
]
NUMBERS = (float("nan"), float("inf"), -float("inf"), 10_001, -10_000.1, 10**400, True, "0", None, [0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found None, expected an object"),
        ([], r"found \[\], expected an object"),
        ({}, "'neurons' holds something else"),
        ({**OFF, "scales": 1}, "unknown field 'scales', expected 'neurons', 'scale', 'offset'"),
        ({**OFF, "\ud800" * 200: 1}, r"unknown field '(\\ud800){6}"),
        *(({"neurons": neurons}, message) for neurons, message in NEURONS),
        *(({**OFF, "scale": number}, "'scale' is .*, expected a number of at most 10000") for number in NUMBERS),
        *(({**OFF, "offset": number}, "'offset' is .*, expected a number of at most 10000") for number in NUMBERS),
    ],
)
def test_what_is_not_a_mask_of_this_model_is_refused_in_a_few_words(content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        InlineMask.read(content, SIZES)
    assert len(str(raised.value)) < 200
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("neurons:", "cannot be read as JSON"),
        *((f"neurons:{other}", "expected an object with 'neurons'") for other in ("null", '"zh"', "[]", "0")),
        ("neurons:" + "[" * 100_000, "cannot be read as JSON"),
        ('neurons:{"neurons":{"0":[1],"0":[2]}}', "'0' is given twice"),
        ('neurons:{"neurons":{"0":[1e400]}}', "inf is no neuron"),
        (f"neurons:{' ' * _MAX_TEXT}", "characters; at most 262144 are read"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InlineMask.parse(text, SIZES)


def test_the_largest_mask_of_the_largest_layers_can_travel() -> None:
    sizes = (10**9,) * 200
    shares = [{str(layer): list(range(10**9 - 82, 10**9)) for layer in range(199)}, {"199": list(range(66))}]
    mask = InlineMask.read({"neurons": {**shares[0], **shares[1]}, "scale": -1 / 3, "offset": 1e-38}, sizes)
    assert mask.neurons == MAX_NEURONS
    assert len(mask.wire) < _MAX_TEXT
    assert InlineMask.parse(mask.wire, sizes).digest == mask.digest


def test_a_request_is_resolved_to_its_mask(library: MaskLibrary) -> None:
    resolved = library.resolve(MOVED, Positions.GENERATED)
    assert resolved is not None
    assert (resolved.name, resolved.positions, resolved.mask.neurons) == ("inline", Positions.GENERATED, 2)
    assert inline_content(resolved.wire)["neurons"] == {"1": [0, 2]}
    sent = library.resolve_wire(resolved.wire, Positions.GENERATED)
    assert sent == resolved  # the same object, too
    assert library.mask_of(resolved.wire) is resolved.mask


def test_the_form_that_names_travel_in_is_resolved_as_before(library: MaskLibrary) -> None:
    named = library.resolve("zh@0.5")
    assert named is not None
    sent = library.resolve_wire(named.wire)
    assert sent is not None
    assert (sent.name, sent.mask.digest) == (named.name, named.mask.digest)
    assert library.resolve_wire("none") is None


def test_a_mask_in_a_request_is_off_unless_allowed(library: MaskLibrary) -> None:
    wire = InlineMask.read(OFF, SIZES).wire
    library.allows_inline = False
    for ask in (lambda: library.resolve(OFF), lambda: library.resolve({}), lambda: library.resolve_wire(wire)):
        with pytest.raises(InlineMasksOff, match=r"--inline-masks \(CRANE_INLINE_MASKS=1\)"):
            ask()
    with pytest.raises(InlineMasksOff):
        library.mask_of(wire)


@pytest.mark.parametrize("expression", ['neurons:{"neurons":{"0":[1]}}', 'zh,neurons:{"neurons":{"0":[1]}}'])
def test_it_is_no_name_and_joins_none(library: MaskLibrary, expression: str) -> None:
    with pytest.raises(MaskError, match="is an object in the body, which no name can join"):
        library.resolve(expression)


def test_a_wrong_neuron_is_the_requests_error(library: MaskLibrary) -> None:
    for ask in (library.resolve, lambda content: library.resolve_wire(f"neurons:{json.dumps(content)}")):
        with pytest.raises(MaskError, match="mask in the body: layer 0: 6 is no neuron, expected whole numbers"):
            ask({"neurons": {"0": [6]}})


def test_a_hundred_requests_with_one_content_keep_it_once_and_nothing_is_left_of_them(library: MaskLibrary) -> None:
    contents = ({"neurons": {"0": [4, 1] if number % 2 else [1, 4]}} for number in range(100))
    requests = [library.resolve(content) for content in contents]
    requests += [library.resolve_wire(request.wire) for request in requests]
    assert len({id(request.mask) for request in requests}) == 1
    kept = weakref.ref(requests[0].mask)
    requests.clear()
    gc.collect()
    assert kept() is None


def test_what_a_worker_remembers_of_many_is_bounded(fingerprint: Fingerprint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module, "_MEMO_CHARACTERS", 2**20)
    sizes = (20_000, 20_000)
    library = MaskLibrary(fingerprint.model_copy(update={"intermediate_sizes": sizes}), {})
    library.allows_inline = True

    def remember(first: int, last: int) -> None:
        for number in range(first, last):
            library.mask_of(InlineMask.read({"neurons": {"0": list(range(number, number + 2000))}}, sizes).wire)

    remember(0, 10)
    tracemalloc.start()
    try:
        remember(0, 600)  # 10 KB of text each
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 3 * 2**20
