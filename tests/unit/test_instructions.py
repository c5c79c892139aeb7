"""The instructions for the chat checkpoint, and what a step of training on them does."""

import json
import sys
from pathlib import Path
from typing import Any

import py3langid
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from crane_serve.common.masks import Fingerprint
from tests.tiny import BOS, EOS, tiny_model

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "chat"))

import fine_tune
from fine_tune import Example, Instruction, Settings

TOPICS = {"cooking", "travel", "school", "nature", "health", "letter", "sums"}
QUICK = Settings(epochs=1, group=3, batch=2, dtype="float32", rate=1e-3)


@pytest.fixture(scope="module", params=["llama", "gemma2", "gemma3", "opt"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(request.param, tmp_path_factory.mktemp("base"), dtype=torch.bfloat16)


@pytest.fixture
def model(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.fixture
def examples(checkpoint: Path) -> list[Example]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = fine_tune.CHAT_TEMPLATE
    texts = [("Why?", "So."), ("多少？", "两个。"), ("Ở đâu vậy?", "Ở nhà.")]
    return [fine_tune.encode(tokenizer, Instruction("x", "train", *text)) for text in texts]


@pytest.mark.parametrize("language", fine_tune.LANGUAGES)
def test_instructions_are_whole(language: str) -> None:
    lines = (fine_tune.INSTRUCTIONS / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
    assert [list(json.loads(line)) for line in lines] == [["id", "split", "prompt", "answer"]] * 48
    instructions = fine_tune.read_instructions(language)
    for one in instructions:
        for text in (one.prompt, one.answer):
            assert text == text.strip()
            assert "\n" not in text
        sentences = sum(one.answer.count(end) for end in (".", "?", "!", "。", "？", "！"))
        assert 2 <= sentences <= 5, one.id
    assert len({one.prompt for one in instructions}) == len({one.answer for one in instructions}) == 48


def test_instructions_are_parallel() -> None:
    first, *others = (
        [(one.id, one.split) for one in fine_tune.read_instructions(lang)] for lang in fine_tune.LANGUAGES
    )
    assert others == [first, first]
    assert len(dict(first)) == 48
    splits = [split for _, split in first]
    assert (splits.count("train"), splits.count("test")) == (40, 8)
    assert len(fine_tune.read_instructions("vi", "test")) == 8
    assert {name.partition("-")[0] for name, split in first if split == "test"} >= TOPICS


@pytest.mark.parametrize("language", fine_tune.LANGUAGES)
def test_every_text_is_in_its_language(language: str) -> None:
    texts = [text for one in fine_tune.read_instructions(language) for text in (one.prompt, one.answer)]
    assert [text for text in texts if py3langid.classify(text)[0] != language] == []


def test_an_example_is_what_the_chat_template_says(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = fine_tune.CHAT_TEMPLATE
    example = fine_tune.encode(tokenizer, Instruction("x", "train", "Why?", "So."))
    assert tokenizer.decode(example.token_ids) == f"{BOS}>>>\nWhy?\n<<<\nSo.{EOS}"
    assert example.answer_tokens == 4  # S, o, the full stop, the end

    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", " c "))]
    said = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert said == f"{BOS}>>>\na\n<<<\nb{EOS}\n>>>\nc\n<<<\n"
    with pytest.raises(Exception, match="roles are user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "a"}], tokenize=False)


def test_the_loss_counts_answers_alone_and_no_padding(model: Any, examples: list[Example]) -> None:
    expected = 0.0
    with torch.no_grad():
        for example in examples:  # one by one, from the whole model's logits
            logits = model.eval()(torch.tensor([example.token_ids])).logits[0]  # [t, vocabulary]
            logs = logits.log_softmax(-1)
            start = len(example.token_ids) - example.answer_tokens
            for position in range(start, len(example.token_ids)):
                expected -= float(logs[position - 1, example.token_ids[position]])
    tokens = sum(example.answer_tokens for example in examples)
    assert fine_tune.mean_loss(model, examples, QUICK) == pytest.approx(expected / tokens, rel=1e-5)


def test_a_step_changes_the_trunk_and_not_the_embeddings(model: Any, examples: list[Example]) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = fine_tune.mean_loss(model, examples, QUICK)
    losses = fine_tune.train(model, examples, QUICK)
    assert losses == [pytest.approx(loss, rel=1e-4)]
    assert fine_tune.mean_loss(model, examples, QUICK) < loss
    after = model.state_dict()
    assert {name: tensor.shape for name, tensor in after.items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not {name for name in changed if "embed_tokens" in name or "lm_head" in name}
    matrices = {name for name in before if name.endswith(("down_proj.weight", "fc2.weight", "q_proj.weight"))}
    assert matrices
    assert matrices <= changed


def test_training_is_repeatable(checkpoint: Path, examples: list[Example]) -> None:
    def trained(seed: int) -> tuple[list[float], torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        losses = fine_tune.train(model, examples, Settings(epochs=2, group=1, dtype="float32", seed=seed))
        return losses, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    (losses, weights), (again, same), (others, _) = trained(0), trained(0), trained(1)
    assert losses == again
    assert torch.equal(weights, same)
    assert losses != others


def test_every_example_is_seen_once_per_epoch() -> None:
    examples = [Example([index], 1) for index in range(10)]
    groups = list(fine_tune.groups(examples, Settings(epochs=2, group=4)))
    assert [len(group) for group in groups] == [4, 4, 2, 4, 4, 2]
    epochs = [[example.token_ids[0] for group in half for example in group] for half in (groups[:3], groups[3:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]


def test_the_rate_rises_then_falls() -> None:
    shares = [fine_tune.rate_share(step, 20, 0.1) for step in range(20)]
    assert shares[:3] == [0.5, 1.0, 1.0]
    assert shares[2:] == sorted(shares[2:], reverse=True)
    assert shares[11] == pytest.approx(0.5)
    assert 0 < shares[-1] < 0.01


def test_the_checkpoint_is_another_model_of_the_same_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model("llama", tmp_path / "base", layers=1, dtype=torch.bfloat16)
    (base / "NOTICE.md").write_text("terms")
    every = fine_tune.read_instructions
    monkeypatch.setattr(fine_tune, "read_instructions", lambda language, split: every(language, split)[:1])
    report = fine_tune.fine_tune(base, tmp_path / "chat", Settings(epochs=4, group=1, rate=3e-3))

    old, new = Fingerprint.of(base), Fingerprint.of(tmp_path / "chat")
    assert old.weights_digest != new.weights_digest
    shape = ("architecture", "layers", "hidden_size", "intermediate_sizes")
    assert [getattr(old, field) for field in shape] == [getattr(new, field) for field in shape]
    assert json.loads((tmp_path / "chat" / "fine-tuning.json").read_text()) == report
    for language in fine_tune.LANGUAGES:
        assert report["loss_after"]["train"][language] < report["loss_before"]["train"][language]
    assert (tmp_path / "chat" / "NOTICE.md").read_text() == "terms"
    assert "base, modified" in (tmp_path / "chat" / "CHANGES-MODEL.txt").read_text()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "chat")
    assert reloaded.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "chat").chat_template == fine_tune.CHAT_TEMPLATE
