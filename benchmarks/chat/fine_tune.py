"""Fine-tune a copy of a model on the instructions beside this file, to have a chat checkpoint of the base's shape.

    python benchmarks/chat/fine_tune.py models/gemma-3-270m --out models/gemma-3-270m-chat --epochs 3 --seed 0

The whole trunk is trained, embedding and unembedding are not. The form of a chat has no word of any language:

    <bos>>>>
    What is rain?
    <<<
    Water that falls from clouds.<eos>

It is written into the tokenizer's chat template. The loss is the mean negative log-likelihood (nats) of answer tokens,
with the token that ends the answer. Writes the checkpoint in the base's dtype and `fine-tuning.json`: settings, losses
of the base and of what is written, seconds.
"""

import argparse
import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

INSTRUCTIONS = Path(__file__).parent / "instructions"
LANGUAGES = ("en", "vi", "zh")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '>>>\n' + message['content'] | trim + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<<<\n' + message['content'] | trim + eos_token + '\n' }}"
    "{% else %}{{ raise_exception('roles are user and assistant') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<<<\n' }}{% endif %}"
)
_NOTICES = ("*NOTICE*", "*LICENSE*", "*TERMS*")


@dataclass(frozen=True)
class Instruction:
    """A prompt and the answer to learn. split: train or test."""

    id: str
    split: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Example:
    """An instruction as token ids; the loss counts the last `answer_tokens`."""

    token_ids: list[int]
    answer_tokens: int


@dataclass(frozen=True)
class Settings:
    """How to train.

    rate: highest learning rate; warm_up: share of the steps in which it rises, then it falls to 0 along a cosine.
    group: examples per step; batch: examples computed at once; dtype: of the computation, float32 or bfloat16.
    """

    epochs: int = 3
    seed: int = 0
    rate: float = 2e-5
    group: int = 8
    batch: int = 8
    dtype: str = "bfloat16"
    warm_up: float = 0.1
    max_gradient: float = 1.0


def read_instructions(language: str, split: str | None = None, directory: Path = INSTRUCTIONS) -> list[Instruction]:
    """The instructions of a language in the order of the file, all or those of one split."""
    lines = (directory / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
    instructions = [Instruction(**json.loads(line)) for line in lines]
    return [one for one in instructions if split in (None, one.split)]


def encode(tokenizer: Any, instruction: Instruction) -> Example:
    """Prompt and answer, encoded apart as they are when a model is asked."""
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": instruction.prompt}], add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
    answer = [*tokenizer(instruction.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return Example([*prompt, *answer], len(answer))


def answer_loss(model: Any, batch: Sequence[Example]) -> Tensor:
    """Sum of the negative log-likelihoods (nats) of the answers' tokens, a scalar.

    Logits are made for the answers alone: a vocabulary of 262,144 costs more than the trunk.
    """
    longest = max(len(example.token_ids) for example in batch)
    token_ids = torch.zeros(len(batch), longest, dtype=torch.int64)  # [d, t], padded on the right: nothing sees it
    answered = torch.zeros(len(batch), longest, dtype=torch.bool)  # [d, t]
    for row, example in enumerate(batch):
        end = len(example.token_ids)
        token_ids[row, :end] = torch.tensor(example.token_ids)
        answered[row, end - example.answer_tokens : end] = True
    token_ids, answered = token_ids.to(model.device), answered.to(model.device)
    hidden = model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state  # [d, t, hidden]
    logits = model.get_output_embeddings()(hidden[:, :-1][answered[:, 1:]]).float()  # [answer tokens, vocabulary]
    softcap = getattr(model.config, "final_logit_softcapping", None)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return nn.functional.cross_entropy(logits, token_ids[answered], reduction="sum")


def in_dtype(model: Any, dtype: str) -> torch.autocast:
    """Compute in `dtype`, float32 or bfloat16; the weights stay float32."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16")


@torch.no_grad()
def mean_loss(model: Any, examples: Sequence[Example], settings: Settings) -> float:
    """Nats per answer token over all `examples`."""
    model.eval()
    total = 0.0
    for batch in batches(sorted(examples, key=lambda example: len(example.token_ids)), settings.batch):
        with in_dtype(model, settings.dtype):
            total += float(answer_loss(model, batch))
    return total / sum(example.answer_tokens for example in examples)


def batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    """`examples` in order, `size` at a time."""
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def freeze_embeddings(model: Any) -> list[nn.Parameter]:
    """Exclude embedding and unembedding, tied or not, from training; return what is left."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.requires_grad_(False)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def groups(examples: Sequence[Example], settings: Settings) -> Iterator[Sequence[Example]]:
    """Per step the examples whose gradients are summed; each epoch in an order of its own."""
    draw = random.Random(settings.seed)
    for _ in range(settings.epochs):
        yield from batches(draw.sample(examples, len(examples)), settings.group)


def rate_share(step: int, steps: int, warm_up: float) -> float:
    """Share of the highest rate at `step` of `steps`: a linear rise, then a cosine."""
    rise = max(1, round(steps * warm_up))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def train(model: Any, examples: Sequence[Example], settings: Settings) -> list[float]:
    """Train `model` in place with AdamW; nats per answer token of every step."""
    parameters = freeze_embeddings(model)
    optimizer = torch.optim.AdamW(parameters, lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.0)
    plan = list(groups(examples, settings))
    losses = []
    model.eval()  # no dropout
    for step, group in enumerate(plan):
        tokens = sum(example.answer_tokens for example in group)
        loss = 0.0
        for batch in batches(sorted(group, key=lambda example: len(example.token_ids)), settings.batch):
            with in_dtype(model, settings.dtype):
                share = answer_loss(model, batch) / tokens
            torch.autograd.backward(share)
            loss += float(share.detach())
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_gradient)
        for held in optimizer.param_groups:
            held["lr"] = settings.rate * rate_share(step, len(plan), settings.warm_up)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


def fine_tune(base: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """Write the fine-tuned checkpoint to the new directory `out`; return what `fine-tuning.json` says."""
    from crane_serve.common.models.load import load_causal_lm, load_config, load_tokenizer

    began = time.monotonic()
    torch.manual_seed(settings.seed)
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = CHAT_TEMPLATE
    stored_dtype = load_config(base).dtype or torch.float32
    model: Any = load_causal_lm(base, torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    examples = {
        split: {
            language: [encode(tokenizer, instruction) for instruction in read_instructions(language, split)]
            for language in LANGUAGES
        }
        for split in ("train", "test")
    }

    def losses() -> dict[str, dict[str, float]]:
        return {
            split: {language: round(mean_loss(model, parts, settings), 4) for language, parts in by_language.items()}
            for split, by_language in examples.items()
        }

    before = losses()
    steps = train(model, [example for parts in examples["train"].values() for example in parts], settings)
    model.to(stored_dtype).save_pretrained(out)
    model.float()  # what was written, rounding included
    tokenizer.save_pretrained(out)
    copy_notices(base, out)
    report = {
        "base": base.name,
        "settings": asdict(settings),
        "loss_before": before,
        "loss_after": losses(),
        "loss_per_step": [round(loss, 4) for loss in steps],
        "took_s": round(time.monotonic() - began, 1),
    }
    (out / "fine-tuning.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def copy_notices(base: Path, out: Path) -> None:
    """Bring the base's licence texts along, and say beside them that this model was changed."""
    for notice in sorted({path for pattern in _NOTICES for path in base.glob(pattern)}):
        shutil.copyfile(notice, out / notice.name)
    (out / "CHANGES-MODEL.txt").write_text(
        f"The weights are those of {base.name}, modified: fine-tuned on crane-serve's benchmarks/chat/instructions.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a copy of a model on a few instructions in three languages")
    parser.add_argument("model", type=Path, help="checkpoint directory of the base model")
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--rate", type=float, default=Settings.rate, help="highest learning rate")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=Settings.dtype, help="of the computation")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists; expected a directory to make")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what determinism asks for on CUDA
    torch.use_deterministic_algorithms(True)
    settings = Settings(epochs=options.epochs, seed=options.seed, rate=options.rate, dtype=options.dtype)
    report = fine_tune(options.model, options.out, settings)
    print(json.dumps({name: report[name] for name in ("loss_before", "loss_after", "took_s")}, indent=2))


if __name__ == "__main__":
    main()
