"""Median activations, and means and medians of neurons of experts, which count the tokens that have the expert."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from crane_serve.cli import app
from crane_serve.common.masks import Fingerprint
from crane_serve.common.masks.files import decode_mask
from crane_serve.common.models.experts import expert_modules
from crane_serve.common.models.families import decoder_of
from crane_serve.common.models.load import load_tokenizer
from crane_serve.common.models.prefix import encode_from_start
from relevance.accumulators import Histogram, StatisticError
from relevance.encoding import Batch
from relevance.methods.magnitude import Magnitude
from relevance.model import load_model
from relevance.model_passes import ModelPasses, units_of
from relevance.scores import Scores, ScoresError
from relevance.selection import select
from relevance.selection_options import SelectionOptions
from tests.architectures import tiny_checkpoint
from tests.scores import scores_info
from tests.tiny import tiny_model

CPU = torch.device("cpu")
EXACT = 1 / 4096  # around 0


def _values(documents: int, neurons: int, seed: int = 0) -> Tensor:
    """Of sizes from 1e-3 to 1e3, of both signs, mostly one of them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (torch.rand(1, neurons, generator=generator) * 6 - 3)
    return sizes * (torch.randn(documents, neurons, generator=generator) + torch.linspace(-2, 2, neurons))


def test_medians_are_within_a_bin_of_those_of_the_values() -> None:
    values = _values(1001, 300)
    histogram = Histogram(2, 320, CPU)
    for part in values.split(200):
        histogram.add(1, part)
    found = histogram.median()
    expected = values.double().median(dim=0).values
    sizes = expected.abs()
    wrong = (found[1, :300] - expected).abs()
    assert bool((wrong <= (2**0.5 - 1) * sizes + EXACT).all())
    assert float((wrong / (sizes + EXACT)).median()) < 0.05
    assert not found[0].any()  # nothing observed
    assert not found[1, 300:].any()


def test_medians_of_the_extremes() -> None:
    histogram = Histogram(1, 4, CPU)
    histogram.add(0, torch.tensor([[0.0, 1e6, -1e6, 3.0]] * 3 + [[5.0, 1e6, -1e6, -3.0]] * 2))
    middle = histogram.median()[0]
    assert abs(float(middle[0])) <= EXACT
    assert float(middle[1]) == pytest.approx(4096, rel=0.3)
    assert float(middle[2]) == pytest.approx(-4096, rel=0.3)
    assert float(middle[3]) == pytest.approx(3, rel=0.42)


def test_only_what_counts_is_counted() -> None:
    values = _values(50, 6)
    counted = torch.rand(50, 6, generator=torch.Generator().manual_seed(1)) > 0.5
    histogram = Histogram(1, 6, CPU)
    histogram.add(0, values, counted)
    for neuron in range(6):
        alone = Histogram(1, 1, CPU)
        alone.add(0, values[counted[:, neuron], neuron].unsqueeze(1))
        assert float(alone.median()) == float(histogram.median()[0, neuron])


def test_histograms_merge_and_load() -> None:
    whole, first, second, loaded = (Histogram(1, 5, CPU) for _ in range(4))
    for part, seed in ((first, 2), (second, 3)):
        part.add(0, _values(40, 5, seed))
        whole.add(0, _values(40, 5, seed))
    loaded.load(first.tensors())
    loaded.merge(second)
    assert torch.equal(loaded.median(), whole.median())
    with pytest.raises(StatisticError, match=r"counts is torch.int32 \[1, 6, 97\]; expected torch.int32 \[1, 5, 97\]"):
        first.merge(Histogram(1, 6, CPU))


def _run(*arguments: object, fails: bool = False) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert (result.exit_code != 0) == fails, result.output
    return " ".join(result.output.split())


def _corpus(directory: Path) -> Path:
    directory.mkdir()
    for language, text in {"en": "the river runs", "zh": "河水流过"}.items():
        (directory / f"{language}.txt").write_text("".join(f"{text} {number}\n" for number in range(6)))
    return directory


def test_commands_keep_medians_and_use_them(tmp_path: Path) -> None:
    model, corpus = tiny_model("llama", tmp_path / "model"), _corpus(tmp_path / "corpus")
    common = (model, "--corpus", corpus, "--methods", "magnitude", "--dtype", "float32", "--batch-tokens", 40)
    plain, full, dealt = (tmp_path / f"{name}.safetensors" for name in ("plain", "full", "dealt"))
    _run("relevance", *common, "--out", plain)
    _run("relevance", *common, "--medians", "--out", full)
    _run("relevance", *common, "--medians", "--halves", "--out", dealt)
    medians = Scores.load(full).medians
    assert medians is not None
    assert Scores.load(plain).medians is None
    whole = Scores.load(dealt).medians
    assert whole is not None
    assert torch.allclose(whole, medians, atol=1e-6)
    decoder = decoder_of(load_model(model, torch.float32, CPU))
    assert medians.shape == (2, len(decoder.sizes), max(decoder.sizes))
    assert bool((medians[0] != medians[1]).any())

    out = tmp_path / "masks"
    for intervention, expected in (("median", medians.mean(dim=0)), ("median:zh", medians[1])):
        _run("select", full, "--method", "magnitude", "--count", 9, "--intervention", intervention, "--out", out)
        mask = decode_mask("magnitude-en", (out / "magnitude-en.safetensors").read_bytes(), source="").mask
        assert mask.offset is not None
        assert torch.equal(mask.offset, torch.where(mask.intermediate == 0, expected, 0))
    said = _run("select", plain, "--method", "magnitude", "--intervention", "median", "--out", out, fails=True)
    assert "without median activations; `crane relevance --medians` writes them" in said


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Glm4MoeForCausalLM"])
def test_experts_count_the_tokens_that_they_get(architecture: str, tmp_path: Path) -> None:
    """Against neurons of the model's own pass, of the tokens that the router gave to each expert."""
    checkpoint, corpus = tiny_checkpoint(architecture, tmp_path / "model"), _corpus(tmp_path / "corpus")
    out = tmp_path / "scores.safetensors"
    options = ("--methods", "magnitude", "--medians", "--dtype", "float32")
    _run("relevance", checkpoint, "--corpus", corpus, *options, "--out", out)
    scores, experts = Scores.load(out), Fingerprint.of(checkpoint).experts
    assert experts is not None
    means, medians = scores.typical(), scores.typical(median=True)

    model = load_model(checkpoint, torch.float32, CPU)
    decoder, sizes = decoder_of(model), scores.shape.sizes
    layer = experts.layers[-1]
    columns, seen = experts.columns(layer, sizes), {}
    expert_modules(decoder.trunk)[layer].register_forward_pre_hook(lambda _, inputs: seen.update(ids=inputs[1]))
    groups = decoder.layers[layer].groups
    (group,) = [group for group in groups if group.of_experts]
    group.down_proj.register_forward_pre_hook(lambda _, inputs: seen.update(neurons=inputs[0]))

    tokenizer, kept = load_tokenizer(checkpoint), {"ids": [], "neurons": []}
    for line in (corpus / "zh.txt").read_text().splitlines():
        ids = encode_from_start(tokenizer, line)
        with ModelPasses(model) as passes, torch.no_grad():
            passes.run(Batch.of([ids], CPU), [Magnitude(units_of(decoder))])
        for name, values in seen.items():
            kept[name].append(values[1:])  # without the start token
    routed, neurons = torch.cat(kept["ids"]), torch.cat(kept["neurons"])
    for expert in range(experts.count):
        own = neurons[(routed == expert).any(dim=1)][:, expert * experts.size : (expert + 1) * experts.size]
        place = slice(columns.start + expert * experts.size, columns.start + (expert + 1) * experts.size)
        if not len(own):
            assert not means[1, layer, place].any()
            continue
        assert torch.allclose(means[1, layer, place], own.mean(dim=0), atol=1e-5)
        low, high = (own.double().quantile(share, dim=0, interpolation="nearest") for share in (0.0, 1.0))
        assert bool((medians[1, layer, place] >= low - (2**0.5 - 1) * low.abs() - EXACT).all())
        assert bool((medians[1, layer, place] <= high + (2**0.5 - 1) * high.abs() + EXACT).all())
    if columns.start:
        dense = scores.shares
        assert dense is not None
        assert bool((dense[:, layer, : columns.start] == 1).all())
    mask = select(scores, SelectionOptions("magnitude", count=30, intervention="mean")).masks["zh"]
    assert mask.offset is not None
    assert torch.equal(mask.offset, torch.where(mask.intermediate == 0, means.mean(dim=0), 0))


def test_means_of_experts_need_the_tokens_that_they_get(tmp_path: Path) -> None:
    fingerprint = Fingerprint.of(tiny_checkpoint("MixtralForCausalLM", tmp_path / "model"))
    info = scores_info(("en", "zh")).model_copy(update={"fingerprint": fingerprint})
    sizes = fingerprint.intermediate_sizes
    values = torch.ones(2, len(sizes), max(sizes))
    with pytest.raises(ScoresError, match="without how many tokens have an expert"):
        Scores({"magnitude": values}, info, means=values).typical()
    half = Scores({"magnitude": values}, info, means=values, shares=0.5 * values)
    assert torch.equal(half.typical(), 2 * values)
    assert not Scores({"magnitude": values}, info, means=0 * values, shares=0 * values).typical().any()
