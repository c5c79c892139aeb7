"""What the multiplication by the mask costs inside an MLP, by the way it is done.

    python benchmarks/mask_op.py [SHAPE ...] [--out mask_op.json] [--tokens 1,32,256,1024] [--seconds 0.3]

A SHAPE is a name (gemma-3-270m, llama-2-7b) or HIDDENxNEURONSxACTIVATION, as in 640x2048xgelu. The MLP is
gate_up matmul -> act(gate) * up -> mask -> down matmul, eager and compiled (with a dynamic number of tokens). Ways:

- none: no mask at all; every ratio is to it.
- table: `y * table[slots[:n]]`, which Inductor may fuse with the activation. Touches every token.
- op: a custom op in Python that changes y in place, and only the rows whose slot is not 0.
- op, C++: the same in C++, if a compiler is there.

Fills: no token masked, every second one, all; the masked ones are spread over 64 rows of the table. A result is exact
if it is, bit by bit, that without a mask (no token masked) or that of the table (else).
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from summary import machine, speed_ratio, spread, table
from torch import Tensor
from torch.nn import functional as F

from crane_serve.common.atomic import write_atomically

ROWS = 257  # of the mask table, row 0 is all ones
MASKS = 64  # rows in use
FEWEST_REPETITIONS, MOST_REPETITIONS, SAMPLE_S = 5, 200, 0.002

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": partial(F.gelu, approximate="tanh"), "silu": F.silu}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FILLS = {"unmasked": 0.0, "half": 0.5, "all": 1.0}

SOURCE = r"""
#include <ATen/Parallel.h>
#include <torch/library.h>
#include <cstring>

static inline float widen(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

static inline uint16_t narrow(float value) {  // to the nearest, ties to even; scales and activations are finite
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static void scale_row(float* __restrict__ y, const float* __restrict__ scale, int64_t width) {
  for (int64_t i = 0; i < width; ++i) y[i] *= scale[i];
}

static void scale_row(uint16_t* __restrict__ y, const uint16_t* __restrict__ scale, int64_t width) {
  for (int64_t i = 0; i < width; ++i) y[i] = narrow(widen(y[i]) * widen(scale[i]));
}

template <typename T>
static void scale_all(T* y, const T* table, const int64_t* slots, int64_t tokens, int64_t width) {
  const int64_t grain = std::max<int64_t>(1, 32768 / width);
  at::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token)
      if (slots[token] != 0) scale_row(y + token * width, table + slots[token] * width, width);
  });
}

void scale_rows(at::Tensor y, const at::Tensor& table, const at::Tensor& slots) {
  TORCH_CHECK(y.is_contiguous() && table.is_contiguous() && slots.is_contiguous(), "expected contiguous tensors");
  const int64_t tokens = y.size(0), width = y.size(1);
  const int64_t* rows = slots.const_data_ptr<int64_t>();
  if (y.scalar_type() == at::kBFloat16)
    scale_all((uint16_t*)y.data_ptr(), (const uint16_t*)table.const_data_ptr(), rows, tokens, width);
  else
    scale_all(y.data_ptr<float>(), table.const_data_ptr<float>(), rows, tokens, width);
}

TORCH_LIBRARY(crane_benchmark_cpp, library) {
  library.def("scale_rows(Tensor(a!) y, Tensor table, Tensor slots) -> ()");
}
TORCH_LIBRARY_IMPL(crane_benchmark_cpp, CPU, library) { library.impl("scale_rows", &scale_rows); }
"""


@torch.library.custom_op("crane_benchmark::scale_rows", mutates_args={"y"})
def scale_rows(y: Tensor, scales: Tensor, slots: Tensor) -> None:
    """Multiply the rows of y [tokens, neurons] whose slot is not 0 by their row of `scales`."""
    masked = slots.nonzero().squeeze(1)
    if masked.numel() == y.shape[0]:
        y.mul_(scales[slots])
    elif masked.numel():
        y.index_copy_(0, masked, y[masked] * scales[slots[masked]])


@scale_rows.register_fake
def _(y: Tensor, scales: Tensor, slots: Tensor) -> None:
    return None


def no_mask(y: Tensor, scales: Tensor, slots: Tensor) -> Tensor:
    return y


def table_mask(y: Tensor, scales: Tensor, slots: Tensor) -> Tensor:
    return y * scales[slots[: y.shape[0]]]


def op_mask(y: Tensor, scales: Tensor, slots: Tensor) -> Tensor:
    scale_rows(y, scales, slots[: y.shape[0]])
    return y


def cpp_mask(y: Tensor, scales: Tensor, slots: Tensor) -> Tensor:
    torch.ops.crane_benchmark_cpp.scale_rows(y, scales, slots[: y.shape[0]])
    return y


def ways() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The ways to mask that work here."""
    found = {"none": no_mask, "table": table_mask, "op": op_mask}
    try:
        from torch.utils.cpp_extension import load_inline

        flags = ["-O3", "-march=native", "-fopenmp"]
        load_inline("crane_benchmark_cpp", SOURCE, extra_cflags=flags, is_python_module=False)
        torch.library.register_fake("crane_benchmark_cpp::scale_rows", lambda y, scales, slots: None)
    except Exception as error:
        print(f"no C++ op: {type(error).__name__}: {str(error)[:500]}", file=sys.stderr)
        return found
    return {**found, "op, C++": cpp_mask}


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    neurons: int
    activation: str

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Raises argparse.ArgumentTypeError for a name or shape that means nothing."""
        known = {"gemma-3-270m": "640x2048xgelu", "llama-2-7b": "4096x11008xsilu"}
        try:
            hidden, neurons, activation = known.get(text, text).split("x")
            if activation not in ACTIVATIONS:
                raise ValueError
            return cls(text, int(hidden), int(neurons), activation)
        except ValueError:
            expected = f"{', '.join(known)}, or HIDDENxNEURONSx{{{','.join(ACTIVATIONS)}}}"
            raise argparse.ArgumentTypeError(f"unknown shape {text!r}, expected {expected}") from None


def new_mlp(shape: Shape, mask: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """An MLP as a function of its own, so that each is compiled apart."""
    activation, neurons = ACTIVATIONS[shape.activation], shape.neurons

    def mlp(x: Tensor, gate_up: Tensor, down: Tensor, scales: Tensor, slots: Tensor) -> Tensor:
        both = F.linear(x, gate_up)  # [tokens, 2 * neurons]
        y = activation(both[:, :neurons]) * both[:, neurons:]  # [tokens, neurons]
        return F.linear(mask(y, scales, slots), down)  # [tokens, hidden]

    return mlp


def fill(tokens: int, share: float) -> Tensor:
    """Slots [tokens]: the given share of tokens spread over the rows in use."""
    slots = torch.arange(tokens) % MASKS + 1
    if share < 1:
        slots[1::2] = 0
    return slots if share > 0 else torch.zeros_like(slots)


def sample(call: Callable[[], Any], times: int) -> float:
    """Seconds per call."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


@torch.inference_mode()
def measure_shape(
    shape: Shape, dtype: str, tokens: Sequence[int], modes: Sequence[str], seconds: float, masks: dict[str, Any]
) -> list[dict[str, Any]]:
    """All ways with all fills and numbers of tokens, taking turns for `seconds` per way and fill."""
    generator = torch.Generator().manual_seed(0)
    weights = [
        (torch.randn(rows, columns, generator=generator) / columns**0.5).to(DTYPES[dtype])
        for rows, columns in ((2 * shape.neurons, shape.hidden), (shape.hidden, shape.neurons))
    ]
    scales = (torch.rand(ROWS, shape.neurons, generator=generator) > 0.01).to(DTYPES[dtype])
    scales[0] = 1.0
    results = []
    for mode in modes:
        mlps = {way: new_mlp(shape, mask) for way, mask in masks.items()}
        if mode == "compiled":
            torch.compiler.reset()
            mlps = {way: torch.compile(mlp, dynamic=True, fullgraph=True) for way, mlp in mlps.items()}
        for count in tokens:
            x = torch.randn(count, shape.hidden, generator=generator).to(DTYPES[dtype])
            calls = {
                (way, name): partial(mlp, x, *weights, scales, fill(count, share))
                for way, mlp in mlps.items()
                for name, share in FILLS.items()
                if way != "none" or share == 0
            }
            exact = {
                (way, name): torch.equal(call(), calls["none" if name == "unmasked" else "table", name]())
                for (way, name), call in calls.items()
            }
            times = take_turns(calls, seconds)
            baseline = times["none", "unmasked"]
            for (way, name), own in times.items():
                place = {"shape": vars(shape), "dtype": dtype, "mode": mode, "tokens": count, "way": way, "fill": name}
                results.append(
                    {
                        **place,
                        "seconds": spread(list(own.values())),
                        "cost": speed_ratio(own, baseline),  # its time over the time without a mask
                        "exact": exact[way, name],
                    }
                )
            print(f"{shape.name} {dtype} {mode} {count} tokens done", file=sys.stderr, flush=True)
    return results


def take_turns(calls: dict[tuple[str, str], Callable[[], Any]], seconds: float) -> dict[tuple[str, str], dict]:
    """(way, fill) -> (0, repetition) -> seconds per call."""
    longest = 0.0
    for call in calls.values():
        call()
        longest = max(longest, sample(call, 1))
    inner = max(1, int(SAMPLE_S / longest))
    repetitions = min(MOST_REPETITIONS, max(FEWEST_REPETITIONS, int(seconds / (longest * inner))))
    times: dict[tuple[str, str], dict] = {key: {} for key in calls}
    order = list(calls)
    draw = random.Random(0)
    for repetition in range(repetitions):
        draw.shuffle(order)
        for key in order:
            times[key][0, repetition] = sample(calls[key], inner)
    return times


def report(results: Sequence[dict[str, Any]]) -> str:
    header = ["shape", "dtype", "mode", "tokens", "way", "fill", "us", "quartiles", "range"]
    header += ["/ none", "95 %", "exact"]
    rows = []
    for one in results:
        microseconds = {key: value * 1e6 for key, value in one["seconds"].items()}
        interval = one["cost"]["interval"]
        rows.append(
            [
                one["shape"]["name"],
                one["dtype"],
                one["mode"],
                str(one["tokens"]),
                one["way"],
                "-" if one["way"] == "none" else one["fill"],
                f"{microseconds['median']:.1f}",
                f"{microseconds['lower_quartile']:.1f}..{microseconds['upper_quartile']:.1f}",
                f"{microseconds['min']:.1f}..{microseconds['max']:.1f}",
                f"{one['cost']['ratio']:.3f}",
                "-" if interval is None else "{:.3f}..{:.3f}".format(*interval),
                "yes" if one["exact"] else "NO",
            ]
        )
    return table(header, rows)


def main() -> None:
    def comma_separated(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", type=Shape.parse, metavar="SHAPE")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--tokens", type=comma_separated, default=["1", "32", "256", "1024"])
    parser.add_argument("--dtypes", type=comma_separated, default=list(DTYPES))
    parser.add_argument("--modes", type=comma_separated, default=["eager", "compiled"])
    parser.add_argument("--seconds", type=float, default=0.3, help="per way and fill; at least five repetitions")
    options = parser.parse_args()
    shapes = options.shapes or [Shape.parse("gemma-3-270m"), Shape.parse("llama-2-7b")]
    about, masks = machine(), ways()
    results = []
    for shape in shapes:
        for dtype in options.dtypes:
            counts = list(map(int, options.tokens))
            results += measure_shape(shape, dtype, counts, options.modes, options.seconds, masks)
    print(report(results))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {"rows": ROWS, "masks": MASKS, "threads": torch.get_num_threads(), "seconds": options.seconds}
        content = {"machine": about, "settings": settings, "results": results}
        write_atomically(options.out, json.dumps(content, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
