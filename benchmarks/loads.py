"""What the engines are asked: prompts, masks, and which request runs under which mask."""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from worker import Job, Pass

MASK_SHARE = 0.01  # of each layer's neurons
LANGUAGES = ("en", "zh", "vi")
WINDOW = "prompt[-4:]+generated[:16]"  # the masked tokens of windows-K


@dataclass(frozen=True)
class Load:
    """A shape of requests; prompt lengths vary by a quarter around `prompt_tokens`."""

    prompt_tokens: int
    output_tokens: int


LOADS = {"decode": Load(prompt_tokens=32, output_tokens=64), "prefill": Load(prompt_tokens=256, output_tokens=4)}


def write_masks(model: Path, directory: Path, count: int, offset: float = 0.0) -> None:
    """Masks m0, m1, ... that set random neurons to `offset`, as many in every layer."""
    from crane_serve.common.masks import Fingerprint, MaskInfo, NeuronMask, write_mask

    fingerprint = Fingerprint.of(model)
    for seed in range(count):
        draw = random.Random(seed)
        neurons = [draw.sample(range(size), max(1, int(size * MASK_SHARE))) for size in fingerprint.intermediate_sizes]
        mask = NeuronMask.switching_off(neurons, fingerprint.intermediate_sizes)
        mask = replace(mask, offset=(1 - mask.intermediate) * offset)
        write_mask(directory, f"m{seed}", mask, MaskInfo(language="en", method="random", fingerprint=fingerprint))


def random_prompts(model: Path, load: Load, count: int) -> list[list[int]]:
    """Distinct prompts of random tokens, the same for every caller."""
    config = json.loads((model / "config.json").read_text())
    config = config.get("text_config", config)
    vocabulary, first = config["vocab_size"], config.get("bos_token_id") or 0
    tokens = range(min(1000, vocabulary // 4), min(20_000, vocabulary))
    draw = random.Random(0)
    quarter = load.prompt_tokens // 4
    lengths = [load.prompt_tokens + draw.randint(-quarter, quarter) for _ in range(count)]
    return [[first, *draw.choices(tokens, k=length - 1)] for length in lengths]


def text_prompts(model: Path, count: int, max_tokens: int) -> dict[str, list[list[int]]]:
    """Per language the beginnings of `count` documents of the project's parallel corpus."""
    from crane_serve.common.models.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    corpus = Path(__file__).resolve().parent.parent / "crane_serve" / "common" / "text" / "parallel_corpus"
    prompts = {}
    for language in LANGUAGES:
        lines = (corpus / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
        documents = [document["text"] for document in map(json.loads, lines) if document["split"] == "test"]
        if count > len(documents):
            raise ValueError(f"{count} prompts per language asked for, the corpus has {len(documents)}")
        prompts[language] = [tokenizer(text)["input_ids"][:max_tokens] for text in documents[:count]]
    return prompts


def mixed(prompts: list[list[int]], max_tokens: int, masks: int, turn: int = 0, positions: str | None = None) -> Job:
    """All requests at once, under `masks` distinct masks in rotation; 0 is none. positions: of what is masked.

    With more masks than requests, `turn` (the number of the measurement) says which come next.
    """
    offset = turn * len(prompts)
    names = [f"m{(offset + index) % masks}" if masks else None for index in range(len(prompts))]
    return {"passes": [{"prompts": prompts, "masks": names}], "max_tokens": max_tokens, "positions": positions}


def one_by_one(prompts: list[list[int]], max_tokens: int, masks: int, turn: int = 0) -> Job:
    """The same requests for an engine that knows one mask at a time: a pass for each mask with its requests."""
    passes: dict[str, Pass] = {}
    for prompt, name in zip(prompts, mixed(prompts, 0, masks, turn)["passes"][0]["masks"], strict=True):
        passes.setdefault(name, {"prompts": [], "mask": name})["prompts"].append(prompt)
    return {"passes": list(passes.values()), "max_tokens": max_tokens}


def warm_up(prompts: list[list[int]]) -> Job:
    """A short unmasked job with prompts of the same kind, to be run before a measurement."""
    return {"passes": [{"prompts": prompts[:8]}], "max_tokens": 2}


def fill_table(masks: int) -> Job:
    """One short request under each mask, so that all that fit are resident."""
    return {"passes": [{"prompts": [[1, 2, 3]] * masks, "masks": [f"m{i}" for i in range(masks)]}], "max_tokens": 1}


def settings() -> dict[str, Any]:
    """The shapes of the loads, for the report."""
    return {name: vars(load) for name, load in LOADS.items()}
