"""Masks with offsets: values that become scale * a + offset, alone, joined, in files, in transformers, by selection."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from crane_serve.common.masks import (
    Composition,
    MaskError,
    MaskFileError,
    Member,
    NeuronMask,
    applied,
    decode_mask,
    encode_mask,
)
from crane_serve.common.masks.bake import BakeError, bake
from crane_serve.common.models.families import decoder_of
from crane_serve.common.models.load import load_causal_lm
from crane_serve.engine.admission import admit
from crane_serve.engine.config import MaskConfig
from crane_serve.engine.masked_mlp import MaskedProjection
from crane_serve.engine.table import NO_OFFSET, MaskTable, Part
from relevance.causal import losses, masked
from relevance.encoding import Batch
from relevance.model import load_model
from relevance.model_passes import ModelPasses, units_of
from relevance.scores import Scores, ScoresError
from relevance.selection import select
from relevance.selection_options import Rule, SelectionError, SelectionOptions
from relevance.typical import MeanActivation
from tests.architectures import model_class, tiny_checkpoint
from tests.engines import Oracle, random_masks
from tests.scores import scores_info
from tests.tiny import mlp_projections, tiny_model

CPU = torch.device("cpu")
SIZES = (3, 2)
DOCUMENTS = [[0, *range(20, 60)], [0, 7, *range(90, 99)]]


def mask(scales: list[list[float]], offsets: list[list[float]] | None = None) -> NeuronMask:
    return NeuronMask(torch.tensor(scales), SIZES, offset=None if offsets is None else torch.tensor(offsets))


ONES = [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
NOTHING = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_a_neuron_with_an_offset_is_changed() -> None:
    shifted = mask([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]], [[0.0, 0.0, 2.5], [-1.0, 0.0, 0.0]])
    assert shifted.neuron_sets() == [[1, 2], [0]]
    assert (shifted.neurons, shifted.neurons_per_layer()) == (3, [2, 1])
    assert Composition([Member(shifted)]).neurons == 3
    assert shifted.digest != mask([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]).digest


def test_no_offsets_are_none() -> None:
    plain = mask(ONES, NOTHING)
    assert plain.offset is None
    assert plain.digest == mask(ONES).digest
    assert mask(ONES, [[-0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).digest == plain.digest


@pytest.mark.parametrize(
    ("offsets", "problem"),
    [
        ([[0.0, 0.0, torch.nan], [0.0, 0.0, 0.0]], "'offset' holds values that are not finite"),
        ([[0.0, 0.0, 2e4], [0.0, 0.0, 0.0]], r"'offset' holds a scale of size 2e\+04"),
        ([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]], "'offset' adds to padding of layer 1 beyond its 2 neurons"),
        ([[0.0, 0.0], [0.0, 0.0]], r"'offset' has shape \[2, 2\], expected \[2, 3\]"),
    ],
)
def test_other_offsets_are_refused(offsets: list[list[float]], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        mask(ONES, offsets)


_NUMBERS = st.sampled_from([0.0, 1.0, 0.5, -2.0])


@given(
    st.lists(_NUMBERS, min_size=5, max_size=5),
    st.lists(st.sampled_from([0.0, 0.0, 3.0, -1.5]), min_size=5, max_size=5),
    st.lists(_NUMBERS, min_size=5, max_size=5),
    st.lists(_NUMBERS, min_size=5, max_size=5),
    st.sampled_from([0.0, 0.25, 1.0, 2.0]),
)
def test_offsets_act_first_and_other_scales_after_them(
    scales: list[float], offsets: list[float], other: list[float], third: list[float], factor: float
) -> None:
    """One mask with offsets joined with two without: as if it were applied first, in whatever order they are given."""

    def rows(values: list[float], padding: float) -> list[list[float]]:
        return [values[:3], [*values[3:], padding]]

    affine = mask(rows(scales, 1.0), rows(offsets, 0.0))
    members = [Member(affine, factor), Member(mask(rows(other, 1.0))), Member(mask(rows(third, 1.0)))]
    assume(len({member.wire for member in members}) == 3)  # what is given twice counts once
    values = torch.tensor([0.7, -1.0, 2.0, 0.3, 5.0])
    own = torch.tensor(scales) + factor * (1 - torch.tensor(scales))
    expected = (values * own + (1 - factor) * torch.tensor(offsets)) * torch.tensor(other) * torch.tensor(third)
    for order in itertools.permutations(members):
        joined = Composition(order)
        for of in (joined, Composition([Member(joined.whole())])):
            found = []
            for layer, size in enumerate(SIZES):
                added = of.offset(layer, 0, size)
                part = values[3 * layer : 3 * layer + size] * of.intermediate(layer, 0, size)
                found.append(part if added is None else part + added)
            assert torch.allclose(torch.cat(found), expected)
        assert joined.digest == Composition(members).digest


def test_two_masks_may_replace_a_neuron_by_the_same_value_only() -> None:
    one = mask([[0.0, 1.0, 1.0], ONES[1]], [[2.0, 0.0, 0.0], NOTHING[1]])
    same = mask([[0.0, 0.0, 1.0], ONES[1]], [[2.0, 1.0, 0.0], NOTHING[1]])
    other = mask([[0.0, 1.0, 1.0], ONES[1]], [[3.0, 0.0, 0.0], NOTHING[1]])
    elsewhere = mask(ONES, [NOTHING[0], [1.0, 0.0, 0.0]])
    joined = Composition([Member(one), Member(same), Member(elsewhere)])
    assert joined.offset(0).tolist() == [2, 1, 0]
    assert joined.offset(1).tolist() == [1, 0, 0]
    assert joined.intermediate(0).tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="masks that give neuron 0 of layer 0 different values"):
        Composition([Member(one), Member(elsewhere), Member(other)])
    with pytest.raises(ValueError, match="different values"):
        Composition([Member(one), Member(one, 0.5)])
    last = [mask(ONES, [NOTHING[0], [0.0, added, 0.0]]) for added in (1.0, 2.0)]
    with pytest.raises(ValueError, match="masks that give neuron 1 of layer 1 different values"):
        Composition(map(Member, last))
    with pytest.raises(ValueError, match=r"offsets that may become 2e\+04"):
        Composition([Member(mask([[2000.0, 1.0, 1.0], ONES[1]])), Member(mask(ONES, [[0.0, 10.0, 0.0], NOTHING[1]]))])


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Glm4MoeForCausalLM", "MixtralForCausalLM"])
def test_a_file_keeps_offsets(architecture: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(architecture, tmp_path / "tiny")
    stored = random_masks(checkpoint, tmp_path / "masks", share=0.3, offsets=True).get("attnlrp-zh")
    content = encode_mask("zh", stored.mask, stored.info)
    assert {"offset", "expert_offsets"} & set(load(content)) == (
        {"offset"} if architecture.startswith("Qwen3") else {"offset", "expert_offsets"}
    )
    read = decode_mask("zh", content, source="the file").mask
    assert read.offset is not None
    assert torch.equal(read.offset, stored.mask.offset)
    assert read.digest == stored.mask.digest


def test_a_file_with_half_of_its_offsets_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("MixtralForCausalLM", tmp_path / "tiny")
    stored = random_masks(checkpoint, tmp_path / "masks", share=0.3, offsets=True).get("attnlrp-zh")
    content = encode_mask("zh", stored.mask, stored.info)
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    for name in ("offset", "expert_offsets"):
        tensors = {key: value for key, value in load(content).items() if key != name}
        with pytest.raises(MaskFileError, match="expected 'intermediate' and 'experts' and maybe 'router', 'offset'"):
            decode_mask("zh", save(tensors, metadata=metadata), source="the file")
    dense = tiny_model("llama", tmp_path / "dense")
    stored = random_masks(dense, tmp_path / "dense-masks", share=0.3).get("attnlrp-zh")
    content = encode_mask("zh", stored.mask, stored.info)
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    tensors = {**load(content), "expert_offsets": torch.ones(3, 2, 2)}
    with pytest.raises(MaskFileError, match="expected 'intermediate' and maybe 'output', 'offset'"):
        decode_mask("zh", save(tensors, metadata=metadata), source="the file")


def test_rows_without_offsets_change_no_bit() -> None:
    projection = nn.Linear(3, 4)
    table, offsets, slots = torch.ones(3, 3), torch.full((3, 3), NO_OFFSET), torch.tensor([0, 1, 2, 0])
    plain, module = (
        MaskedProjection(projection, table, slots),
        MaskedProjection(projection, table, slots, None, offsets),
    )
    seen = []
    projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    x = torch.tensor([[0.0, -0.0, 1.0], [2.0, -3.0, -0.0], [1e-45, torch.inf, -1e-45], [0.5, 0.25, -0.5]])
    assert torch.equal(module(x).view(torch.int32), plain(x).view(torch.int32))
    assert torch.equal(seen[0].view(torch.int32), x.view(torch.int32))
    assert torch.equal(seen[0].view(torch.int32), seen[1].view(torch.int32))
    offsets[1], table[1] = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)
    module(x)
    assert seen[2][1].tolist() == [1, 2, 3]
    assert torch.equal(seen[2][[0, 2, 3]].view(torch.int32), x[[0, 2, 3]].view(torch.int32))


def test_a_row_of_the_table_keeps_no_offset_of_the_mask_before() -> None:
    def part() -> Part:
        return Part(torch.ones(2, 3), 0, 3, None, torch.full((2, 3), NO_OFFSET))

    parts = {0: [part()], 1: [part()]}
    table = MaskTable(parts)
    table.assign([Composition([Member(mask([[0.0, 1.0, 1.0], ONES[1]], [[2.0, 0.0, 0.0], NOTHING[1]]))])])
    assert parts[0][0].offsets[1].tolist() == [2, 0, 0]
    table.assign([Composition([Member(mask([[1.0, 0.0, 1.0], ONES[1]]))])])
    assert parts[0][0].offsets[1].tolist() == [0, 0, 0]
    assert torch.equal(torch.signbit(parts[0][0].offsets), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="a mask has offsets, the model was patched without them"):
        MaskTable({0: [Part(torch.ones(2, 3), 0, 3)]}).assign(
            [Composition([Member(mask(ONES, [[1.0, 0, 0], [0, 0, 0]]))])]
        )


def test_an_engine_without_offsets_refuses_them(tmp_path: Path) -> None:
    checkpoint = tiny_model("llama", tmp_path / "llama")
    library = random_masks(checkpoint, tmp_path / "masks", share=0.3, offsets=True)
    for offsets in (True, False):
        config = MaskConfig(9, False, offsets, str(checkpoint), tmp_path / "masks", "attnlrp", library.manifest)
        engine = SimpleNamespace(additional_config={"crane": config})
        admit(engine, SimpleNamespace(extra_args={"crane_mask": "en"}), resumable=False)
        asked = SimpleNamespace(extra_args={"crane_mask": "zh"})
        if offsets:
            assert admit(engine, asked, resumable=False).mask.offsets
        else:
            with pytest.raises(MaskError, match="adds to neurons, which this engine was started without"):
                admit(engine, asked, resumable=False)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "MixtralForCausalLM", "Qwen2MoeForCausalLM"])
def test_losses_are_those_of_an_oracle(name: str, tmp_path: Path) -> None:
    checkpoint = tiny_model(name, tmp_path / "m") if name.islower() else tiny_checkpoint(name, tmp_path / "m")
    library = random_masks(checkpoint, tmp_path / "masks", share=0.3, offsets=True)
    oracle = Oracle(checkpoint, model_class(library.fingerprint.architecture))
    zh, en = (library.get(f"attnlrp-{language}").mask for language in ("zh", "en"))
    assert zh.offset is not None
    decoder = decoder_of(load_model(checkpoint, torch.float32, CPU))
    model = load_causal_lm(checkpoint, torch.float32)
    without = NeuronMask(zh.intermediate, zh.intermediate_sizes)
    assert abs(sum(oracle.logprobs(DOCUMENTS[0], zh)) - sum(oracle.logprobs(DOCUMENTS[0], without))) > 0.1
    for of in (zh, Composition([Member(zh, 0.5), Member(en)]).whole()):
        expected = [-sum(oracle.logprobs(ids, of)) for ids in DOCUMENTS]
        with masked(decoder, of):
            assert losses(decoder, DOCUMENTS, 4096).nats == pytest.approx(expected, abs=1e-3)
        with applied(model, of), torch.no_grad():
            for ids, nats in zip(DOCUMENTS, expected, strict=True):
                rows = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                found = -float(rows.gather(1, torch.tensor(ids)[1:, None]).sum())
                assert found == pytest.approx(nats, abs=1e-3)


def test_offsets_are_baked_into_a_bias(tmp_path: Path) -> None:
    checkpoint = tiny_model("gpt2", tmp_path / "gpt2")
    stored = random_masks(checkpoint, tmp_path / "masks", share=0.3, offsets=True).get("attnlrp-zh")
    bake(checkpoint, stored, tmp_path / "baked")
    baked, oracle = Oracle(tmp_path / "baked"), Oracle(checkpoint)
    assert baked.logprobs(DOCUMENTS[0], None) == pytest.approx(oracle.logprobs(DOCUMENTS[0], stored.mask), abs=1e-4)
    llama = tiny_model("llama", tmp_path / "llama")
    stored = random_masks(llama, tmp_path / "llama-masks", share=0.3, offsets=True).get("attnlrp-zh")
    with pytest.raises(BakeError, match="its projection has no bias"):
        bake(llama, stored, tmp_path / "baked-llama")
    assert not (tmp_path / "baked-llama").exists()


def test_mean_activations_are_those_of_the_model(tmp_path: Path) -> None:
    model = load_model(tiny_model("llama", tmp_path / "llama"), torch.float32, CPU)
    method, kept = MeanActivation(units_of(decoder_of(model))), []
    with ModelPasses(model) as passes:
        for ids in DOCUMENTS:
            passes.run(Batch.of([ids], CPU), [method])
    hooks = [
        projection.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0][0, 1:]))
        for _, projection in mlp_projections(model)
    ]
    for ids in DOCUMENTS:
        model(torch.tensor([ids]))
    layers = len(hooks)
    for layer in range(layers):
        expected = torch.cat(kept[layer::layers]).mean(dim=0)  # without start tokens
        assert torch.allclose(method.finalise()[layer].float(), expected, atol=1e-6)


MEANS = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]], [[3.0, -2.0, 1.0], [0.0, 1.0, 0.0]]])  # en, zh


def scores(means: Tensor | None = MEANS) -> Scores:
    info = scores_info(("en", "zh"), SIZES)
    values = torch.tensor([[[9.0, 0.0, 0.0], [8.0, 0.0, 0.0]], [[0.0, 9.0, 0.0], [0.0, 8.0, 0.0]]])
    return Scores({"attnlrp": values}, info, means=means)


@pytest.mark.parametrize(
    ("intervention", "strength", "scale", "of_en", "of_zh"),
    [
        ("zero", 1.0, 0.0, (0, 0), (0, 0)),
        ("zero", 0.5, 0.5, (0, 0), (0, 0)),
        ("mean", 1.0, 0.0, (2, 2), (0, 3)),
        ("mean", 0.5, 0.5, (1, 1), (0, 1.5)),
        ("mean:zh", 1.0, 0.0, (3, 0), (-2, 1)),
        ("add:zh-en", 2.0, 1.0, (4, -8), (-8, -8)),
    ],
)
def test_interventions(
    intervention: str, strength: float, scale: float, of_en: tuple[float, float], of_zh: tuple[float, float]
) -> None:
    options = SelectionOptions("attnlrp", count=2, contrast="none", intervention=intervention, strength=strength)
    masks = select(scores(), options).masks
    for language, places, values in (("en", (0, 0), of_en), ("zh", (1, 1), of_zh)):
        found = masks[language]
        offset = torch.zeros(2, 3) if found.offset is None else found.offset
        for layer, (neuron, value) in enumerate(zip(places, values, strict=True)):
            assert found.intermediate[layer, neuron] == scale
            assert offset[layer, neuron] == value
        assert int((found.intermediate != 1).sum() + (offset != 0).sum()) <= 4


def test_a_mask_says_what_it_does(tmp_path: Path) -> None:
    options = SelectionOptions("attnlrp", count=1, intervention="mean:zh", strength=0.5)
    (path, _) = select(scores(), options).write(tmp_path, scores())
    info = decode_mask("attnlrp-en", path.read_bytes(), source="").info
    assert (info.parameters["intervention"], info.parameters["strength"]) == ("mean:zh", 0.5)
    (path, _) = select(scores(), SelectionOptions("attnlrp", count=1)).write(tmp_path, scores())
    assert "intervention" not in decode_mask("attnlrp-en", path.read_bytes(), source="").info.parameters


def test_other_interventions_are_refused() -> None:
    for text in ("mean:vi", "median:", "add:en-vi", "add:en-en", "middle", "add:en"):
        with pytest.raises(SelectionError, match=r"expected zero, mean, mean:LANG, median, median:LANG or add:"):
            select(scores(), SelectionOptions("attnlrp", count=1, intervention=text))
    with pytest.raises(ScoresError, match="these scores come without median activations; `crane relevance --medians`"):
        select(scores(), SelectionOptions("attnlrp", count=1, intervention="median:en"))
    with pytest.raises(ScoresError, match="these scores come without mean activations"):
        select(scores(None), SelectionOptions("attnlrp", count=1, intervention="mean"))
    with pytest.raises(SelectionError, match="strength is 0"):
        SelectionOptions("attnlrp", count=1, strength=0.0)
    with pytest.raises(SelectionError, match="nor interventions"):
        SelectionOptions("attnlrp", Rule.EXPERTS, count=1, intervention="mean")


def test_scores_keep_means(tmp_path: Path) -> None:
    scores().save(tmp_path / "scores.safetensors")
    read = Scores.load(tmp_path / "scores.safetensors")
    assert torch.equal(read.means, MEANS)
    assert list(read.by_method) == ["attnlrp"]
    assert scores(None).merged(Scores({"lape": scores().of("attnlrp")}, scores().info, means=MEANS)).means is not None
