"""Searches with more than one seed, for other interventions than zero, and for another target than the loss."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from crane_serve.common.masks import NeuronMask
from crane_serve.common.masks.files import decode_mask
from crane_serve.common.models.decoder import Decoder
from crane_serve.common.models.families import take_apart
from relevance.causal import masked
from relevance.encoding import Batch
from relevance.model import load_model
from relevance.scores import Scores, ScoresError, Search
from relevance.search.agreement import agreed
from relevance.search.learning import Learning, Step, Target, closed, learn_scores
from relevance.search.refinement import Refinement, refine_scores
from relevance.search.words import Effect, Unmasked, Words, effect, predicting
from relevance.selection import order, select
from relevance.selection_options import SelectionError, SelectionOptions
from relevance.validation.result import Validation
from tests.scores import random_scores
from tests.searching import run_crane, scored_tiny
from tests.tiny import tiny_model

TEXTS = {
    "en": [[0, *range(10, 40)], [0, 80, 81, 82], [0, *range(60, 75)]],
    "vi": [[0, *range(100, 120)], [0, *range(90, 99)], [0, 130, 131]],
    "zh": [[0, *range(200, 230)], [0, *range(180, 190)], [0, *range(150, 170)]],
}
ALL = torch.ones(3, 160, dtype=torch.bool)


def _decoder(family: str, path: Path) -> Decoder:
    return take_apart(load_model(tiny_model(family, path), torch.float32, torch.device("cpu")))


@pytest.fixture(scope="module", params=["llama", "opt"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return _decoder(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return _decoder("llama", tmp_path_factory.mktemp("llama"))


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _effect(
    decoder: Decoder, gates: Tensor, language: str, values: Tensor | None = None, share: bool = False
) -> Effect:
    words = Words.of(decoder, TEXTS)
    places = range(len(TEXTS[language]))
    before = Unmasked(decoder, words, TEXTS).log_probabilities(language, places)
    own = words.of_language(TEXTS, language) if share else None
    return effect(decoder, words, Batch.of(TEXTS[language], torch.device("cpu")), before, gates, values, own)


@torch.no_grad()
def test_closed_gates_put_values_in_the_place_of_neurons(decoder: Decoder) -> None:
    """Two masks at once, and each alone as a mask file would have it."""
    shape = (len(decoder.sizes), max(decoder.sizes))
    values = _random(1, *shape)
    gates = torch.stack([closed(_random(seed, *shape), torch.ones(shape, dtype=torch.bool), 60) for seed in (2, 3)])
    together = _effect(decoder, gates, "vi", values)
    words, batch = Words.of(decoder, TEXTS), Batch.of(TEXTS["vi"], torch.device("cpu"))
    before = Unmasked(decoder, words, TEXTS).log_probabilities("vi", range(3))
    for index, of_mask in enumerate(gates):
        mask = NeuronMask(of_mask, decoder.sizes, offset=(1 - of_mask) * values)
        with masked(decoder, mask):
            after = words.log_probabilities(predicting(decoder, batch))
        loss = (before - after).gather(1, words.targets(batch)).mean()
        assert float(together.loss[index]) == pytest.approx(float(loss), rel=1e-4, abs=1e-6)
    assert together.loss.tolist() != pytest.approx(_effect(decoder, gates, "vi").loss.tolist(), rel=1e-2)


def test_gradients_are_those_of_the_replaced_value(llama: Decoder) -> None:
    values = _random(4, 3, 160)
    gates = torch.full((1, 3, 160), 0.7, requires_grad=True)
    (gradient,) = torch.autograd.grad(_effect(llama, gates, "en", values).loss.sum(), gates)
    steepest = gradient.flatten().abs().topk(3).indices.tolist()
    for place in steepest:
        nudged = []
        for nudge in (-0.02, 0.02):
            moved = gates.detach().clone()
            moved.view(-1)[place] += nudge
            nudged.append(float(_effect(llama, moved, "en", values).loss))
        assert float(gradient.flatten()[place]) == pytest.approx((nudged[1] - nudged[0]) / 0.04, rel=0.05)


def test_own_words_are_those_more_frequent_than_in_all_others(llama: Decoder) -> None:
    documents = {"en": [[0, 5, 5, 6, 7]], "vi": [[0, 6, 8, 9, 9]], "zh": [[0, 6, 5], [0, 8, 10]]}
    words = Words.of(llama, documents)

    def own(language: str) -> list[int]:
        chosen = words.of_language(documents, language)
        return [token for token, place in enumerate(words.place.tolist()) if place >= 0 and chosen[place]]

    # 5: 2 of 4 in en, 1 of 4 in zh. 6: 1 of 4 in all. 8: 1 of 4 in vi and in zh, so nobody's.
    assert own("en") == [5, 7]
    assert own("vi") == [9]
    assert own("zh") == [10]
    with pytest.raises(ValueError, match="vi: no token is more frequent in its documents than in all others together"):
        words.of_language({"en": [[0, 5]], "vi": [[0, 5]]}, "vi")


@torch.no_grad()
def test_the_share_is_that_of_the_own_words(llama: Decoder) -> None:
    gates = closed(_random(5, 3, 160), ALL, 100).unsqueeze(0)
    found = _effect(llama, gates, "zh", share=True).share
    assert found is not None
    words, batch = Words.of(llama, TEXTS), Batch.of(TEXTS["zh"], torch.device("cpu"))
    own = torch.tensor(sorted({token for ids in TEXTS["zh"] for token in ids[1:]}))  # no other language has any of them

    def shares() -> Tensor:
        probabilities = words.log_probabilities(predicting(llama, batch)).double().exp()  # [n, words]
        return probabilities[:, words.place[own]].sum(dim=1).log()

    before = shares()
    with masked(llama, NeuronMask(gates[0], llama.sizes)):
        lost = (before - shares()).mean()
    assert float(found) == pytest.approx(float(lost), rel=1e-4)
    assert _effect(llama, gates, "zh").share is None


def test_learning_takes_the_language_away(llama: Decoder) -> None:
    seen: list[Step] = []
    options = Learning(neurons=40, steps=25, documents=3, target=Target.LANGUAGE, hold=0.3)
    scores = learn_scores(llama, TEXTS, options, report=seen.append)["vi"]

    def gap(gates: Tensor) -> float:
        lost = _effect(llama, gates.unsqueeze(0), "vi", share=True).share
        assert lost is not None
        return float(lost)

    with torch.no_grad():
        chance = [gap(closed(torch.rand(3, 160), ALL, 40)) for _ in range(20)]
        assert gap(closed(scores, ALL, 40)) > max(chance)
    of_loss = learn_scores(llama, TEXTS, Learning(neurons=40, steps=25, documents=3, hold=0.3))["vi"]
    assert not torch.equal(scores, of_loss)
    first = next(step for step in seen if step.target == "vi" and step.neurons == 40)
    assert set(first.losses) == set(TEXTS)


def test_searches_for_values_find_other_neurons(llama: Decoder) -> None:
    values = 2 * _random(6, 3, 160)
    options = Learning(neurons=24, steps=20, documents=3)
    for_zero = learn_scores(llama, TEXTS, options)["zh"]
    for_values = learn_scores(llama, TEXTS, options, values=values)["zh"]
    assert torch.equal(for_zero, learn_scores(llama, TEXTS, options, values=torch.zeros(3, 160))["zh"])

    @torch.no_grad()
    def gap(scores: Tensor) -> float:
        gates = closed(scores, ALL, 24).unsqueeze(0)
        losses = {name: float(_effect(llama, gates, name, values).loss) for name in TEXTS}
        return losses["zh"] - max(losses["en"], losses["vi"])

    assert gap(for_values) > gap(for_zero)
    proposed = dict.fromkeys(TEXTS, torch.cartesian_prod(torch.arange(3), torch.arange(160)))
    refinement = Refinement(candidates=16, group=4, documents=2)
    plain, _ = refine_scores(llama, TEXTS, proposed, refinement)
    replaced, _ = refine_scores(llama, TEXTS, proposed, refinement, values=values)
    assert any(not torch.equal(plain[name], replaced[name]) for name in TEXTS)


def test_runs_are_averaged_and_compared() -> None:
    exists = torch.tensor([[True, True, True], [True, True, False]])
    first = torch.tensor([[4.0, 2.0, 0.0], [-1.0, 2.0, 0.0]])  # root mean square of five: sqrt(5)
    second = 10 * torch.tensor([[2.0, 4.0, -1.0], [0.0, -2.0, 0.0]])
    found = agreed([{"en": first}, {"en": second}], exists, 2)
    mean = (first + second / 10) / 2 / math.sqrt(5)
    assert torch.allclose(found.scores["en"], mean)
    assert found.spread is not None
    assert torch.allclose(found.spread["en"], (first - second / 10).abs() / math.sqrt(2) / math.sqrt(5))
    # The first chooses (0, 0) and, in a tie, (0, 1); the second (0, 1) and (0, 0).
    assert found.jaccard == {"en": 1.0}
    # Ranks 5, 3.5, 2, 1, 3.5 against 4, 5, 2, 3, 1.
    one, other = torch.tensor([5, 3.5, 2, 1, 3.5]), torch.tensor([4.0, 5, 2, 3, 1])
    assert found.rank_correlation["en"] == pytest.approx(float(torch.corrcoef(torch.stack([one, other]))[0, 1]))
    alone = agreed([{"en": first}], exists, 2)
    assert alone.scores["en"] is first
    assert (alone.spread, alone.jaccard) == (None, {})
    assert agreed([{"en": first}, {"en": 0 * first}], exists, 2).rank_correlation == {"en": 0.0}


def test_agreement_of_three_is_the_mean_over_pairs() -> None:
    exists = torch.ones(1, 4, dtype=torch.bool)
    runs = [{"en": torch.tensor([row])} for row in ([9.0, 8, 0, 1], [9.0, 0, 8, 1], [9.0, 8, 1, 0])]
    assert agreed(runs, exists, 2).jaccard["en"] == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)


def test_files_keep_searches_and_spreads(tmp_path: Path) -> None:
    made = random_scores()
    values = made.of("attnlrp")
    search = Search(intervention="mean", target="language", neurons=3, seeds=(4, 5), jaccard={"en": 0.5})
    first = made.replaced("learned", values.clone(), search, values.abs())
    first.save(tmp_path / "scores.safetensors")
    read = Scores.load(tmp_path / "scores.safetensors")
    assert read.info.searches == {"learned": search}
    assert torch.equal(read.spreads["learned"], values.abs())
    assert set(read.by_method) == {*made.by_method, "learned"}
    again = read.replaced("learned", 2 * values, Search())
    assert (again.info.searches["learned"].intervention, dict(again.spreads)) == ("zero", {})
    assert torch.equal(again.outputs_of("crane"), made.outputs_of("crane"))
    with pytest.raises(ScoresError, match="there are spreads of plnd, but none of its neurons"):
        Scores(made.by_method, made.info, spreads={"plnd": values})
    merged = Scores({"random": made.of("random")}, made.info).merged(
        Scores({"learned": values}, read.info, spreads=read.spreads)
    )
    assert merged.info.searches == {"learned": search}
    assert torch.equal(merged.spreads["learned"], values.abs())


def test_a_scores_file_without_searches_is_as_before(tmp_path: Path) -> None:
    """The digest of what older versions wrote: of the tensors by method, and of the means and outputs."""
    random_scores().save(tmp_path / "scores.safetensors")
    with safe_open(tmp_path / "scores.safetensors", framework="pt") as file:
        digest = json.loads(file.metadata()["crane-scores"])["digest"]
    assert digest == DIGEST


DIGEST = "c69ec8d470faf8f6f00b7557a68fa121f42b2ff5af7cf4e9b976644e4c515d15"


def test_masks_are_of_the_intervention_of_their_scores() -> None:
    made = random_scores()
    means = _random(7, *made.shape.tensor).where(made.shape.exists, 0)
    scores = Scores({**made.by_method, "learned": made.of("attnlrp")}, made.info, means=means)
    scores = scores.replaced("learned", made.of("attnlrp"), Search(intervention="mean"))
    selection = select(scores, SelectionOptions("learned", count=5))
    explicit = select(scores, SelectionOptions("attnlrp", count=5, contrast="none", intervention="mean"))
    for language, mask in selection.masks.items():
        assert mask.digest == explicit.masks[language].digest
        assert mask.offset is not None
        assert torch.equal(mask.offset, torch.where(mask.intermediate == 0, means.mean(dim=0), 0))
    assert selection.options.intervention == "mean"
    control = select(scores, SelectionOptions("random", count=5, quotas="like:learned"))
    assert all(mask.offset is not None for mask in control.masks.values())
    assert select(scores, SelectionOptions("attnlrp", count=5)).masks["en"].offset is None
    assert select(scores, SelectionOptions("learned", count=5, intervention="add:zh-en")).masks["en"].offset is not None
    with pytest.raises(SelectionError, match="scores of learned were made for the intervention mean, not for mean:en"):
        select(scores, SelectionOptions("learned", count=5, intervention="mean:en"))
    zero = scores.replaced("learned", made.of("attnlrp"), Search())
    with pytest.raises(SelectionError, match="made for the intervention zero, not for mean"):
        select(zero, SelectionOptions("learned", count=5, intervention="mean"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return scored_tiny(tmp_path_factory.mktemp("search-options"), "magnitude,random")


def test_learn_for_mean_ablation_with_seeds(files: dict[str, Path]) -> None:
    model, scores, common = files["model"], files["scores"], ("--corpus", files["corpus"], "--dtype", "float32")
    before = Scores.load(scores)
    learning = ("--steps", 3, "--documents", 2, "--budget", 0.05, "--intervention", "mean", "--seed", 7)
    said = run_crane("learn", model, scores, *common, *learning, "--seeds", 2, "--target", "language")
    assert "learn: done, 18 of 18 steps" in said
    assert "vi: 2 seeds share" in said
    held = Scores.load(scores)
    search = held.info.searches["learned"]
    assert (search.intervention, search.target, search.seeds, search.neurons) == ("mean", "language", (7, 8), 24)
    assert set(search.jaccard) == set(search.rank_correlation) == {"en", "vi", "zh"}
    assert bool((held.spreads["learned"] > 0).any())
    assert before.means is not None
    assert held.means is not None
    assert torch.equal(held.means, before.means)
    assert order(held, "learned")["en"].shape == (480, 2)
    for intervention in ("add:en-vi", "mean:fr"):
        assert "intervention" in run_crane(
            "learn", model, scores, "--intervention", intervention, "--replace", fails=True
        )

    out = files["directory"] / "masks"
    run_crane("select", scores, "--method", "learned", "--budget", 0.05, "--out", out)
    written = decode_mask("learned-vi", (out / "learned-vi.safetensors").read_bytes(), source="")
    assert written.info.parameters["intervention"] == "mean"
    assert written.mask.offset is not None
    said = run_crane("select", scores, "--method", "learned", "--intervention", "zero", "--out", out, fails=True)
    assert "scores of learned were made for the intervention mean, not for zero" in said

    plan = ("--budgets", 0.05, "--seeds", 1, "--like", "learned", "--limit", 2, "--effect", 0, "--no-published")
    run_crane("validate", model, scores, *common, *plan, "--out", files["directory"] / "own")
    own = Validation.load(files["directory"] / "own")
    used = {(effect.method, effect.rule): effect.intervention for effect in own.effects}
    assert used["learned", "budget"] == used["random", "like:learned"] == "mean"
    assert used["magnitude", "budget"] == used["random", "budget"] == "zero"
    digests = {effect.digest for effect in own.effects if effect.method == "learned"}
    assert written.mask.digest in digests
    assert "mean of learned" in (files["directory"] / "own" / "report.md").read_text()
    run_crane("validate", model, scores, *common, *plan, "--intervention", "mean", "--out", files["directory"] / "mean")
    assert {effect.intervention for effect in Validation.load(files["directory"] / "mean").effects} == {"mean"}
    refused = run_crane(
        "validate",
        model,
        scores,
        *common,
        *plan,
        "--intervention",
        "zero",
        "--out",
        files["directory"] / "none",
        fails=True,
    )
    assert "made for the intervention mean, not for zero" in refused
    run_crane("refine", model, scores, *common, "--from", "magnitude", "--candidates", 8, "--intervention", "mean:vi")
    assert Scores.load(scores).info.searches["ablation-refined"].intervention == "mean:vi"
