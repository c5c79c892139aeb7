"""Validation against hand-made effects, and the commands refine, learn and validate on a tiny model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from crane_serve.common.masks import NeuronMask
from crane_serve.common.numbers.langspec import Form, langspec_f1
from relevance.causal import Losses
from relevance.scores import Scores
from relevance.validation.overlap import jaccard, neurons_per_layer, overlaps, stability
from relevance.validation.result import MATCHED, Validation, ValidationError, ValidationPlan
from relevance.validation.validator import Validator, collateral, fewest
from tests.scores import LANGUAGES, scores_info
from tests.searching import run_crane, scored_tiny
from tests.tiny import tiny_model


@pytest.mark.parametrize("needed", [1, 2, 3, 8, 9, 100, 137, 1000])
def test_the_fewest_that_are_enough(needed: int) -> None:
    asked: list[int] = []

    def enough(count: int) -> bool:
        asked.append(count)
        return count >= needed

    found = fewest(enough, 1000)
    assert found is not None
    assert needed <= found <= max(needed, needed * 1.07)
    assert len(asked) <= 14
    assert all(1 <= count <= 1000 for count in asked)


def test_nothing_is_enough() -> None:
    assert fewest(lambda count: False, 100) is None


def test_collateral_by_hand() -> None:
    changes = {"en": np.array([4.0, 8.0]), "zh": np.array([1.0, 1.0]), "vi": np.array([-1.0, 2.0])}
    tokens = {"en": np.array([2.0, 4.0]), "zh": np.array([4.0, 4.0]), "vi": np.array([2.0, 2.0])}
    found = collateral(changes, tokens, "en")
    # en loses 2 per token in both documents, zh 1/4 in both, vi -1/2 and 1.
    assert found is not None
    assert found.mean == pytest.approx((0.25 + 0.25) / 2 / 2)
    assert found.low == pytest.approx((0.25 - 0.5) / 2 / 2)
    assert found.high == pytest.approx((0.25 + 1.0) / 2 / 2)
    assert collateral(changes, tokens, "vi") is not None
    assert collateral({**changes, "vi": np.array([-1.0, 0.5])}, tokens, "vi") is None


def test_collateral_resamples_parallel_documents_together() -> None:
    lost, tokens = np.array([4.0, 1.0, 9.0, 2.0]), np.full(4, 2.0)
    found = collateral({"en": lost, "zh": lost / 2, "vi": lost / 4}, dict.fromkeys(("en", "zh", "vi"), tokens), "en")
    assert found is not None
    assert (found.mean, found.low, found.high) == tuple(pytest.approx(x) for x in [0.375] * 3)


def test_collateral_of_one_document_has_no_interval() -> None:
    found = collateral({"en": np.array([4.0]), "zh": np.array([1.0])}, {"en": np.ones(1), "zh": np.ones(1)}, "en")
    assert found is not None
    assert (found.mean, found.low, found.high) == (0.25, None, None)


def test_collateral_has_no_interval_where_a_resample_has_no_effect() -> None:
    changes = {"en": np.array([4.0, -1.0]), "zh": np.array([1.0, 1.0])}
    tokens = {"en": np.ones(2), "zh": np.ones(2)}
    found = collateral(changes, tokens, "en")
    assert found is not None
    assert (found.mean, found.low, found.high) == (pytest.approx(2 / 3), None, None)


def test_langspec_by_hand() -> None:
    baseline, masked = {"en": 0.5, "zh": 0.4, "vi": 0.2}, {"en": 0.25, "zh": 0.36, "vi": 0.3}
    # Relative drops: en 0.5, zh 0.1, vi clipped to 0. P = 0.5 / 0.55, R = 0.5.
    precision = 0.5 / 0.55
    assert langspec_f1(baseline, masked, "en", Form.RELATIVE) == pytest.approx(2 * precision * 0.5 / (precision + 0.5))
    # Absolute drops: en 0.25, zh 0.04. P = 0.25 / 0.27, R = 0.25 / 0.5.
    precision = 0.25 / 0.27
    assert langspec_f1(baseline, masked, "en", Form.ABSOLUTE) == pytest.approx(2 * precision * 0.5 / (precision + 0.5))
    expected = (1 + 4) * precision * 0.5 / (precision + 4 * 0.5)
    assert langspec_f1(baseline, masked, "en", Form.ABSOLUTE, beta=2) == pytest.approx(expected)
    assert langspec_f1(baseline, masked, "vi", Form.RELATIVE) == 0


@pytest.mark.parametrize(
    ("baseline", "target", "message"),
    [
        ({"en": 0.5}, "en", "other languages"),
        ({"en": 0.5, "zh": 0.5}, "vi", "'vi'"),
        ({"en": 0.5, "zh": 0.0}, "en", "baseline score of zh is 0.0"),
    ],
)
def test_langspec_refuses(baseline: Mapping[str, float], target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        langspec_f1(baseline, baseline, target, Form.RELATIVE)


def test_jaccard_by_hand() -> None:
    first, second = torch.tensor([True, True, False]), torch.tensor([False, True, True])
    assert jaccard(first, second) == pytest.approx(1 / 3)
    assert jaccard(first & second & False, first & False) == 1


class _Additive:
    """Stands in for Ablations: every neuron that is off costs each language its own number of nats per token."""

    def __init__(self, costs: Mapping[str, torch.Tensor], parts: Sequence[str] = ("validation", "test")) -> None:
        self.costs = costs
        self.texts = {part: dict.fromkeys(costs) for part in parts}
        self.asked: list[tuple[str, str]] = []

    def losses(self, mask: NeuronMask | None, part: str, language: str) -> Losses:
        self.asked.append((part, language))
        off = torch.zeros_like(self.costs[language]) if mask is None else 1 - mask.intermediate
        cost = float((self.costs[language] * off).sum())
        tokens = np.array([10.0, 20.0])
        return Losses(tokens * (3.0 + cost), tokens)

    def loss(self, mask: NeuronMask, part: str, language: str) -> float:
        return self.losses(mask, part, language).per_token - self.losses(None, part, language).per_token


def _costs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {language: torch.rand(2, 50, generator=generator) / 10 for language in LANGUAGES}


def _scores(costs: Mapping[str, torch.Tensor]) -> Scores:
    """Scores that know the costs, under the name of a method without a contrast; and random ones."""
    known = torch.stack([costs[language] - sum(costs.values()) / len(costs) for language in LANGUAGES])
    return Scores({"learned": known, "random": torch.zeros(3, 2, 50)}, scores_info(sizes=(50, 50)))


PLAN = ValidationPlan(methods=("learned", "random"), budgets=(0.05, 0.2), seeds=(0, 1), matched_to="learned")


def test_effects_are_those_of_the_masks() -> None:
    costs = _costs()
    effects = list(Validator(_Additive(costs), _scores(costs), PLAN).effects())
    # learned: 2 budgets x 3 languages; random: the same for 2 seeds, uniform and matched.
    assert len(effects) == 6 + 12 + 12
    known = [effect for effect in effects if effect.method == "learned"]
    for effect in known:
        specific = (costs[effect.language] - sum(costs.values()) / 3).flatten()
        chosen = specific.topk(effect.neurons).indices
        for language, change in effect.changes.items():
            assert change.mean == pytest.approx(float(costs[language].flatten()[chosen].sum()), rel=1e-4)
    assert [effect.neurons for effect in known] == [5, 5, 5, 20, 20, 20]
    assert {effect.rule for effect in effects} == {"budget", "like:learned"}
    like = [effect for effect in effects if effect.rule == "like:learned"]
    assert {effect.seed for effect in like} == {0, 1}
    assert all(effect.seed is None for effect in known)
    assert len({effect.digest for effect in effects if effect.rule == "budget"}) == 18
    assert sum(effect.own.mean for effect in known) > sum(effect.own.mean for effect in like) / 2


def test_choices_never_see_the_report() -> None:
    costs = _costs()
    ablations = _Additive(costs)
    validator = Validator(ablations, _scores(costs), PLAN)
    validator._count_for(1.0, "learned", validator._orders("learned", 0)["vi"], "vi")
    assert {part for part, _ in ablations.asked} == {"validation"}
    assert {language for _, language in ablations.asked} == {"vi"}


def test_matched_effects() -> None:
    costs = _costs()
    scores = _scores(costs)
    found, unreached = Validator(_Additive(costs), scores, PLAN).matched()
    assert not unreached
    assert len(found) == 3 + 6
    for effect in found:
        assert effect.rule == MATCHED
        assert effect.collateral is not None
        assert 1.0 <= effect.own.mean < 1.3  # a neuron costs up to 0.1, the search stops within 7 %
        assert effect.collateral.mean == pytest.approx(effect.others / effect.own.mean)
    best = [effect.others for effect in found if effect.method == "learned"]
    assert max(best) < min(effect.others for effect in found if effect.method == "random")


def test_an_effect_out_of_reach_is_said_to_be() -> None:
    costs = {language: of / 100 for language, of in _costs().items()}
    found, unreached = Validator(_Additive(costs), _scores(costs), PLAN.model_copy(update={"seeds": (0,)})).matched()
    assert not found
    assert sorted(unreached) == sorted((method, language) for method in PLAN.methods for language in LANGUAGES)


@pytest.mark.parametrize(
    ("update", "error"),
    [
        ({"methods": ("nope",)}, "no scores of method 'nope'"),
        ({"budgets": (0.0,)}, "budget is 0.0"),
        ({"budgets": (1.5,)}, "budget is 1.5"),
        ({"effect": -1.0}, "effect to match is -1.0"),
    ],
)
def test_impossible_plans(update: dict[str, object], error: str) -> None:
    costs = _costs()
    with pytest.raises(ValueError, match=error):
        Validator(_Additive(costs), _scores(costs), PLAN.model_copy(update=update))


def test_texts_must_have_every_language() -> None:
    costs = _costs()
    ablations = _Additive({language: costs[language] for language in ("en", "zh")})
    with pytest.raises(ValidationError, match="texts of validation lack vi"):
        Validator(ablations, _scores(costs), PLAN)


def test_overlaps_layers_and_stability() -> None:
    first = torch.zeros(3, 2, 50)
    second = torch.zeros(3, 2, 50)
    first[:, 0, :4] = 1
    second[:, 0, 2:6] = 1
    scores = Scores({"learned": first, "ablation-refined": second}, scores_info(sizes=(50, 50)))
    found = overlaps(scores, ["learned", "ablation-refined"], 0.04)
    assert len(found) == 15
    across = [overlap.jaccard for overlap in found if overlap.first[0] != overlap.second[0]]
    assert across == pytest.approx([2 / 6] * 9)
    within = [overlap.jaccard for overlap in found if overlap.first[0] == overlap.second[0]]
    assert within == [1.0] * 6
    assert neurons_per_layer(scores, ["learned"], 0.04) == {"learned": {key: [4, 0] for key in LANGUAGES}}
    other = Scores({"learned": second}, scores_info(sizes=(50, 50)))
    assert stability((scores, other), 0.04) == {"learned": dict.fromkeys(LANGUAGES, pytest.approx(2 / 6))}
    assert stability((), 0.04) == {}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return scored_tiny(tmp_path_factory.mktemp("validation"), "magnitude,lape,random")


def test_refine_learn_and_validate(files: dict[str, Path]) -> None:
    model, scores, corpus = files["model"], files["scores"], files["corpus"]
    common = ("--corpus", corpus, "--dtype", "float32")
    said = run_crane("refine", model, scores, *common, "--from", "magnitude", "--candidates", 16, "--group", 4)
    assert "ablation-refined for vi keeps" in said
    said = run_crane("learn", model, scores, *common, "--steps", 4, "--documents", 2, "--budget", 0.05)
    assert "learn: 12 steps for en, vi, zh" in said
    assert "learn: done, 12 of 12 steps" in said
    held = Scores.load(scores)
    assert set(held.by_method) == {"magnitude", "lape", "random", "ablation-refined", "learned"}
    assert bool((held.of("learned") != 0).any())
    assert "holds scores of learned already" in run_crane("learn", model, scores, *common, "--steps", 1, fails=True)
    run_crane("learn", model, scores, *common, "--steps", 4, "--documents", 2, "--budget", 0.05, "--replace")
    assert torch.equal(Scores.load(scores).of("learned"), held.of("learned"))

    out = files["directory"] / "out"
    plan = ("--budgets", "0.05,0.2", "--seeds", 2, "--like", "learned", "--limit", 3, "--effect", 0.05, "--out", out)
    said = run_crane("validate", model, scores, *common, *plan)
    masks = 3 * (5 + 1) * (2 + 1) + 3 * 2 * 2 + 3 * 5  # by budget and at matched effect, controls, published rules
    assert f"validate: {masks} masks of" in said
    assert f"validate: done, {masks} of {masks} masks" in said
    result = Validation.load(out)
    assert result.texts["test"].documents == dict.fromkeys(("en", "vi", "zh"), 3)
    assert {effect.method for effect in result.effects} == set(held.by_method)
    assert {"budget", "published", "like:learned"} <= {effect.rule for effect in result.effects}
    assert (out / "report.md").is_file()
    journal = out / "ablations.jsonl"
    lines = journal.read_text()
    (out / "validation.json").unlink()
    run_crane("validate", model, scores, *common, *plan)
    assert Validation.load(out).effects == result.effects
    assert journal.read_text() == lines


def test_searches_keep_to_the_texts_of_the_scores(files: dict[str, Path]) -> None:
    said = run_crane(
        "learn",
        files["model"],
        files["scores"],
        "--corpus",
        files["corpus"],
        "--split",
        "test",
        "--replace",
        fails=True,
    )
    assert "is not the corpus that the scores come from" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--report-split", "relevance"), "split 'relevance'"),
        (("--report-split", "validation"), "split 'validation'"),
        (("--budgets", "a"), "'a' is not a list of numbers"),
        (("--budgets", "0"), "budget is 0.0"),
        (("--methods", "gradient"), "no scores of method 'gradient'"),
        (("--halves", "one"), "names 1 files; expected two"),
    ],
)
def test_what_validate_refuses(files: dict[str, Path], options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    arguments = (files["model"], files["scores"], "--corpus", files["corpus"], "--out", tmp_path, *options)
    assert message in run_crane("validate", *arguments, fails=True)


def test_a_limit_does_not_hide_that_a_split_is_used_twice(files: dict[str, Path], tmp_path: Path) -> None:
    scores = tmp_path / "few.safetensors"
    run_crane(
        "relevance", files["model"], "--corpus", files["corpus"], "--limit", 2, "--methods", "lape", "--out", scores
    )
    arguments = (files["model"], scores, "--corpus", files["corpus"], "--out", tmp_path, "--report-split", "relevance")
    assert "split 'relevance'" in run_crane("validate", *arguments, fails=True)


def test_scores_of_another_model_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_model("llama", tmp_path / "other", seed=7)
    said = run_crane("validate", other, files["scores"], "--corpus", files["corpus"], fails=True)
    assert "was made for another model" in said
