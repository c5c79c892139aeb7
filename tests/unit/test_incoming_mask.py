"""Mask files that arrive in pieces: whole ones become masks, anything else is refused early and in bounded memory."""

import json
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from crane_serve.common.masks import Fingerprint, FingerprintError, MaskFileError, MaskInfo, NeuronMask, StoredMask
from crane_serve.common.masks.files import decode_mask, encode_mask
from crane_serve.common.masks.incoming import IncomingMask, MaskTooLarge

MIB = 2**20
FINGERPRINT = Fingerprint(
    architecture="TinyForCausalLM",
    layers=2,
    hidden_size=4,
    intermediate_sizes=(6, 5),
    config_digest="a" * 64,
    weights_digest="b" * 64,
)
INFO = MaskInfo(language="zh", method="attnlrp", fingerprint=FINGERPRINT, parameters={"note": "汉语"})


def some_mask() -> NeuronMask:
    intermediate, output = torch.ones(2, 6), torch.ones(2, 4)
    intermediate[0, 1], intermediate[1, 2], output[1, 3] = 0.0, 0.5, 0.0
    return NeuronMask(intermediate, FINGERPRINT.intermediate_sizes, output)


MASK = some_mask()
CONTENT = encode_mask("zh", MASK, INFO)
LENGTH = int.from_bytes(CONTENT[:8], "little")
HEADER: dict[str, Any] = json.loads(CONTENT[8 : 8 + LENGTH])
METADATA: dict[str, Any] = json.loads(HEADER["__metadata__"]["crane"])
TENSORS = CONTENT[8 + LENGTH :]


def receive(content: bytes, piece: int = 100, fingerprint: Fingerprint = FINGERPRINT) -> StoredMask:
    incoming = IncomingMask("zh", fingerprint)
    for start in range(0, len(content), piece):
        incoming.feed(content[start : start + piece])
    return incoming.finish()


def file_with(header: bytes | dict[str, Any], tensors: bytes = TENSORS) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + tensors


def header_with(**changes: Any) -> dict[str, Any]:
    return {**HEADER, **changes}


def metadata_with(**changes: Any) -> dict[str, Any]:
    return header_with(__metadata__={"crane": json.dumps({**METADATA, **changes})})


def entry_with(**changes: Any) -> dict[str, Any]:
    return header_with(intermediate={**HEADER["intermediate"], **changes})


def with_half_a_pair(header: dict[str, Any]) -> bytes:
    """A file with half a surrogate pair in place of the word HALF."""
    return file_with(json.dumps(header).encode().replace(b"HALF", rb"\ud800"))


@pytest.mark.parametrize("piece", [1, 2, 7, 8, 9, LENGTH, LENGTH + 8, LENGTH + 9, len(CONTENT)])
def test_a_mask_in_pieces_of_any_size(piece: int) -> None:
    stored = receive(CONTENT, piece)
    assert (stored.name, stored.mask.digest, stored.info) == ("zh", MASK.digest, INFO)


def test_empty_pieces_change_nothing() -> None:
    incoming = IncomingMask("zh", FINGERPRINT)
    for piece in (b"", CONTENT[:3], b"", CONTENT[3:-1], b"", CONTENT[-1:], b""):
        incoming.feed(piece)
    assert incoming.finish().mask.digest == MASK.digest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_format_that_holds_the_scales(dtype: torch.dtype) -> None:
    assert MASK.output is not None
    tensors = {"intermediate": MASK.intermediate.to(dtype), "output": MASK.output.to(dtype)}
    assert receive(save(tensors, metadata=HEADER["__metadata__"])).mask.digest == MASK.digest


def test_the_largest_mask_fits() -> None:
    sizes = (1200, 999)
    fingerprint = FINGERPRINT.model_copy(update={"intermediate_sizes": sizes})
    intermediate = torch.zeros(2, 1200)
    intermediate[1, 999:] = 1
    mask = NeuronMask(intermediate, sizes, torch.zeros(2, 4))
    info = INFO.model_copy(update={"fingerprint": fingerprint, "parameters": {"note": "x" * (MIB - 4096)}})
    content = encode_mask("zh", mask, info)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = json.dumps(json.loads(header["__metadata__"]["crane"]))  # the wordier way to write JSON
    assert mask.output is not None
    doubles = {"intermediate": mask.intermediate.double(), "output": mask.output.double()}
    content = save(doubles, metadata={"crane": metadata})
    assert receive(content, MIB, fingerprint).mask.digest == mask.digest
    assert MIB < len(content) < IncomingMask("zh", fingerprint).largest < len(content) + 8192


Content = Callable[[], bytes]

REFUSED: dict[str, tuple[Content, type[Exception], str]] = {
    "nothing": (lambda: b"", MaskFileError, "ends after 0 bytes, before its header does"),
    "half a length": (lambda: CONTENT[:5], MaskFileError, "ends after 5 bytes, before its header does"),
    "half a header": (lambda: CONTENT[:40], MaskFileError, "ends after 40 bytes, before its header does"),
    "a byte too few": (lambda: CONTENT[:-1], MaskFileError, f"ends after {len(CONTENT) - 1} bytes, before the"),
    "a byte too many": (lambda: CONTENT + b"\0", MaskFileError, f"goes on after the {len(CONTENT)} bytes"),
    "another file": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(100), MaskTooLarge, "begins with a header of"),
    "longest length": (lambda: b"\xff" * 8, MaskTooLarge, "begins with a header of 18446744073709551615 bytes"),
    "no length": (lambda: bytes(9), MaskFileError, "header is not readable as JSON"),
    "length too short": (
        lambda: (LENGTH - 20).to_bytes(8, "little") + CONTENT[8:],
        MaskFileError,
        "header is not readable as JSON",
    ),
    "length too long": (
        lambda: (LENGTH + 20).to_bytes(8, "little") + CONTENT[8:],
        MaskFileError,
        "header is not readable as JSON",
    ),
    "no JSON": (lambda: file_with(b"neither"), MaskFileError, "header is not readable as JSON"),
    "no UTF-8": (lambda: file_with(b'{"\xff": 1}'), MaskFileError, "header is not readable as JSON"),
    "UTF-16": (lambda: file_with(json.dumps(HEADER).encode("utf-16")), MaskFileError, "header is not readable"),
    "deep lists": (lambda: file_with(b"[" * 100_000), MaskFileError, "header is not readable as JSON"),
    "deep objects": (lambda: file_with(b'{"a":' * 100_000), MaskFileError, "header is not readable as JSON"),
    "endless number": (lambda: file_with(b'{"a": ' + b"9" * 10_000 + b"}"), MaskFileError, "header is not readable"),
    "a list": (lambda: file_with(b"[]"), MaskFileError, "header field ''"),
    "null": (lambda: file_with(b"null"), MaskFileError, "header field ''"),
    "nothing in it": (lambda: file_with(b"{}"), MaskFileError, "header field '__metadata__': Field required"),
    "a tensor twice": (
        lambda: file_with(json.dumps(HEADER).encode().replace(b'"output":', b'"intermediate":')),
        MaskFileError,
        "an object has a key twice",
    ),
    "metadata twice": (
        lambda: file_with(b'{"__metadata__": {"crane": "{}"}, ' + json.dumps(HEADER).encode()[1:]),
        MaskFileError,
        "an object has a key twice",
    ),
    "null metadata": (lambda: file_with(header_with(__metadata__=None)), MaskFileError, "field '__metadata__'"),
    "numbers as metadata": (lambda: file_with(header_with(__metadata__={"crane": 1})), MaskFileError, "crane"),
    "other metadata": (lambda: file_with(header_with(__metadata__={"format": "pt"})), MaskFileError, "no 'crane'"),
    "metadata that is no JSON": (
        lambda: file_with(header_with(__metadata__={"crane": "{"})),
        MaskFileError,
        "metadata field ''",
    ),
    "metadata that is deep": (
        lambda: file_with(header_with(__metadata__={"crane": "[" * 100_000})),
        MaskFileError,
        "metadata field ''",
    ),
    "half a surrogate pair in metadata": (
        lambda: with_half_a_pair(header_with(__metadata__={"crane": "HALF"})),
        MaskFileError,
        "mask 'zh'",
    ),
    "half a surrogate pair as a name": (
        lambda: with_half_a_pair(header_with(HALF=1)),
        MaskFileError,
        "mask 'zh'",
    ),
    "10 MB of metadata": (
        lambda: file_with(metadata_with(parameters={"note": "x" * 10_000_000})),
        MaskTooLarge,
        "mask of this model has at most",
    ),
    "no intermediate": (
        lambda: file_with({name: HEADER[name] for name in ("__metadata__", "output")}),
        MaskFileError,
        "header field 'intermediate': Field required",
    ),
    "another tensor": (
        lambda: file_with(header_with(surplus=HEADER["output"])),
        MaskFileError,
        "header field 'surplus': Extra inputs are not permitted",
    ),
    "a very long name": (lambda: file_with(header_with(**{"x" * 10_000: 1})), MaskFileError, "x': Extra inputs"),
    "more in an entry": (lambda: file_with(entry_with(more=1)), MaskFileError, "header field 'intermediate.more'"),
    "no format": (lambda: file_with(entry_with(dtype=None)), MaskFileError, "header field 'intermediate.dtype'"),
    "one dimension": (lambda: file_with(entry_with(shape=[12])), MaskFileError, r"shape \[2, 6\] of this model"),
    "turned": (lambda: file_with(entry_with(shape=[6, 2])), MaskFileError, r"shape \[2, 6\] of this model"),
    "a negative shape": (lambda: file_with(entry_with(shape=[-2, -6])), MaskFileError, r"shape \[2, 6\]"),
    "a huge shape": (lambda: file_with(entry_with(shape=[2**63, 2**63])), MaskFileError, r"shape \[2, 6\]"),
    "no whole shape": (lambda: file_with(entry_with(shape=[2.0, 6])), MaskFileError, "'intermediate.shape.0'"),
    "a shape of truths": (lambda: file_with(entry_with(shape=[True, 6])), MaskFileError, "'intermediate.shape.0'"),
    "wrong output": (
        lambda: file_with(header_with(output={**HEADER["output"], "shape": [2, 5]})),
        MaskFileError,
        r"'output' does not have the shape \[2, 4\] of this model",
    ),
    "overlapping": (
        lambda: file_with(header_with(output={**HEADER["output"], "data_offsets": [40, 72]})),
        MaskFileError,
        r"'output' does not have the offsets \[48, 80\]",
    ),
    "a gap": (
        lambda: file_with(header_with(output={**HEADER["output"], "data_offsets": [52, 84]}), TENSORS + bytes(4)),
        MaskFileError,
        r"'output' does not have the offsets \[48, 80\]",
    ),
    "the same place": (
        lambda: file_with(header_with(output={**HEADER["output"], "data_offsets": [0, 32]})),
        MaskFileError,
        r"'intermediate' does not have the offsets \[32, 80\]",
    ),
    "longer than its shape": (
        lambda: file_with(entry_with(data_offsets=[0, 2**30])),
        MaskFileError,
        r"'intermediate' does not have the offsets \[0, 48\]",
    ),
    "negative offsets": (
        lambda: file_with(entry_with(data_offsets=[-48, 0])),
        MaskFileError,
        r"'intermediate' does not have the offsets \[0, 48\]",
    ),
    "huge offsets": (lambda: file_with(entry_with(data_offsets=[2**63, 2**63 + 48])), MaskFileError, "the offsets"),
    "huger offsets": (lambda: file_with(entry_with(data_offsets=[10**400, 10**401])), MaskFileError, "the offsets"),
    "one offset": (lambda: file_with(entry_with(data_offsets=[0])), MaskFileError, "'intermediate.data_offsets"),
    "not a number": (
        lambda: file_with(HEADER, TENSORS[:-4] + b"\0\0\xc0\x7f"),
        MaskFileError,
        "not finite",
    ),
    "infinite": (lambda: file_with(HEADER, b"\0\0\x80\x7f" + TENSORS[4:]), MaskFileError, "not finite"),
    "another digest": (lambda: file_with(metadata_with(digest="0" * 64)), MaskFileError, "content digest is"),
    "other neurons": (lambda: file_with(metadata_with(neurons=[[1], []])), MaskFileError, "neuron sets"),
    "endless neurons": (lambda: file_with(metadata_with(neurons=[[10**400], []])), MaskFileError, "neuron sets"),
    "another version": (lambda: file_with(metadata_with(format_version=2)), MaskFileError, "format version 2"),
    "no provenance": (
        lambda: file_with(header_with(__metadata__={"crane": json.dumps({"fingerprint": METADATA["fingerprint"]})})),
        MaskFileError,
        "metadata field 'language': Field required",
    ),
    "no fingerprint": (lambda: file_with(metadata_with(fingerprint=None)), MaskFileError, "field 'fingerprint'"),
    "another model": (
        lambda: file_with(metadata_with(fingerprint={**METADATA["fingerprint"], "weights_digest": "c" * 64})),
        FingerprintError,
        "mask 'zh' was made for another model: its weights_digest is cccccccccccccccc...",
    ),
}


@pytest.mark.parametrize("piece", [1, 1000, 10**9], ids=["bytes", "pieces", "one piece"])
@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, piece: int) -> None:
    make, kind, message = REFUSED[case]
    content = make()
    if piece == 1 and len(content) > 10_000:
        piece = 97
    with pytest.raises(kind, match=message) as refused:
        receive(content, piece)
    assert type(refused.value) is kind
    assert len(str(refused.value)) < 500


def test_a_mask_of_a_larger_model_is_another_models(fingerprint: Fingerprint) -> None:
    larger = FINGERPRINT.model_copy(update={"intermediate_sizes": (60, 50), "weights_digest": "c" * 64})
    info = INFO.model_copy(update={"fingerprint": larger})
    content = encode_mask("zh", NeuronMask.switching_off([[1], []], (60, 50)), info)
    with pytest.raises(FingerprintError, match="its intermediate_sizes is"):
        receive(content)


@pytest.mark.parametrize(
    "dtype",
    ["I64", "I32", "U8", "BOOL", "F8", "F8_E4M3", "F8_E5M2", "F4", "C64", "F32\0", "f32", "", 32, ["F32"]],
)
def test_refuses_other_formats_than_floats(dtype: object) -> None:
    with pytest.raises(MaskFileError, match=r"header field 'intermediate\.dtype': Input should be 'F64', 'F32'"):
        receive(file_with(entry_with(dtype=dtype)))


def test_refuses_doubles_that_no_float_can_hold() -> None:
    assert MASK.output is not None
    tensors = {"intermediate": MASK.intermediate.double(), "output": MASK.output.double()}
    tensors["intermediate"][0, 1] = 1e300
    with pytest.raises(MaskFileError, match="'intermediate' holds values that are not finite"):
        receive(save(tensors, metadata=HEADER["__metadata__"]))


def test_refuses_scales_of_neurons_that_do_not_exist() -> None:
    tensors = {"intermediate": MASK.intermediate.clone(), "output": MASK.output}
    tensors["intermediate"][1, 5] = 0.0
    with pytest.raises(MaskFileError, match="scales padding of layer 1 beyond its 5 neurons"):
        receive(save(tensors, metadata=HEADER["__metadata__"]))


@pytest.mark.parametrize("name", ["", "ZH", "../zh", "a/b", "none", "x" * 129, "zh\n"])
def test_refuses_bad_names(name: str) -> None:
    with pytest.raises(MaskFileError, match="mask name"):
        IncomingMask(name, FINGERPRINT)


def test_a_file_whose_metadata_is_null_is_no_mask() -> None:
    content = file_with({**HEADER, "__metadata__": None})
    with pytest.raises(MaskFileError, match="no 'crane' metadata"):
        decode_mask("zh", content, source="zh")


@pytest.mark.parametrize("depth", [10, 150, 190])
def test_nested_parameters_can_be_written_again(depth: int) -> None:
    parameters = json.loads("[" * depth + "]" * depth)
    content = file_with(metadata_with(parameters={"deep": parameters, "huge": 10**300, "infinite": float("inf")}))
    stored = receive(content)
    again = receive(encode_mask("zh", stored.mask, stored.info))
    assert again.info.parameters == {"deep": parameters, "huge": 10**300, "infinite": None}


def fed_until_refused(pieces: Iterable[bytes]) -> tuple[int, int, Exception]:
    """Bytes taken, peak of the memory for them, and why no more are."""
    incoming = IncomingMask("zh", FINGERPRINT)
    taken = 0
    tracemalloc.start()
    try:
        for piece in pieces:
            taken += len(piece)
            incoming.feed(piece)
        raise AssertionError(f"all {taken} bytes were taken")
    except MaskFileError as error:
        return taken, tracemalloc.get_traced_memory()[1], error
    finally:
        tracemalloc.stop()


def gibibyte(start: bytes, filling: bytes) -> Iterator[bytes]:
    """`start` at the beginning of 1 GiB, in pieces of 1 MiB."""
    yield (start + filling * MIB)[:MIB]
    for _ in range(1023):
        yield filling * MIB


CLAIM = json.dumps(entry_with(shape=[2**14, 2**14], data_offsets=[0, 2**30])).encode()
LONGEST_HEADER = IncomingMask("zh", FINGERPRINT).largest - 8 - 8 * (2 * 6 + 2 * 4)


@pytest.mark.parametrize(
    ("start", "filling", "most_taken"),
    [
        pytest.param(b"", b"\xff", MIB, id="no header"),
        pytest.param(b"", b"\0", MIB, id="zeros"),
        pytest.param(LONGEST_HEADER.to_bytes(8, "little"), b" ", 2 * MIB, id="blank header"),
        pytest.param(file_with(CLAIM, b""), b"\0", MIB, id="claims a tensor of 1 GiB"),
        pytest.param(CONTENT, b"\0", MIB, id="goes on after its end"),
    ],
)
def test_a_gibibyte_is_refused_early_and_not_kept(start: bytes, filling: bytes, most_taken: int) -> None:
    taken, peak, _ = fed_until_refused(gibibyte(start, filling))
    assert taken <= most_taken
    assert peak < 6 * MIB  # the largest file and what it is parsed from, and two of the sender's own pieces


def test_a_size_that_no_mask_has_is_refused_before_a_byte_comes() -> None:
    incoming = IncomingMask("zh", FINGERPRINT)
    incoming.expect(incoming.largest)
    with pytest.raises(MaskTooLarge, match=f"has 1073741824 bytes; .* has at most {incoming.largest}"):
        incoming.expect(2**30)


def test_one_piece_that_is_larger_than_any_mask_is_not_looked_into() -> None:
    incoming = IncomingMask("zh", FINGERPRINT)
    with pytest.raises(MaskTooLarge, match=f"has {incoming.largest + 1} bytes"):
        incoming.feed(CONTENT.ljust(incoming.largest + 1, b"\0"))


MUTATIONS = st.lists(st.tuples(st.integers(0, len(CONTENT) - 1), st.integers(1, 255)), max_size=8)
fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refused_or_the_same(content: bytes, piece: int) -> None:
    try:
        stored = receive(content, piece)
    except (MaskFileError, FingerprintError):
        return
    assert stored.mask.digest == MASK.digest  # only provenance can change unnoticed


@fuzz
@given(mutations=MUTATIONS, cut=st.integers(0, 200), extension=st.binary(max_size=64), piece=st.integers(1, 2000))
def test_no_damage_goes_unnoticed(mutations: list[tuple[int, int]], cut: int, extension: bytes, piece: int) -> None:
    damaged = bytearray(CONTENT)
    for position, change in mutations:
        damaged[position] ^= change
    content = bytes(damaged[: len(damaged) - cut]) + extension
    refused_or_the_same(content, piece)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(2**63) | st.just(-1),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
KEYS = st.sampled_from(["dtype", "shape", "data_offsets"])
FIELDS = st.sampled_from([*METADATA, "unknown"])


@fuzz
@given(tensor=st.sampled_from(["intermediate", "output"]), key=KEYS, value=VALUES, piece=st.integers(1, 2000))
def test_no_header_breaks_it(tensor: str, key: str, value: Any, piece: int) -> None:
    refused_or_the_same(file_with(header_with(**{tensor: {**HEADER[tensor], key: value}})), piece)


@fuzz
@given(field=FIELDS, value=VALUES)
def test_no_metadata_breaks_it(field: str, value: Any) -> None:
    refused_or_the_same(file_with(metadata_with(**{field: value})), 1000)


@fuzz
@given(
    header=st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()), lie=st.integers(0, 2**64 - 1)
)
def test_no_bytes_break_it(header: bytes, lie: int) -> None:
    for content in (header, file_with(header), lie.to_bytes(8, "little") + header):
        with pytest.raises(MaskFileError):
            receive(content)
