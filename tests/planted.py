"""Mixtures of experts with planted neurons: what each of two made-up languages needs sits where we know it to be.

A text has runs of letters, of one half of the alphabet in each language, and runs of digits in both. What follows a
letter or a digit is fixed for the most part. Embeddings, attention and routers stay random; only the experts' neurons
are trained, and each group of them only by what it is there for: some of each expert by the letters of one language,
some by those of the other, the rest by the digits.
"""

import random
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from crane_serve.common.models.experts import Experts, expert_modules
from crane_serve.common.models.mlps import language_model
from crane_serve.common.models.open_experts import open_experts
from tests.architectures import model_class, tiny_config
from tests.tiny import byte_tokenizer

LETTERS = {"aa": "abcdefghijkl", "bb": "nopqrstuvwxy"}
DIGITS = "0123456789"
_SHARE = 16  # one neuron in so many of each expert, for each language
_FIXED = 0.9  # how often the follower is the usual one
_STEPS, _DOCUMENTS, _TOKENS, _RATE, _SILENCE = 200, 16, 48, 1e-2, 10.0


def text(language: str, draw: random.Random, length: int) -> str:
    """A text of so many characters."""
    found: list[str] = []
    while len(found) < length:
        symbols = draw.choice([LETTERS[language], DIGITS])
        last = draw.choice(symbols)
        for _ in range(12):
            found.append(last)
            last = _follower(symbols, last) if draw.random() < _FIXED else draw.choice(symbols)
    return "".join(found[:length])


def _follower(symbols: str, symbol: str) -> str:
    order = random.Random(symbols).sample(symbols, len(symbols))
    return order[(order.index(symbol) + 1) % len(order)]


def write_corpus(directory: Path, documents: int = 40, characters: int = 60, seed: str = "corpus") -> Path:
    """One file of texts for each language, a text a line."""
    directory.mkdir(parents=True)
    for language in LETTERS:
        draw = random.Random(f"{seed} {language}")
        lines = [text(language, draw, characters) for _ in range(documents)]
        (directory / f"{language}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def planted_checkpoint(architecture: str, directory: Path) -> Path:
    """Train and write a model of an architecture with experts."""
    torch.manual_seed(0)
    model = model_class(architecture).from_config(tiny_config(architecture), dtype=torch.float32)
    train(model)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def neurons(sizes: tuple[int, ...], experts: Experts) -> dict[str, set[tuple[int, int]]]:
    """The planted neurons of each language: layer and index in the layer, as masks count them."""
    owners = _owners(experts.size).repeat(experts.count)  # [experts * neurons]
    return {
        language: {
            (layer, experts.columns(layer, sizes).start + index)
            for layer in experts.layers
            for index in (owners == place).nonzero().flatten().tolist()
        }
        for place, language in enumerate(LETTERS)
    }


def _owners(size: int) -> Tensor:
    """[neurons] of an expert: the place of the language that it is for, len(LETTERS) for digits."""
    return (torch.arange(size) // (size // _SHARE)).clamp(max=len(LETTERS))


def train(model: PreTrainedModel) -> None:
    """Teach it both languages. Its other parameters stay as they are.

    Where a token is of one group's symbols, the neurons of the other groups are taught to be silent.
    """
    tokenizer = byte_tokenizer()
    of_symbols = torch.full((model.config.vocab_size,), -1)  # by token id, the group
    for group, symbols in enumerate((*LETTERS.values(), DIGITS)):
        of_symbols[tokenizer(symbols)["input_ids"][1:]] = group
    trained, owners = [], []
    neurons: list[Tensor] = []  # of a pass, [tokens, neurons] of the experts of each layer
    model.requires_grad_(False)
    for module in expert_modules(language_model(model)).values():
        of = _owners(module.down_proj.shape[2])
        # [experts, hidden, neurons]; [experts, gates and ups, hidden]
        for parameter, owner in ((module.down_proj, of), (module.gate_up_proj, of.repeat(2).unsqueeze(1))):
            trained.append(parameter.requires_grad_())
            owners.append(owner)
        open_experts(module).down_proj.register_forward_pre_hook(lambda _, inputs: neurons.append(inputs[0]))
    of_neurons = of.repeat(len(module.down_proj))  # [neurons]
    optimiser = torch.optim.Adam(trained, lr=_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, _STEPS)
    draw = random.Random(0)
    for _ in range(_STEPS):
        neurons.clear()
        texts = [text(language, draw, _TOKENS) for _ in range(_DOCUMENTS) for language in LETTERS]
        ids = torch.tensor(tokenizer(texts)["input_ids"])  # [documents, tokens]
        logits = model(input_ids=ids).logits[:, :-1]  # [documents, tokens - 1, vocabulary]
        nats = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        groups = of_symbols[ids]  # [documents, tokens]
        foreign = of_neurons != groups.flatten().unsqueeze(1)  # [tokens, neurons]
        silence = _SILENCE * sum((of_layer.abs() * foreign).mean() for of_layer in neurons)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        silence.backward(retain_graph=True)
        for group in range(len(LETTERS) + 1):
            found = torch.autograd.grad(nats[groups[:, :-1] == group].mean(), trained, retain_graph=True)
            for parameter, gradient, of in zip(trained, found, owners, strict=True):
                parameter.grad += gradient * (of == group)
        optimiser.step()
        schedule.step()
    model.requires_grad_(True)
