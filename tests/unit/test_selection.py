"""Selections, against rankings worked out by hand and against naive definitions."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from crane_serve.cli import app
from crane_serve.common.masks import MaskFileError, read_mask
from relevance.contrast import CONTRASTS, ContrastError
from relevance.method import MethodError
from relevance.methods.random import draw
from relevance.scores import Scores, ScoresError
from relevance.selection import Selection, best_first, evenly, exclusive, order, outstanding, select
from relevance.selection_options import Overlap, Rule, SelectionError, SelectionOptions, neurons_of_budget
from tests.scores import given_scores, random_scores

LANGUAGES = ["en", "vi", "zh"]
NEURONS = 80


def chosen(scores: Scores, method: str, **options: Any) -> Selection:
    return select(scores, SelectionOptions(method, **options))


def off(scores: Scores, method: str, language: str, budget: float = 0.1, **options: Any) -> Tensor:
    return chosen(scores, method, budget=budget, **options).masks[language].intermediate == 0


def places_off(selection: Selection) -> dict[str, list[list[int]]]:
    return {language: (mask.intermediate == 0).nonzero().tolist() for language, mask in selection.masks.items()}


# --- budgets


def test_best_first_breaks_ties_towards_the_first_and_skips_padding() -> None:
    ranking = torch.tensor([[1.0, 1.0, 9.0], [1.0, 2.0, 1.0]])
    eligible = torch.tensor([[True, True, False], [True, True, True]])
    assert best_first(ranking, eligible).tolist() == [[1, 1], [0, 0], [0, 1], [1, 0], [1, 2]]


def test_the_budget_is_a_fraction_of_all_neurons() -> None:
    scores = random_scores()
    for budget, neurons in [(0.1, 8), (1.0, 80), (0.001, 1)]:
        assert {mask.neurons for mask in chosen(scores, "lape", budget=budget).masks.values()} == {neurons}


def test_a_count_is_a_number_of_neurons() -> None:
    scores = random_scores()
    for count in (1, 7, 80):
        assert {mask.neurons for mask in chosen(scores, "lape", count=count).masks.values()} == {count}
    with pytest.raises(SelectionError, match="count is 81; the model has 80 neurons"):
        chosen(scores, "lape", count=81)
    with pytest.raises(SelectionError, match="count is 0; expected at least 1"):
        SelectionOptions("lape", count=0)


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_an_impossible_budget(budget: float) -> None:
    with pytest.raises(SelectionError, match=f"budget is {budget}; expected a fraction"):
        neurons_of_budget(budget, 100)


@pytest.mark.parametrize("contrast", [None, *CONTRASTS])
def test_the_highest_contrast_is_selected(contrast: str | None) -> None:
    scores = random_scores()
    contrasted = CONTRASTS[contrast or "margin"](scores.of("attnlrp").double())
    contrasted[:, 1, 30:] = -math.inf
    taken = off(scores, "attnlrp", "vi", contrast=contrast)
    assert int(taken.sum()) == 8
    assert contrasted[1][taken].min() > contrasted[1][~taken].max()


def test_padding_is_never_taken_though_it_would_rank_first() -> None:
    scores = random_scores()
    for value in scores.by_method.values():
        value.clamp_(max=-0.5)
        value[:, 1, 30:] = 0
    assert not bool(off(scores, "attnlrp", "en", 0.5, contrast="none")[1, 30:].any())
    assert not bool(off(scores, "attnlrp", "en", rule=Rule.Z, z=0.1, contrast="none")[1, 30:].any())


# --- order


@pytest.mark.parametrize("overlap", list(Overlap))
@pytest.mark.parametrize("quotas", ["global", "uniform"])
@pytest.mark.parametrize("method", ["attnlrp", "lape", "random"])
def test_selections_of_growing_budgets_are_the_beginnings_of_one_order(
    method: str, quotas: str, overlap: Overlap
) -> None:
    scores = random_scores()
    ordered = order(scores, method, seed=2, quotas=quotas, overlap=overlap)
    for count in (1, 3, 10, 15):
        selection = chosen(scores, method, count=count, seed=2, quotas=quotas, overlap=overlap)
        for language, places in places_off(selection).items():
            assert places == sorted(ordered[language][:count].tolist())


def test_the_order_holds_every_neuron_once() -> None:
    for places in order(random_scores(), "attnlrp", "minus-max").values():
        assert places.dtype == torch.int64
        assert sorted(places.tolist()) == [[0, index] for index in range(50)] + [[1, index] for index in range(30)]


def test_the_order_follows_the_contrast_asked_for() -> None:
    scores = given_scores({"attnlrp": [[[5.0, 1.0, 0.0]], [[4.9, 0.0, 0.1]]]})
    assert order(scores, "attnlrp", "none")["en"][:, 1].tolist() == [0, 1, 2]
    assert order(scores, "attnlrp", "minus-max")["en"][:, 1].tolist() == [1, 0, 2]
    assert order(scores, "attnlrp", "share")["vi"][:, 1].tolist() == [2, 0, 1]


def test_matched_neurons_have_no_order() -> None:
    with pytest.raises(SelectionError, match="matched neurons have no order"):
        order(random_scores(), "random", quotas="like:lape")


# --- quotas


def test_uniform_quotas_by_hand() -> None:
    ranking = [[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 0.5, 0.1], [5.0, 3.0, 2.5, 0.2]]
    scores = given_scores({"crane": [ranking, ranking]})
    selection = {count: chosen(scores, "crane", count=count, quotas="uniform").masks["en"] for count in (3, 4, 5, 12)}
    assert selection[3].neuron_sets() == [[0], [1], [0]]
    assert selection[4].neuron_sets() == [[0, 1], [1], [0]]  # 8 is the best of the second round: 8, 1, 3
    assert selection[5].neuron_sets() == [[0, 1], [1], [0, 1]]  # then 3
    assert selection[12].neurons == 12


def test_uniform_quotas_go_on_when_a_small_layer_is_used_up() -> None:
    mask = chosen(random_scores(), "attnlrp", count=70, quotas="uniform").masks["en"]
    assert mask.neurons_per_layer() == [40, 30]


def test_evenly_against_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.stack((torch.randint(0, 5, (60,), generator=generator), torch.arange(60)), dim=1)
    seen = dict.fromkeys(range(5), 0)
    rounds = []
    for layer, index in places.tolist():
        rounds.append((seen[layer], len(rounds), [layer, index]))
        seen[layer] += 1
    assert evenly(places).tolist() == [place for _, _, place in sorted(rounds)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_random_is_matched_to_attnlrp_layer_by_layer_and_disjoint(language: str) -> None:
    scores = random_scores()
    control, model = off(scores, "random", language, 0.2), off(scores, "attnlrp", language, 0.2)
    assert control.sum(dim=1).tolist() == model.sum(dim=1).tolist()
    assert not bool((control & model).any())


@pytest.mark.parametrize("rule", [{"rule": Rule.Z, "z": 0.7}, {"rule": Rule.PUBLISHED}])
@pytest.mark.parametrize("output_dimensions", [False, True])
def test_a_control_is_matched_under_every_rule(rule: dict[str, Any], output_dimensions: bool) -> None:
    scores = random_scores()
    model = chosen(scores, "crane", output_dimensions=output_dimensions, **rule)
    control = chosen(scores, "random", quotas="like:crane", output_dimensions=output_dimensions, **rule)
    for language in LANGUAGES:
        of_model, of_control = model.masks[language], control.masks[language]
        assert of_control.neurons_per_layer() == of_model.neurons_per_layer()
        assert not bool(((of_control.intermediate == 0) & (of_model.intermediate == 0)).any())
        if output_dimensions:
            assert of_control.output is not None
            assert of_model.output is not None
            assert (of_control.output == 0).sum(1).tolist() == (of_model.output == 0).sum(1).tolist()
            assert not bool(((of_control.output == 0) & (of_model.output == 0)).any())


def test_the_contrast_of_a_control_is_that_of_its_model() -> None:
    scores = random_scores()
    model = chosen(scores, "attnlrp", budget=0.2, contrast="share")
    control = chosen(scores, "random", budget=0.2, contrast="share")
    for language in LANGUAGES:
        assert control.masks[language].neurons_per_layer() == model.masks[language].neurons_per_layer()


def test_random_is_seeded() -> None:
    scores = random_scores()
    first = off(scores, "random", "en", 0.2, seed=3)
    assert torch.equal(first, off(scores, "random", "en", 0.2, seed=3))
    assert not torch.equal(first, off(scores, "random", "en", 0.2, seed=4))


def test_random_without_a_match_is_the_draw_of_its_seed() -> None:
    scores = random_scores()
    drawn = draw(scores.shape, 0)
    taken = off(scores, "random", "zh", quotas="global")
    assert drawn[2][taken].min() > drawn[2][~taken].max()


def test_a_match_can_be_chosen() -> None:
    scores = random_scores()
    lape = off(scores, "lape", "en")
    assert off(scores, "random", "en", quotas="like:lape").sum(1).tolist() == lape.sum(1).tolist()
    assert off(scores, "attnlrp", "en", quotas="like:lape").sum(1).tolist() == lape.sum(1).tolist()
    with pytest.raises(SelectionError, match="lape cannot be matched to itself"):
        SelectionOptions("lape", quotas="like:lape")


def test_too_few_neurons_are_left_for_a_control() -> None:
    with pytest.raises(
        SelectionError, match=r"layer 0 has 50 neurons to choose from, and the matched method takes \d+"
    ):
        chosen(random_scores(), "random", budget=0.8)


@pytest.mark.parametrize("quotas", ["even", "like", "like:", "", "lape"])
def test_unknown_quotas(quotas: str) -> None:
    with pytest.raises(SelectionError, match=f"quotas are '{quotas}'; expected global, uniform or like:METHOD"):
        SelectionOptions("lape", quotas=quotas)


# --- rules


@pytest.mark.parametrize("z", [-0.5, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("method", ["attnlrp", "crane"])
def test_the_z_rule_against_its_definition(method: str, z: float) -> None:
    scores = random_scores()
    contrasted = CONTRASTS["margin" if method == "attnlrp" else "none"](scores.of(method).double())
    masks = chosen(scores, method, rule=Rule.Z, z=z).masks
    for language, of_language in zip(LANGUAGES, contrasted, strict=True):
        values = torch.cat((of_language[0], of_language[1, :30]))
        deviation = (values - values.mean()).square().mean().sqrt()
        expected = (values - values.mean()) / deviation > z
        taken = masks[language].intermediate == 0
        assert torch.cat((taken[0], taken[1, :30])).tolist() == expected.tolist()
        assert not bool(taken[1, 30:].any())


def test_the_z_rule_by_hand() -> None:
    values = [[4.0, 0.0, 0.0, 0.0, 1.0]]  # mean 1, variance 2.4
    scores = given_scores({"crane": [values, [[0.0, 0.0, 1.0, 4.0, 0.0]]]})
    z = 3.0 / math.sqrt(2.4)
    assert chosen(scores, "crane", rule=Rule.Z, z=z - 1e-6, contrast="none").masks["en"].neuron_sets() == [[0]]
    with pytest.raises(SelectionError, match=r"the rule z > 1.93.* of crane takes no neuron for en"):
        chosen(scores, "crane", rule=Rule.Z, z=z + 1e-6, contrast="none")


@pytest.mark.parametrize("value", [0.0, 0.1, 1e8])
def test_where_all_scores_are_equal_none_stands_out(value: float) -> None:
    constant = torch.full((1, 3, 7), value, dtype=torch.float64)
    for z in (-1.0, 0.0, 1.0):
        assert not bool(outstanding(constant, torch.ones(3, 7, dtype=torch.bool), z).any())


def test_the_published_rule_is_the_methods_own() -> None:
    scores = random_scores()
    masks = chosen(scores, "crane", rule=Rule.PUBLISHED).masks
    for language, of_language in zip(LANGUAGES, scores.of("crane"), strict=True):
        assert torch.equal(masks[language].intermediate == 0, of_language > 1)


def test_a_published_rule_that_takes_nothing() -> None:
    scores = given_scores({"crane": [[[2.0, 0.0]], [[0.0, 0.5]]]})
    with pytest.raises(SelectionError, match="the rule published of crane takes no neuron for vi"):
        chosen(scores, "crane", rule=Rule.PUBLISHED)


def test_a_method_without_a_published_rule() -> None:
    with pytest.raises(MethodError, match="attnlrp"):
        chosen(random_scores(), "attnlrp", rule=Rule.PUBLISHED)


# --- output dimensions


def test_output_dimensions_and_neurons_are_one_population() -> None:
    scores = random_scores()
    masks = chosen(scores, "crane", rule=Rule.Z, z=0.8, output_dimensions=True).masks
    for index, language in enumerate(LANGUAGES):
        neurons, outputs = scores.of("crane")[index].double(), scores.outputs_of("crane")[index].double()
        everything = torch.cat((neurons[0], neurons[1, :30], outputs.flatten()))
        threshold = everything.mean() + 0.8 * everything.std(correction=0)
        mask = masks[language]
        assert mask.output is not None
        assert torch.equal(mask.output == 0, outputs > threshold)
        assert torch.equal((mask.intermediate == 0)[0], neurons[0] > threshold)


def test_published_output_dimensions() -> None:
    scores = random_scores()
    masks = chosen(scores, "crane", rule=Rule.PUBLISHED, output_dimensions=True).masks
    for index, language in enumerate(LANGUAGES):
        mask = masks[language]
        assert mask.output is not None
        assert torch.equal(mask.output == 0, scores.outputs_of("crane")[index] > 1)
        assert torch.equal(mask.intermediate == 0, scores.of("crane")[index] > 1)


def test_output_dimensions_suffice_for_a_mask() -> None:
    scores = given_scores({"crane": [[[2.0, 0.0]], [[0.0, 0.5]]]}, {"crane": [[[0.0, 0.0]], [[3.0, 0.0]]]})
    mask = chosen(scores, "crane", rule=Rule.PUBLISHED, output_dimensions=True).masks["vi"]
    assert (mask.neurons, mask.output is not None and mask.output.tolist()) == (0, [[0.0, 1.0]])


def test_output_dimensions_that_are_not_there_or_not_counted() -> None:
    scores = random_scores()
    with pytest.raises(ScoresError, match="no scores of output dimensions of method 'attnlrp'; there are of crane"):
        chosen(scores, "attnlrp", rule=Rule.Z, output_dimensions=True)
    with pytest.raises(ScoresError, match="no scores of output dimensions of method 'random'; there are of crane"):
        chosen(scores, "random", rule=Rule.Z, quotas="global", output_dimensions=True)
    with pytest.raises(SelectionError, match="a budget counts neurons"):
        SelectionOptions("crane", output_dimensions=True)


# --- overlap


def test_shared_neurons_may_belong_to_several_languages() -> None:
    scores = given_scores({"crane": [[[3.0, 2.0, 1.0, 0.0]]] * 2})
    selection = chosen(scores, "crane", count=2)
    assert selection.masks["en"].neuron_sets() == selection.masks["vi"].neuron_sets() == [[0, 1]]


def test_exclusive_neurons_go_where_they_stand_first_by_hand() -> None:
    # Places: en 0 1 2 3, vi 0 2 1 3, zh 3 2 0 1. Neuron 2 is zh's (place 0), though vi scores it higher.
    ranking = torch.tensor([[[9.0, 8.0, 7.0, 6.0]], [[9.0, 5.0, 8.0, 4.0]], [[0.1, 0.2, 0.4, 0.3]]])
    own = exclusive(ranking, torch.ones(1, 4, dtype=torch.bool))
    expected = [[True, True, False, False], [False] * 4, [False, False, True, True]]
    assert own[:, 0].tolist() == expected


@pytest.mark.parametrize("quotas", ["global", "uniform"])
def test_exclusive_selections_are_disjoint_and_of_full_budget(quotas: str) -> None:
    scores = random_scores()
    masks = chosen(scores, "attnlrp", count=15, overlap=Overlap.EXCLUSIVE, quotas=quotas).masks
    times_taken = sum((mask.intermediate == 0).int() for mask in masks.values())
    assert [mask.neurons for mask in masks.values()] == [15, 15, 15]
    assert int(torch.as_tensor(times_taken).max()) == 1


def test_exclusive_orders_deal_out_every_neuron() -> None:
    ordered = order(random_scores(), "lape", overlap=Overlap.EXCLUSIVE)
    assert sorted(place for places in ordered.values() for place in places.tolist()) == sorted(
        [[0, index] for index in range(50)] + [[1, index] for index in range(30)]
    )


@pytest.mark.parametrize("rule", [Rule.Z, Rule.PUBLISHED])
def test_exclusive_neurons_under_the_other_rules(rule: Rule) -> None:
    scores = random_scores()
    shared = chosen(scores, "crane", rule=rule, output_dimensions=True)
    own = exclusive(scores.of("crane").double(), scores.shape.exists)
    masks = chosen(scores, "crane", rule=rule, output_dimensions=True, overlap=Overlap.EXCLUSIVE).masks
    for index, language in enumerate(LANGUAGES):
        taken = masks[language].intermediate == 0
        assert torch.equal(taken, (shared.masks[language].intermediate == 0) & own[index])
    outputs = [mask.output for mask in masks.values()]
    assert all(int(sum(output[layer, i] == 0 for output in outputs)) <= 1 for layer in range(2) for i in range(8))  # type: ignore[index, misc]


def test_a_language_that_owns_too_few() -> None:
    scores = given_scores({"crane": [[[3.0, 2.0, 1.0, 0.0]]] * 2})  # all ties: everything is en's
    with pytest.raises(SelectionError, match=r"budget 0\.5 asks for 2 neurons, but only 0 rank best for vi"):
        chosen(scores, "crane", budget=0.5, overlap=Overlap.EXCLUSIVE)


def test_an_exclusive_control_is_matched_and_exclusive() -> None:
    scores = random_scores()
    model = chosen(scores, "attnlrp", count=6, overlap=Overlap.EXCLUSIVE).masks
    control = chosen(scores, "random", count=6, overlap=Overlap.EXCLUSIVE).masks
    assert all(control[language].neurons_per_layer() == model[language].neurons_per_layer() for language in LANGUAGES)
    assert int(torch.stack([mask.intermediate == 0 for mask in control.values()]).sum(dim=0).max()) == 1


# --- what cannot be


def test_scores_that_are_not_finite() -> None:
    scores = random_scores()
    scores.of("lape")[1, 0, 2] = math.nan
    with pytest.raises(SelectionError, match="scores of lape for vi are not all finite"):
        chosen(scores, "lape")


def test_a_contrast_needs_a_second_language() -> None:
    with pytest.raises(ValueError, match="attnlrp compares languages and needs at least 2, found 1: en"):
        chosen(random_scores(("en",)), "attnlrp")
    assert chosen(random_scores(("en",)), "crane").masks["en"].neurons == 1
    with pytest.raises(ContrastError, match="contrast share compares languages and needs at least 2, found 1"):
        chosen(random_scores(("en",)), "crane", contrast="share")


def test_selection_options_that_contradict_each_other() -> None:
    with pytest.raises(SelectionError, match="uniform quotas spread a budget over the layers; the rule z has none"):
        SelectionOptions("crane", rule=Rule.Z, quotas="uniform")
    with pytest.raises(SelectionError, match="z is nan"):
        SelectionOptions("crane", rule=Rule.Z, z=math.nan)


def test_unknown_and_missing_methods() -> None:
    scores = random_scores()
    with pytest.raises(MethodError, match=r"unknown method 'magic'; methods are .*attnlrp"):
        chosen(scores, "magic")
    with pytest.raises(MethodError, match="unknown method 'magic'"):
        chosen(scores, "lape", quotas="like:magic")
    with pytest.raises(ContrastError, match="unknown contrast 'magic'"):
        chosen(scores, "random", contrast="magic", quotas="global")
    partial = Scores({"random": scores.of("random")}, scores.info)
    with pytest.raises(ScoresError, match="no scores of method 'attnlrp'; there are scores of random"):
        chosen(partial, "random")
    assert chosen(partial, "random", budget=0.1, quotas="global").masks["en"].neurons == 8


# --- mask files


def test_masks_are_written_with_their_provenance(tmp_path: Path) -> None:
    scores = random_scores()
    selection = chosen(scores, "random", budget=0.1, seed=5)
    paths = selection.write(tmp_path / "masks", scores)
    assert [path.name for path in paths] == ["random-en.safetensors", "random-vi.safetensors", "random-zh.safetensors"]
    stored = read_mask(paths[1])
    assert stored.mask.digest == selection.masks["vi"].digest
    assert (stored.info.language, stored.info.method, stored.info.budget) == ("vi", "random", 0.1)
    assert (stored.info.fingerprint, stored.info.corpus_digest) == (scores.info.fingerprint, "d")
    assert stored.info.parameters == {
        "rule": "budget",
        "contrast": "none",
        "quotas": "like:attnlrp",
        "overlap": "shared",
        "output_dimensions": False,
        "seed": 5,
        "split": "relevance",
        "languages": ["en", "vi", "zh"],
    }


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        ({"count": 20}, {"rule": "budget", "count": 20, "contrast": "none", "quotas": "global"}),
        ({"rule": Rule.Z, "z": 0.5, "contrast": "margin"}, {"rule": "z", "z": 0.5, "contrast": "margin"}),
        ({"rule": Rule.PUBLISHED, "output_dimensions": True}, {"rule": "published", "output_dimensions": True}),
        ({"quotas": "uniform", "overlap": Overlap.EXCLUSIVE}, {"quotas": "uniform", "overlap": "exclusive"}),
    ],
)
def test_masks_tell_how_they_were_chosen(tmp_path: Path, options: dict[str, Any], recorded: dict[str, Any]) -> None:
    scores = random_scores()
    for path in chosen(scores, "crane", **options).write(tmp_path, scores):
        stored = read_mask(path)
        assert recorded.items() <= stored.info.parameters.items()
        assert stored.info.budget == (0.01 if "quotas" in options else stored.mask.neurons / NEURONS)


def test_masks_name_the_texts_of_their_method(tmp_path: Path) -> None:
    scores = random_scores()
    other_texts = scores.info.model_copy(update={"corpus_digest": "e", "split": "train"})
    merged = Scores({"lape": scores.of("lape")}, scores.info).merged(Scores({"crane": scores.of("crane")}, other_texts))
    (stored, *_) = [read_mask(path).info for path in chosen(merged, "crane").write(tmp_path, merged)]
    assert (stored.corpus_digest, stored.parameters["split"]) == ("e", "train")


def test_names_of_masks(tmp_path: Path) -> None:
    scores = random_scores()
    selection = chosen(scores, "random", seed=3, quotas="global")
    names = [path.stem for path in selection.write(tmp_path, scores, "{language}_{method}{seed}-{rule}")]
    assert names == ["en_random3-budget", "vi_random3-budget", "zh_random3-budget"]
    with pytest.raises(SelectionError, match="the same for several languages"):
        selection.write(tmp_path / "no", scores, "{method}")
    with pytest.raises(SelectionError, match=r"unknown field; there are \{method\}, \{language\}"):
        selection.write(tmp_path / "no", scores, "{language}-{budget}")
    with pytest.raises(MaskFileError, match="'X-en' is not allowed"):
        selection.write(tmp_path / "no", scores, "X-{language}")
    assert not (tmp_path / "no").exists()


# --- the command


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "scores.safetensors"
    random_scores().save(path)
    return path


def test_the_command_writes_masks(file: Path, tmp_path: Path) -> None:
    result = run(
        "select", file, "--method", "crane", "--rule", "z", "--z", 0.5, "--output-dimensions", "--out", tmp_path
    )
    assert result.exit_code == 0, result.output
    masks = chosen(random_scores(), "crane", rule=Rule.Z, z=0.5, output_dimensions=True).masks
    for line, (language, mask) in zip(result.stdout.splitlines(), masks.items(), strict=True):
        assert read_mask(tmp_path / f"crane-{language}.safetensors").mask.digest == mask.digest
        assert mask.output is not None
        counts = f"{mask.neurons} neurons of 80, {int((mask.output == 0).sum())} output dimensions"
        assert line.endswith(f"crane-{language}.safetensors: {counts}")


@pytest.mark.parametrize(
    ("options", "same"),
    [
        (("--match", "none"), {"quotas": "global"}),
        (("--match", "lape"), {"quotas": "like:lape"}),
        (
            ("--quotas", "uniform", "--count", "9", "--overlap", "exclusive"),
            {"quotas": "uniform", "count": 9, "overlap": Overlap.EXCLUSIVE},
        ),
        (("--contrast", "share", "--budget", "0.2"), {"contrast": "share", "budget": 0.2}),
    ],
)
def test_options_of_the_command(file: Path, tmp_path: Path, options: tuple[str, ...], same: dict[str, Any]) -> None:
    result = run("select", file, "--method", "attnlrp", "--name", "{language}", "--out", tmp_path, *options)
    assert result.exit_code == 0, result.output
    expected = chosen(random_scores(), "attnlrp", **same).masks
    assert all(read_mask(tmp_path / f"{name}.safetensors").mask.digest == expected[name].digest for name in LANGUAGES)


@pytest.mark.parametrize(
    "options",
    [
        ("--budget", "0.1", "--count", "3"),
        ("--rule", "z", "--budget", "0.1"),
        ("--rule", "published", "--z", "2"),
        ("--z", "2"),
        ("--match", "lape", "--quotas", "global"),
    ],
)
def test_options_that_contradict_each_other(file: Path, options: tuple[str, ...]) -> None:
    result = run("select", file, "--method", "crane", *options)
    assert result.exit_code == 1
    assert "do not go together" in result.stderr
