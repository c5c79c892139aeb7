"""Masks joined and damped by what a request says: memory, time, and how large scales become."""

import json
import time
from pathlib import Path
from typing import Any

from tests.hostile.case import Case, Outcome

GEMMA_270M, LLAMA_70B = (18, 2048), (80, 28672)
"""Layers and neurons of each."""


def _mask(shape: tuple[int, int], number: int, scale: float = 0.0) -> Any:
    import torch

    from crane_serve.common.masks import NeuronMask

    layers, neurons = shape
    scales = torch.ones(layers, neurons)
    scales[:, number::100] = scale
    return NeuronMask(scales, (neurons,) * layers)


def _library(shape: tuple[int, int], masks: dict[str, Any]) -> Any:
    from crane_serve.common.masks import Fingerprint, MaskInfo, MaskLibrary, StoredMask

    layers, neurons = shape
    fingerprint = Fingerprint(
        architecture="LlamaForCausalLM",
        layers=layers,
        hidden_size=64,
        intermediate_sizes=(neurons,) * layers,
        config_digest="a" * 64,
        weights_digest="b" * 64,
    )
    info = MaskInfo(language="zh", method="made", fingerprint=fingerprint)
    return MaskLibrary(fingerprint, {name: StoredMask(name, mask, info) for name, mask in masks.items()})


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def _distinct_factors() -> Outcome:
    library = _library(GEMMA_270M, {"zh": _mask(GEMMA_270M, 1)})
    digest = library.masks["zh"].mask.digest
    library.mask_of(f"{digest}@0.5")
    before = _resident_bytes()
    for number in range(1024):  # as the front end resolves and a worker looks up
        resolved = library.resolve(f"{digest}@{(number + 1) / 64!r}")
        library.mask_of(resolved.wire)
        del resolved
    mib = (_resident_bytes() - before) / 2**20
    return Outcome(f"{mib:.0f} MiB kept in one process", mib < 16)


def _masks_in_bodies() -> Outcome:
    library = _library(GEMMA_270M, {})
    library.allows_inline = True
    library.mask_of(library.resolve({"neurons": {"0": [1]}}).wire)
    before, seconds = _resident_bytes(), []
    for number in range(1024):  # as the front end resolves and a worker looks up
        neurons = {str(layer): list(range(number, number + 911)) for layer in range(17)}
        began = time.process_time()
        resolved = library.resolve({"neurons": neurons})
        seconds.append(time.process_time() - began)
        library.mask_of(resolved.wire)
        del resolved
    mib, milliseconds = (_resident_bytes() - before) / 2**20, 1000 * sorted(seconds)[512]
    return Outcome(f"{mib:.0f} MiB kept in one process, {milliseconds:.1f} ms of CPU for each", mib < 128)


def _sixteen_members() -> Outcome:
    library = _library(LLAMA_70B, {f"m{number}": _mask(LLAMA_70B, number) for number in range(16)})
    for stored in library.masks.values():
        _ = stored.mask.digest  # known since the file was read
    library.resolve("m0")
    milliseconds = []
    for number in range(3):
        expression = ",".join(f"m{member}@{(number + 1) / 8!r}" for member in range(16))
        began = time.process_time()
        _ = library.resolve(expression).mask.digest
        milliseconds.append(1000 * (time.process_time() - began))
    least = min(milliseconds)
    return Outcome(f"{least:.2f} ms of CPU for 16 members", least < 10)


def _long_expression() -> Outcome:
    from crane_serve.common.masks import MaskError

    library = _library((2, 8), {"zh": _mask((2, 8), 1)})
    began = time.process_time()
    try:
        library.resolve("z" * 8_000_000)
        message = "resolved"
    except MaskError as error:
        message = str(error)
    milliseconds = 1000 * (time.process_time() - began)
    return Outcome(f"{milliseconds:.1f} ms of CPU, an error of {len(message):,} characters", len(message) < 1000)


def _float16_overflow() -> Outcome:
    import torch

    from crane_serve.common.masks import MaskError

    library = _library((2, 200), {"zh": _mask((2, 200), 1)})
    try:
        resolved = library.resolve("zh@100,zh@99,zh@98")
    except MaskError as error:
        return Outcome(f"refused: {error}", True)
    scales = resolved.mask.intermediate
    largest = float(scales.to(torch.float16).max())
    return Outcome(f"{float(scales.max()):g}, in float16 {largest:g}", largest < float("inf"))


def _uploaded_scale(scale: float, factor: str) -> Outcome:
    import torch
    from safetensors.torch import save

    from crane_serve.common.masks import MaskError, MaskFileError, MaskInfo, NeuronMask
    from crane_serve.common.masks.files import decode_mask

    shape = (2, 200)
    info: Any = MaskInfo(language="zh", method="made", fingerprint=_library(shape, {}).fingerprint)
    layers, neurons = shape
    scales = torch.ones(layers, neurons)
    scales[:, 1] = scale
    try:
        mask = NeuronMask(scales, (neurons,) * layers)
        fields = {"format_version": 1, "digest": mask.digest, "neurons": mask.neuron_sets()}
        metadata = json.dumps({**info.model_dump(mode="json"), **fields})
        stored = decode_mask("big", save({"intermediate": scales}, metadata={"crane": metadata}), source="big")
        library = _library(shape, {"big": stored.mask})
        rounded = library.resolve(f"big{factor}").mask.intermediate.to(torch.bfloat16).float()
    except (MaskError, MaskFileError, ValueError) as error:
        holds = "10000" in str(error)
        return Outcome(f"{type(error).__name__}: {error}", holds)
    return Outcome(f"served as {float(rounded.abs().max()):g}", float(rounded.abs().max()) <= 10_000)


CASES = {
    "distinct-factors": Case(
        6, "1,024 distinct factors of a mask of Gemma-270M", "no more than 16 MiB kept", _distinct_factors
    ),
    "masks-in-bodies": Case(
        6, "1,024 masks of 15,487 neurons, each in a body", "no more than 128 MiB kept", _masks_in_bodies
    ),
    "sixteen-members": Case(
        6, "16 members with factors at a 70B model's shape", "under 10 ms of CPU before the gate", _sixteen_members
    ),
    "long-expression": Case(6, "an expression of 8,000,000 characters", "a short error", _long_expression),
    "float16-overflow": Case(11, "zh@100,zh@99,zh@98 in float16", "refused, or finite", _float16_overflow),
    "bfloat16-overflow": Case(
        11, "an uploaded scale of 3.4e38", "refused with the bound", lambda: _uploaded_scale(3.4e38, "")
    ),
    "scale-and-factor": Case(
        11, "an uploaded scale of 1e38, then @100", "refused with the bound", lambda: _uploaded_scale(1e38, "@100")
    ),
}
