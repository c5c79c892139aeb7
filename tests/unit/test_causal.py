"""Losses under masks, the searches that use them, and validation, on tiny models and on hand-made effects."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from crane_serve.common.masks import NeuronMask
from crane_serve.common.models.decoder import Decoder
from crane_serve.common.models.families import take_apart
from relevance.accumulators import NonFiniteError
from relevance.causal import losses, masked, scaled
from relevance.encoding import Batch
from relevance.model import load_model
from relevance.search.learning import Learning, Step, closed, learn_scores
from relevance.search.refinement import Refinement, by_rank, refine, refine_scores
from relevance.search.words import EXTRA_WORDS, Effect, Unmasked, Words, effect, predicting
from relevance.validation.ablations import Ablations, JournalError
from tests.tiny import FAMILIES, tiny_model

TEXTS = {
    "en": [[0, *range(10, 40)], [0, 80, 81, 82], [0, *range(60, 75)]],
    "vi": [[0, *range(100, 120)], [0, *range(90, 99)], [0, 130, 131]],
    "zh": [[0, *range(200, 230)], [0, *range(180, 190)], [0, *range(150, 170)]],
}


@pytest.fixture(scope="module", params=["llama", "gemma2", "phi3", "opt"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    path = tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    assert request.param in FAMILIES
    return load_model(path, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path = tiny_model("llama", tmp_path_factory.mktemp("llama"))
    return take_apart(load_model(path, torch.float32, torch.device("cpu")))


_ALL = torch.ones(3, 160, dtype=torch.bool)


def _mask(sizes: tuple[int, ...], seed: int = 0) -> NeuronMask:
    generator = torch.Generator().manual_seed(seed)
    return NeuronMask((torch.rand(len(sizes), max(sizes), generator=generator) > 0.5).float(), sizes)


def _by_hand(model: torch.nn.Module, ids: list[int]) -> float:
    """Nats of one document from the whole vocabulary's logits of the model itself."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    return -float(logits.log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).sum())


def test_losses_are_those_of_the_model_itself(model: torch.nn.Module) -> None:
    found = losses(take_apart(model), TEXTS["en"], batch_tokens=64)
    assert found.nats == pytest.approx([_by_hand(model, ids) for ids in TEXTS["en"]], rel=1e-5)
    assert found.tokens.tolist() == [30, 3, 15]
    assert found.per_token == pytest.approx(found.nats.sum() / 48)


def test_a_mask_is_the_same_as_zeroed_weights(model: torch.nn.Module) -> None:
    decoder = take_apart(model)
    mask = _mask(decoder.sizes)
    with masked(decoder, mask):
        found = losses(decoder, TEXTS["zh"], batch_tokens=64).nats
    weights = [layer.groups[0].down_proj.weight for layer in decoder.layers]
    saved = [weight.clone() for weight in weights]
    for weight, scales in zip(weights, mask.intermediate, strict=True):
        weight.mul_(scales[: weight.shape[1]])  # [hidden, neurons]
    by_hand = [_by_hand(model, ids) for ids in TEXTS["zh"]]
    for weight, value in zip(weights, saved, strict=True):
        weight.copy_(value)
    assert found == pytest.approx(by_hand, rel=1e-5)
    whole = [_by_hand(model, ids) for ids in TEXTS["zh"]]
    assert losses(decoder, TEXTS["zh"], 64).nats == pytest.approx(whole, rel=1e-5)
    assert by_hand != pytest.approx(whole, rel=1e-3)


def test_output_dimensions_are_scaled(llama: Decoder) -> None:
    """Switching off all output dimensions of a layer is the same as all of its neurons."""
    neurons = torch.ones(3, 160)
    neurons[1] = 0
    outputs = torch.ones(3, 64)
    outputs[1] = 0
    with masked(llama, NeuronMask(neurons, llama.sizes)):
        expected = losses(llama, TEXTS["vi"], 64).nats
    with masked(llama, NeuronMask(torch.ones(3, 160), llama.sizes, outputs)):
        assert losses(llama, TEXTS["vi"], 64).nats == pytest.approx(expected, rel=1e-6)


def test_hooks_are_gone_after_an_exception(llama: Decoder) -> None:
    before = losses(llama, TEXTS["en"], 64).nats
    with pytest.raises(ZeroDivisionError), scaled(llama, torch.zeros(3, 160)):
        raise ZeroDivisionError
    assert losses(llama, TEXTS["en"], 64).nats.tolist() == before.tolist()


def test_weights_that_are_not_numbers_are_noticed(tmp_path: Path) -> None:
    decoder = take_apart(load_model(tiny_model("llama", tmp_path), torch.float32, torch.device("cpu")))
    with torch.no_grad():
        decoder.layers[1].groups[0].down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"not finite in torch\.float32; the weights may hold"):
        losses(decoder, TEXTS["en"], 64)
    with pytest.raises(NonFiniteError, match="not finite"):
        learn_scores(decoder, TEXTS, Learning(neurons=4, steps=2))


def _effect(decoder: Decoder, words: Words, language: str, *masks: Tensor) -> Effect:
    """Of masks [layers, widest] on all texts of a language."""
    batch = Batch.of(TEXTS[language], torch.device("cpu"))
    before = Unmasked(decoder, words, TEXTS).log_probabilities(language, range(len(TEXTS[language])))
    return effect(decoder, words, batch, before, torch.stack(masks))


def test_effects_over_all_words_are_the_exact_ones(llama: Decoder) -> None:
    """The tiny vocabulary has fewer tokens than extra words are drawn, so the restricted softmax is the whole one."""
    assert llama.unembedding.weight.shape[0] < EXTRA_WORDS
    words = Words.of(llama, TEXTS)
    mask = _mask(llama.sizes)
    found = _effect(llama, words, "en", mask.intermediate)
    with masked(llama, mask):
        after = losses(llama, TEXTS["en"], 64)
    assert float(found.loss) == pytest.approx(after.per_token - losses(llama, TEXTS["en"], 64).per_token, rel=1e-4)
    assert float(found.divergence) > 0


def test_few_words_hold_every_target(llama: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relevance.search.words.EXTRA_WORDS", 5)
    words = Words.of(llama, TEXTS)
    present = {token for of_language in TEXTS.values() for ids in of_language for token in ids}
    assert len(words.rows) == len(present) + 5
    batch = Batch.of(TEXTS["zh"], torch.device("cpu"))
    targets = words.targets(batch).flatten()
    assert int(targets.min()) >= 0
    expected = [token for ids in TEXTS["zh"] for token in ids[1:]]
    assert (words.place >= 0).nonzero().flatten()[targets].tolist() == expected


def test_gradients_reach_the_gates(llama: Decoder) -> None:
    words = Words.of(llama, TEXTS)
    gates = torch.ones(3, 160, requires_grad=True)
    (gradient,) = torch.autograd.grad(_effect(llama, words, "vi", gates).loss.sum(), gates)
    lower = torch.ones(3, 160)
    lower[2, 7] -= 1e-2
    below, above = _effect(llama, words, "vi", lower, 2 - lower).loss
    assert float(gradient[2, 7]) == pytest.approx(float(above - below) / 2e-2, rel=2e-2, abs=1e-5)


def test_masks_in_one_pass_have_the_effects_that_they_have_alone(model: torch.nn.Module) -> None:
    decoder = take_apart(model)
    words = Words.of(decoder, TEXTS)
    shape = (len(decoder.sizes), max(decoder.sizes))
    masks = [torch.ones(shape), *(_mask(decoder.sizes, seed).intermediate for seed in range(3))]
    together = _effect(decoder, words, "zh", *masks)
    alone = [_effect(decoder, words, "zh", mask) for mask in masks]
    assert together.loss.tolist() == pytest.approx([float(each.loss) for each in alone], rel=1e-4, abs=1e-6)
    assert together.divergence.tolist() == pytest.approx([float(each.divergence) for each in alone], rel=1e-4, abs=1e-6)
    assert (float(together.loss[0]), float(together.divergence[0])) == pytest.approx((0, 0), abs=1e-6)


def test_predictions_of_a_document_are_computed_once(llama: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words.of(llama, TEXTS)
    computed: list[int] = []

    def counting(decoder: Decoder, batch: Batch) -> Tensor:
        computed.append(batch.documents)
        return predicting(decoder, batch)

    monkeypatch.setattr("relevance.search.words.predicting", counting)
    predictions = Unmasked(llama, words, TEXTS)
    first = predictions.log_probabilities("vi", [2, 0])
    again = predictions.log_probabilities("vi", [0, 1, 2, 0])
    assert computed == [2, 1]
    lengths = [len(ids) - 1 for ids in TEXTS["vi"]]
    parts = again.split([lengths[0], lengths[1], lengths[2], lengths[0]])
    assert torch.equal(first, torch.cat([parts[2], parts[0]]))
    assert torch.equal(parts[0], parts[3])


def test_closed_gates_are_the_highest_and_never_padding() -> None:
    scores = torch.tensor([[3.0, 1.0, 9.0], [2.0, 4.0, 0.0]])
    exists = torch.tensor([[True, True, False], [True, True, True]])
    assert closed(scores, exists, 2).tolist() == [[0, 1, 1], [1, 0, 1]]
    assert closed(scores, exists, 0).tolist() == [[1, 1, 1], [1, 1, 1]]


def test_learning_beats_chance_at_its_own_aim(llama: Decoder) -> None:
    words = Words.of(llama, TEXTS)
    options = Learning(neurons=24, steps=30, documents=3, hold=1.0)
    learned = learn_scores(llama, TEXTS, options)
    assert set(learned) == set(TEXTS)
    scores = learned["vi"]
    assert scores.shape == (3, 160)

    def gap(factors: Tensor) -> float:
        found = _losses(llama, words, factors)
        return found["vi"] - max(found["en"], found["zh"])

    exists = torch.ones(3, 160, dtype=torch.bool)
    chance = [gap(closed(torch.rand(3, 160), exists, 24)) for _ in range(20)]
    assert gap(closed(scores, exists, 24)) > max(chance)
    assert torch.equal(scores, learn_scores(llama, TEXTS, options)["vi"])


def test_learning_starts_from_a_ranking(llama: Decoder) -> None:
    places = torch.cartesian_prod(torch.arange(3), torch.arange(160))
    starts = {language: places[torch.randperm(480, generator=torch.Generator().manual_seed(3))] for language in TEXTS}
    seen: list[Step] = []
    scores = learn_scores(llama, TEXTS, Learning(neurons=24, steps=1, trust=1e6), starts, seen.append)
    for language, start in starts.items():
        best = scores[language].flatten().topk(24).indices
        assert {tuple(place.tolist()) for place in places[best]} == {tuple(place.tolist()) for place in start[:24]}
    assert [step.neurons for step in seen] == [24] * 3  # from the first step on
    alone = _effect(llama, Words.of(llama, TEXTS), "zh", closed(by_rank(starts["vi"], (3, 160)), _ALL, 24))
    first = learn_scores(llama, TEXTS, Learning(neurons=24, steps=1, documents=3), starts, seen.append)
    assert first
    assert seen[4].losses["zh"] == pytest.approx(float(alone.loss), rel=1e-4)


def test_a_mask_whose_aim_is_reached_is_learned_no_further(llama: Decoder) -> None:
    seen: list[Step] = []
    options = Learning(neurons=24, steps=12, documents=3, growth=0, effect=-100, spare=100)
    learn_scores(llama, TEXTS, options, report=seen.append)
    assert {step.number for step in seen} == set(range(5))  # one without neurons, then four
    seen.clear()
    learn_scores(llama, TEXTS, replace(options, effect=100), report=seen.append)
    assert len(seen) == 12 * len(TEXTS)


def test_learning_returns_the_mean_of_its_last_steps(llama: Decoder) -> None:
    places = torch.cartesian_prod(torch.arange(3), torch.arange(160))
    starts = dict.fromkeys(TEXTS, places)
    options = Learning(neurons=24, momentum=0.0, spare=-1)  # all neurons are closed from the first step on

    def means(steps: int) -> Tensor:
        return learn_scores(llama, TEXTS, replace(options, steps=steps), starts)["vi"].double()

    first, second, third = (means(steps) for steps in (1, 2, 3))
    moves = [2 * second - first - first, 3 * third - 2 * second - (2 * second - first)]  # between scores, not means
    for move in moves:
        assert float(move.square().mean().sqrt()) == pytest.approx(1.0, rel=1e-5)
    for late in (30, 31):
        assert float((means(late + 1) - means(late)).square().mean().sqrt()) < 0.5


def _losses(decoder: Decoder, words: Words, factors: Tensor) -> dict[str, float]:
    found = {}
    for language in TEXTS:
        found[language] = float(_effect(decoder, words, language, factors).loss)
    return found


def test_refinement_keeps_what_hurts_the_target_more() -> None:
    """Effects that add up: neurons 0 and 3 hurt the target only, 1 hurts both, 2 the other, 4 helps the other."""
    costs = {"vi": [1.0, 1.0, 0.0, 0.5, 0.1, 0.0], "en": [0.0, 1.0, 1.0, 0.0, -0.3, 0.0]}

    def measure(factors: Tensor) -> Mapping[str, float]:
        off = (factors == 0).flatten()
        return {language: float(torch.tensor(cost)[off].sum()) for language, cost in costs.items()}

    order = torch.tensor([[0, 2], [0, 1], [0, 0], [1, 1], [1, 0], [1, 2]])
    seen: list[int] = []
    refined = refine(measure, order, (2, 3), "vi", Refinement(candidates=5, group=1, price=2.0), seen.append)
    assert refined.kept == 3
    # 0 gains 1, 3 gains 0.5, 4 gains 0.1; 1 would gain 1 - 2, 2 would gain -2; 5 was no candidate.
    assert refined.order.tolist() == [[0, 0], [1, 0], [1, 1], [0, 2], [0, 1], [1, 2]]
    assert len(seen) == 10


def test_refinement_without_anything_to_keep_leaves_the_order() -> None:
    order = torch.tensor([[0, 1], [0, 0]])
    refined = refine(lambda factors: {"a": 0.0, "b": 0.1}, order, (1, 2), "a", Refinement(candidates=2, group=1))
    assert (refined.kept, refined.order.tolist()) == (0, order.tolist())


def test_refined_scores_rank_as_refined(llama: Decoder) -> None:
    places = torch.cartesian_prod(torch.arange(3), torch.arange(160))
    order = {language: places[torch.randperm(480, generator=torch.Generator().manual_seed(3))] for language in TEXTS}
    options = Refinement(candidates=24, group=4, documents=2)
    scores, kept = refine_scores(llama, TEXTS, order, options)
    words = Words.of(llama, TEXTS)
    for language, of_language in scores.items():
        assert sorted(of_language.flatten().tolist(), reverse=True)[-1] > 0
        if kept[language]:
            alone = _losses(llama, words, closed(of_language, torch.ones(3, 160, dtype=torch.bool), kept[language]))
            assert alone[language] > 0


def test_scores_by_rank() -> None:
    assert by_rank(torch.tensor([[1, 0], [0, 1]]), (2, 2)).tolist() == [[0.0, 0.5], [1.0, 0.0]]


class TestJournal:
    def ablations(self, decoder: Decoder, journal: Path | None, identity: str = "x") -> Ablations:
        return Ablations(decoder, {"test": TEXTS}, 64, journal, identity)

    def test_what_is_known_is_not_measured_again(self, llama: Decoder, tmp_path: Path) -> None:
        journal = tmp_path / "journal.jsonl"
        mask = _mask(llama.sizes)
        first = self.ablations(llama, journal)
        loss = first.loss(mask, "test", "vi")
        assert first.measured == 2
        second = self.ablations(llama, journal)
        assert second.loss(mask, "test", "vi") == loss
        assert second.measured == 0
        second.losses(_mask(llama.sizes, 1), "test", "vi")
        assert second.measured == 1

    def test_a_torn_line_is_cut_off(self, llama: Decoder, tmp_path: Path) -> None:
        journal = tmp_path / "journal.jsonl"
        first = self.ablations(llama, journal)
        whole = first.losses(None, "test", "en")
        first.losses(None, "test", "vi")
        content = journal.read_bytes()
        journal.write_bytes(content[:-10])
        second = self.ablations(llama, journal)
        assert np.array_equal(second.losses(None, "test", "en").nats, whole.nats)
        assert second.measured == 0
        second.losses(None, "test", "vi")
        assert second.measured == 1
        assert journal.read_bytes() == content

    def test_another_identity_is_refused(self, llama: Decoder, tmp_path: Path) -> None:
        journal = tmp_path / "journal.jsonl"
        self.ablations(llama, journal)
        with pytest.raises(JournalError, match=r"journal\.jsonl holds measurements of another model"):
            self.ablations(llama, journal, identity="y")

    @pytest.mark.parametrize("content", ["", "no json\n", json.dumps({"identity": "x"}) + '\n{"mask": 1}\n', "[]\n"])
    def test_another_file_is_refused(self, llama: Decoder, tmp_path: Path, content: str) -> None:
        journal = tmp_path / "journal.jsonl"
        journal.write_text(content)
        with pytest.raises(JournalError, match="is not a journal"):
            self.ablations(llama, journal)
