"""What relevance costs: an AttnLRP pass against a plain forward and backward pass, and its peak memory.

    python benchmarks/relevance_speed.py MODEL --out results/relevance-speed.json [--documents 24] [--repetitions 5]

Arms, all on the same documents of the packaged corpus (English, relevance split):
- plain: forward through the trunk, logits of the targets alone, backward to the embeddings; batches as in relevance.
- plain-again: the same once more, so that the noise can be seen.
- attnlrp: the AttnLRP method. checkpointed: with activations computed again in the backward pass.
- one-pass: all methods that one AttnLRP pass serves.
- one-by-one: the published way: one document at a time, logits of the whole vocabulary, gradients of all layers kept.

Arms take turns, in an order that is shuffled for each repetition. Ratios are speed relative to plain, with a 95 %
bootstrap interval over repetitions. Peak memory is the high-water mark of the resident set above that of the loaded
model, in a process of its own that runs one arm over N or over 4 N documents (the same ones four times), as read from
/proc where there is one.
Prints tables and writes OUT.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from summary import machine, speed_ratio, spread, table
from torch import Tensor, nn

from crane_serve.common.atomic import write_atomically
from crane_serve.common.models.families import take_apart
from crane_serve.common.models.load import load_tokenizer
from crane_serve.common.models.resolve import resolve_checkpoint
from crane_serve.common.text.corpus import EMBEDDED_CORPUS, Corpus
from relevance.encoding import Batch, batches, encode
from relevance.method import Measured
from relevance.methods import find_scored
from relevance.model import DTYPES, load_model, pick_device
from relevance.model_passes import ModelPasses, last_hidden, units_of
from relevance.rules import ATTNLRP, propagation
from relevance.targets import per_document, target_logits

BASELINE = "plain"
MEMORY_ARMS = ("plain", "attnlrp", "checkpointed", "one-pass", "one-by-one")

Arm = Callable[[Sequence[list[int]]], None]


def arms(model: nn.Module, batch_tokens: int) -> dict[str, Arm]:
    """What can be run over documents, by name."""
    device = next(model.parameters()).device

    def plain(documents: Sequence[list[int]]) -> None:
        decoder = take_apart(model)
        for batch in batches(documents, batch_tokens, device):
            embeddings = decoder.embedding(batch.token_ids).detach().requires_grad_()
            hidden = last_hidden(decoder, embeddings)
            total = per_document(target_logits(decoder, hidden, batch), batch).sum()
            torch.autograd.grad(total, embeddings)

    def measured(names: Sequence[str] | None, checkpointing: bool = False) -> Arm:
        kinds = [kind for kind in find_scored(names) if issubclass(kind, Measured)]

        def run(documents: Sequence[list[int]]) -> None:
            with ModelPasses(model, checkpointing) as passes:
                methods = [kind(units_of(passes.decoder), device) for kind in kinds]
                for batch in batches(documents, batch_tokens, device):
                    passes.run(batch, methods)
            for method in methods:
                method.finalise()

        return run

    return {
        BASELINE: plain,
        "plain-again": plain,
        "attnlrp": measured(["attnlrp"]),
        "checkpointed": measured(["attnlrp"], checkpointing=True),
        "one-pass": measured(None),
        "one-by-one": lambda documents: one_by_one(model, documents),
    }


def one_by_one(model: nn.Module, documents: Sequence[list[int]]) -> None:
    """Relevance as published code makes it: no batches, all logits, and all gradients at once."""
    device = next(model.parameters()).device
    decoder = take_apart(model)
    total: list[Tensor] = [torch.zeros(size, dtype=torch.float64, device=device) for size in decoder.sizes]
    neurons: list[Tensor] = []
    handles = [
        layer.groups[0].down_proj.register_forward_pre_hook(lambda _, inputs: neurons.append(inputs[0]))
        for layer in decoder.layers
    ]
    with propagation(model, ATTNLRP):
        for ids in documents:
            batch = Batch.of([ids], device)
            embeddings = decoder.embedding(batch.token_ids).detach().requires_grad_()
            logits = model(inputs_embeds=embeddings, use_cache=False).logits[0, :-1]
            gradients = torch.autograd.grad(logits.gather(1, batch.token_ids[0, 1:, None]).mean(), neurons)
            for mine, neuron, gradient in zip(total, neurons, gradients, strict=True):
                mine += (neuron * gradient)[0, 1:].sum(dim=0).detach()
            neurons.clear()
    for handle in handles:
        handle.remove()


def timed(running: dict[str, Arm], documents: Sequence[list[int]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of every repetition of every arm, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in running}
    shuffle = random.Random(0)
    for repetition in range(repetitions + 1):
        for name in shuffle.sample(list(running), len(running)):
            start = time.perf_counter()
            running[name](documents)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_mib(options: argparse.Namespace, arm: str, copies: int) -> int:
    """Peak resident memory of a process of its own that runs `arm`, above that of the loaded model, in MiB."""
    command = [sys.executable, __file__, options.model, "--measure-memory", arm, "--copies", str(copies)]
    command += ["--documents", str(options.documents), "--batch-tokens", str(options.batch_tokens)]
    command += ["--threads", str(options.threads), "--dtype", options.dtype, "--device", str(options.device)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(answer.split()[-1])


def resident_kib(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def load(options: argparse.Namespace) -> tuple[nn.Module, list[list[int]]]:
    """The model and the documents' token ids."""
    checkpoint = resolve_checkpoint(options.model)
    texts = Corpus.load(EMBEDDED_CORPUS, "relevance", ["en"]).documents["en"]
    model = load_model(checkpoint, DTYPES[options.dtype], options.device)
    vocabulary = take_apart(model).vocabulary
    token_ids = encode(load_tokenizer(checkpoint), "en", texts, max_tokens=2048, vocabulary=vocabulary).token_ids
    return model, [token_ids[index % len(token_ids)] for index in range(options.documents)]


def summarised(seconds: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    keyed = {name: {(0, index): value for index, value in enumerate(values)} for name, values in seconds.items()}
    return {
        name: {
            "seconds": spread(values),
            "tokens_per_s": tokens / spread(values)["median"],
            "speed": speed_ratio(keyed[BASELINE], keyed[name]),
        }
        for name, values in seconds.items()
    }


def speed_table(found: dict[str, Any]) -> str:
    rows = []
    for name, arm in found.items():
        interval = arm["speed"]["interval"]
        rows.append(
            [
                name,
                f"{arm['seconds']['median']:.2f}",
                f"{arm['seconds']['min']:.2f} - {arm['seconds']['max']:.2f}",
                f"{arm['speed']['ratio']:.2f}",
                "" if interval is None else f"{interval[0]:.2f} - {interval[1]:.2f}",
            ]
        )
    return table(["arm", "median s", "range s", "speed / plain", "95 %"], rows)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=Path("relevance-speed.json"))
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", type=pick_device, default="cpu")
    parser.add_argument("--arms", help="comma-separated; default: all")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--measure-memory", choices=MEMORY_ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--copies", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, documents = load(options)
    running = arms(model, options.batch_tokens)
    if options.measure_memory:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to the resident set
        before = resident_kib("VmHWM")
        running[options.measure_memory](documents * options.copies)
        print((resident_kib("VmHWM") - before) // 1024)
        return
    if options.arms:
        running = {name: running[name] for name in [BASELINE, *options.arms.split(",")]}
    tokens = sum(map(len, documents))
    print(f"{options.model}: {len(documents)} documents, {tokens} tokens, {options.threads} thread(s)")
    seconds = timed(running, documents, options.repetitions)
    found: dict[str, Any] = {
        "machine": machine(),
        "model": options.model,
        "dtype": options.dtype,
        "threads": options.threads,
        "batch_tokens": options.batch_tokens,
        "documents": len(documents),
        "tokens": tokens,
        "speed": summarised(seconds, tokens),
    }
    print(speed_table(found["speed"]))
    if not options.no_memory and Path("/proc/self/clear_refs").exists():
        memory = {name: [peak_mib(options, name, copies) for copies in (1, 4)] for name in MEMORY_ARMS}
        found["peak_mib"] = {name: {"N": once, "4N": four_times} for name, (once, four_times) in memory.items()}
        rows = [[name, *map(str, mib)] for name, mib in memory.items()]
        print(table(["peak memory, MiB above the model", "N documents", "4 N"], rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, json.dumps(found, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
