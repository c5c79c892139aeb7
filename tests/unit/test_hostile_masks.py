"""Mask files from strangers: whole ones become masks, anything else is one error that names the file."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from crane_serve.common.masks import Fingerprint, MaskFileError, MaskInfo, NeuronMask, StoredMask
from crane_serve.common.masks.files import decode_mask, encode_mask

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


def decode(content: bytes) -> StoredMask:
    return decode_mask("zh", content, source="mask 'zh'")


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


def test_a_whole_file_is_a_mask() -> None:
    stored = decode(CONTENT)
    assert (stored.name, stored.mask.digest, stored.info) == ("zh", MASK.digest, INFO)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_format_that_holds_the_scales(dtype: torch.dtype) -> None:
    assert MASK.output is not None
    tensors = {"intermediate": MASK.intermediate.to(dtype), "output": MASK.output.to(dtype)}
    assert decode(save(tensors, metadata=HEADER["__metadata__"])).mask.digest == MASK.digest


REFUSED: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "half a length": lambda: CONTENT[:5],
    "half a header": lambda: CONTENT[:40],
    "a byte too few": lambda: CONTENT[:-1],
    "a byte too many": lambda: CONTENT + b"\0",
    "another file": lambda: b"\x89PNG\r\n\x1a\n" + bytes(100),
    "longest length": lambda: b"\xff" * 8,
    "no length": lambda: bytes(9),
    "length too short": lambda: (LENGTH - 20).to_bytes(8, "little") + CONTENT[8:],
    "length too long": lambda: (LENGTH + 20).to_bytes(8, "little") + CONTENT[8:],
    "no JSON": lambda: file_with(b"neither"),
    "no UTF-8": lambda: file_with(b'{"\xff": 1}'),
    "UTF-16": lambda: file_with(json.dumps(HEADER).encode("utf-16")),
    "deep lists": lambda: file_with(b"[" * 100_000),
    "deep objects": lambda: file_with(b'{"a":' * 100_000),
    "endless number": lambda: file_with(b'{"a": ' + b"9" * 10_000 + b"}"),
    "a list": lambda: file_with(b"[]"),
    "null": lambda: file_with(b"null"),
    "nothing in it": lambda: file_with(b"{}"),
    "a tensor twice": lambda: file_with(json.dumps(HEADER).encode().replace(b'"output":', b'"intermediate":')),
    "metadata twice": lambda: file_with(b'{"__metadata__": {"crane": "{}"}, ' + json.dumps(HEADER).encode()[1:]),
    "null metadata": lambda: file_with(header_with(__metadata__=None)),
    "numbers as metadata": lambda: file_with(header_with(__metadata__={"crane": 1})),
    "other metadata": lambda: file_with(header_with(__metadata__={"format": "pt"})),
    "metadata that is no JSON": lambda: file_with(header_with(__metadata__={"crane": "{"})),
    "metadata that is deep": lambda: file_with(header_with(__metadata__={"crane": "[" * 100_000})),
    "half a surrogate pair in metadata": lambda: with_half_a_pair(header_with(__metadata__={"crane": "HALF"})),
    "half a surrogate pair as a name": lambda: with_half_a_pair(header_with(HALF=1)),
    "no intermediate": lambda: file_with({name: HEADER[name] for name in ("__metadata__", "output")}),
    "another tensor": lambda: file_with(header_with(surplus=HEADER["output"])),
    "a very long name": lambda: file_with(header_with(**{"x" * 10_000: 1})),
    "no format": lambda: file_with(entry_with(dtype=None)),
    "one dimension": lambda: file_with(entry_with(shape=[12])),
    "turned": lambda: file_with(entry_with(shape=[6, 2])),
    "a negative shape": lambda: file_with(entry_with(shape=[-2, -6])),
    "a huge shape": lambda: file_with(entry_with(shape=[2**63, 2**63])),
    "no whole shape": lambda: file_with(entry_with(shape=[2.0, 6])),
    "a shape of truths": lambda: file_with(entry_with(shape=[True, 6])),
    "wrong output": lambda: file_with(header_with(output={**HEADER["output"], "shape": [2, 5]})),
    "overlapping": lambda: file_with(header_with(output={**HEADER["output"], "data_offsets": [40, 72]})),
    "a gap": lambda: file_with(header_with(output={**HEADER["output"], "data_offsets": [52, 84]}), TENSORS + bytes(4)),
    "the same place": lambda: file_with(header_with(output={**HEADER["output"], "data_offsets": [0, 32]})),
    "longer than its shape": lambda: file_with(entry_with(data_offsets=[0, 2**30])),
    "negative offsets": lambda: file_with(entry_with(data_offsets=[-48, 0])),
    "huge offsets": lambda: file_with(entry_with(data_offsets=[2**63, 2**63 + 48])),
    "huger offsets": lambda: file_with(entry_with(data_offsets=[10**400, 10**401])),
    "one offset": lambda: file_with(entry_with(data_offsets=[0])),
    "not a number": lambda: file_with(HEADER, TENSORS[:-4] + b"\0\0\xc0\x7f"),
    "infinite": lambda: file_with(HEADER, b"\0\0\x80\x7f" + TENSORS[4:]),
    "another digest": lambda: file_with(metadata_with(digest="0" * 64)),
    "other neurons": lambda: file_with(metadata_with(neurons=[[1], []])),
    "endless neurons": lambda: file_with(metadata_with(neurons=[[10**400], []])),
    "another version": lambda: file_with(metadata_with(format_version=2)),
    "no provenance": lambda: file_with(
        header_with(__metadata__={"crane": json.dumps({"fingerprint": METADATA["fingerprint"]})})
    ),
    "no fingerprint": lambda: file_with(metadata_with(fingerprint=None)),
    "a long name of a tensor": lambda: file_with(header_with(**{"x" * 10_000: HEADER["output"]})),
    "another tensor with a long name": lambda: save(
        {"intermediate": MASK.intermediate, "x" * 10_000: torch.ones(1)}, metadata=HEADER["__metadata__"]
    ),
    "many other tensors": lambda: save(
        {f"{number}": torch.ones(1) for number in range(1000)}, metadata=HEADER["__metadata__"]
    ),
    "a long name of a field": lambda: file_with(
        metadata_with(fingerprint={**METADATA["fingerprint"], "x" * 10_000: 1})
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    with pytest.raises(MaskFileError) as refused:
        decode(REFUSED[case]())
    assert type(refused.value) is MaskFileError
    assert "mask 'zh'" in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "dtype",
    ["I64", "I32", "U8", "BOOL", "F8", "F8_E4M3", "F8_E5M2", "F4", "C64", "F32\0", "f32", "", 32, ["F32"]],
)
def test_refuses_other_formats_than_floats(dtype: object) -> None:
    with pytest.raises(MaskFileError):
        decode(file_with(entry_with(dtype=dtype)))


def test_refuses_doubles_that_no_float_can_hold() -> None:
    assert MASK.output is not None
    tensors = {"intermediate": MASK.intermediate.double(), "output": MASK.output.double()}
    tensors["intermediate"][0, 1] = 1e300
    with pytest.raises(MaskFileError, match="'intermediate' holds values that are not finite"):
        decode(save(tensors, metadata=HEADER["__metadata__"]))


def test_refuses_scales_of_neurons_that_do_not_exist() -> None:
    tensors = {"intermediate": MASK.intermediate.clone(), "output": MASK.output}
    tensors["intermediate"][1, 5] = 0.0
    with pytest.raises(MaskFileError, match="scales padding of layer 1 beyond its 5 neurons"):
        decode(save(tensors, metadata=HEADER["__metadata__"]))


@pytest.mark.parametrize("name", ["", "ZH", "../zh", "a/b", "none", "x" * 129, "zh\n"])
def test_refuses_bad_names(name: str) -> None:
    with pytest.raises(MaskFileError, match="mask name"):
        decode_mask(name, CONTENT, source="a file")


def test_a_file_whose_metadata_is_null_is_no_mask() -> None:
    content = file_with({**HEADER, "__metadata__": None})
    with pytest.raises(MaskFileError, match="no 'crane' metadata"):
        decode_mask("zh", content, source="zh")


@pytest.mark.parametrize("depth", [10, 150, 190])
def test_nested_parameters_can_be_written_again(depth: int) -> None:
    parameters = json.loads("[" * depth + "]" * depth)
    content = file_with(metadata_with(parameters={"deep": parameters, "huge": 10**300, "infinite": float("inf")}))
    stored = decode(content)
    again = decode(encode_mask("zh", stored.mask, stored.info))
    assert again.info.parameters == {"deep": parameters, "huge": 10**300, "infinite": None}


MUTATIONS = st.lists(st.tuples(st.integers(0, len(CONTENT) - 1), st.integers(1, 255)), max_size=8)
fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refused_or_the_same(content: bytes) -> None:
    try:
        stored = decode(content)
    except MaskFileError:
        return
    assert stored.mask.digest == MASK.digest  # only provenance can change unnoticed


@fuzz
@given(mutations=MUTATIONS, cut=st.integers(0, 200), extension=st.binary(max_size=64))
def test_no_damage_goes_unnoticed(mutations: list[tuple[int, int]], cut: int, extension: bytes) -> None:
    damaged = bytearray(CONTENT)
    for position, change in mutations:
        damaged[position] ^= change
    content = bytes(damaged[: len(damaged) - cut]) + extension
    refused_or_the_same(content)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(2**63) | st.just(-1),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
KEYS = st.sampled_from(["dtype", "shape", "data_offsets"])
FIELDS = st.sampled_from([*METADATA, "unknown"])


@fuzz
@given(tensor=st.sampled_from(["intermediate", "output"]), key=KEYS, value=VALUES)
def test_no_header_breaks_it(tensor: str, key: str, value: Any) -> None:
    refused_or_the_same(file_with(header_with(**{tensor: {**HEADER[tensor], key: value}})))


@fuzz
@given(field=FIELDS, value=VALUES)
def test_no_metadata_breaks_it(field: str, value: Any) -> None:
    refused_or_the_same(file_with(metadata_with(**{field: value})))


@fuzz
@given(
    header=st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()), lie=st.integers(0, 2**64 - 1)
)
def test_no_bytes_break_it(header: bytes, lie: int) -> None:
    for content in (header, file_with(header), lie.to_bytes(8, "little") + header):
        with pytest.raises(MaskFileError):
            decode(content)
