"""Experts that routers may not choose: in masks, files, compositions, transformers' modules and selections."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import nn

from crane_serve.common.masks import (
    Composition,
    Fingerprint,
    MaskFileError,
    MaskInfo,
    Member,
    NeuronMask,
    decode_mask,
    encode_mask,
)
from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.experts import expert_modules
from crane_serve.common.models.families import decoder_of
from crane_serve.common.models.routers import find_routers, kept_from
from crane_serve.engine.table import MaskTable, Part
from relevance.causal import losses, masked
from relevance.encoding import Batch
from relevance.method import MethodError, require_known
from relevance.methods import scored
from relevance.methods.routing import Routing
from relevance.model import load_model
from relevance.model_passes import ModelPasses, units_of
from relevance.scores import Scores, ScoresInfo
from relevance.selection import select
from relevance.selection_options import Overlap, Rule, SelectionError, SelectionOptions
from tests.architectures import OF_EXPERTS, model_class, tiny_checkpoint
from tests.experts import without_experts
from tests.scores import scores_info
from tests.searching import run_crane, scored_tiny
from tests.tiny import LAYERS

CPU = torch.device("cpu")
COUNT = 4
DOCUMENTS = [[0, *range(20, 60)], [0, 7, *range(90, 99)]]
ROUTED = ["MixtralForCausalLM", "Qwen2MoeForCausalLM", "GptOssForCausalLM", "GraniteMoeForCausalLM", "OlmoeForCausalLM"]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    return tiny_checkpoint("MixtralForCausalLM", tmp_path_factory.mktemp("routers") / "mixtral")


def router_mask(fingerprint: Fingerprint, off: dict[int, list[int]]) -> NeuronMask:
    sizes = fingerprint.intermediate_sizes
    router = torch.ones(len(sizes), COUNT)
    for layer, experts in off.items():
        router[layer, experts] = 0
    return NeuronMask(torch.ones(len(sizes), max(sizes)), sizes, router=router)


def encoded(mask: NeuronMask, fingerprint: Fingerprint) -> bytes:
    return encode_mask("zh", mask, MaskInfo(language="zh", method="test", fingerprint=fingerprint))


def test_a_file_keeps_them(mixtral: Path) -> None:
    fingerprint = Fingerprint.of(mixtral)
    mask = router_mask(fingerprint, {0: [1], 2: [0, 3]})
    content = encoded(mask, fingerprint)
    assert load(content)["router"].tolist() == [[1, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]]
    read = decode_mask("zh", content, source="the file").mask
    assert (read.digest, read.experts_off, read.neurons) == (mask.digest, 3, 0)
    assert read.digest != router_mask(fingerprint, {0: [2], 2: [0, 3]}).digest
    assert read.digest != NeuronMask(mask.intermediate, mask.intermediate_sizes).digest


@pytest.mark.parametrize(
    ("router", "problem"),
    [
        (torch.ones(LAYERS, COUNT) / 2, "something else than 0 and 1"),
        (torch.ones(LAYERS, COUNT) * torch.nan, "values that are not finite"),
        (torch.zeros(LAYERS, COUNT), "no expert of layer 0 is left"),
        (torch.ones(2, COUNT), r"'router' has shape \[2, 4\], expected \[3, experts\]"),
        (torch.ones(LAYERS, COUNT).int(), "dtype torch.int32"),
    ],
)
def test_what_no_router_can_do_is_refused(mixtral: Path, router: torch.Tensor, problem: str) -> None:
    sizes = Fingerprint.of(mixtral).intermediate_sizes
    with pytest.raises(ValueError, match=problem):
        NeuronMask(torch.ones(len(sizes), max(sizes)), sizes, router=router)


def test_a_file_for_another_model_is_refused(mixtral: Path, tmp_path: Path) -> None:
    fingerprint = Fingerprint.of(mixtral)
    sizes = fingerprint.intermediate_sizes
    wide = NeuronMask(torch.ones(len(sizes), max(sizes)), sizes, router=torch.ones(LAYERS, COUNT + 1))
    with pytest.raises(MaskFileError, match="'router' has 5 columns, expected 4"):
        encoded(wide, fingerprint)
    glm = Fingerprint.of(tiny_checkpoint("Glm4MoeForCausalLM", tmp_path / "glm"))
    with pytest.raises(MaskFileError, match="'router' switches off experts of layer 0, which has none"):
        encoded(router_mask(glm, {0: [1]}), glm)
    dense = Fingerprint.of(tiny_checkpoint("Qwen3ForCausalLM", tmp_path / "dense"))
    with pytest.raises(MaskFileError, match="'router' is not known for models without experts"):
        encoded(router_mask(dense, {0: [1]}), dense)


def test_joined_masks_keep_off_what_either_does(mixtral: Path) -> None:
    fingerprint = Fingerprint.of(mixtral)
    one, other = router_mask(fingerprint, {0: [0]}), router_mask(fingerprint, {0: [3], 1: [2]})
    neurons = NeuronMask.switching_off([[1], [], []], fingerprint.intermediate_sizes)
    joined = Composition([Member(one), Member(other), Member(neurons)])
    assert (joined.experts_off, joined.neurons, joined.reroutes) == (3, 1, True)
    whole = joined.whole()
    assert whole.router is not None
    assert whole.router.tolist() == [[0, 1, 1, 0], [1, 1, 0, 1], [1, 1, 1, 1]]
    assert Composition([Member(neurons)]).router(0) is None
    assert not Composition([Member(one, 1.0), Member(neurons)]).reroutes
    with pytest.raises(ValueError, match="expected 0 or 1 behind '@'"):
        Composition([Member(one, 0.5)])
    with pytest.raises(ValueError, match="no expert of layer 0 is left"):
        Composition([Member(one), Member(router_mask(fingerprint, {0: [1, 2, 3]}))])


def test_the_table_has_them(mixtral: Path) -> None:
    fingerprint = Fingerprint.of(mixtral)
    (first, *_) = fingerprint.intermediate_sizes
    routers = {0: torch.ones(3, COUNT), 2: torch.ones(3, COUNT)}
    table = MaskTable({0: [Part(torch.ones(3, first), 0, first)]}, routers=routers)
    masks = [Composition([Member(router_mask(fingerprint, {2: [number]}))]) for number in (1, 3, 0)]
    (row,) = table.assign(masks[:1])
    assert routers[2][row].tolist() == [1, 0, 1, 1]
    assert bool((routers[0] == 1).all())
    rows = table.assign(masks[1:])
    assert [routers[2][row].tolist() for row in rows] == [[1, 1, 1, 0], [0, 1, 1, 1]]
    neurons = NeuronMask.switching_off([[1], [], []], fingerprint.intermediate_sizes)
    (row,) = table.assign([Composition([Member(neurons)])])
    assert routers[2][row].tolist() == [1, 1, 1, 1], "no trace of the mask before"


@pytest.mark.parametrize("architecture", ROUTED)
def test_masked_losses_are_those_of_a_model_without_the_experts(architecture: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(architecture, tmp_path / "whole")
    mask = router_mask(Fingerprint.of(checkpoint), {layer: [0, 2] for layer in range(LAYERS)})
    decoder = decoder_of(load_model(checkpoint, torch.float32, CPU))
    with masked(decoder, mask):
        found = losses(decoder, DOCUMENTS, 4096).nats
    with masked(decoder, None):
        whole = losses(decoder, DOCUMENTS, 4096).nats
    kind = model_class(architecture)
    smaller = without_experts(kind.from_pretrained(checkpoint, dtype=torch.float32).eval(), [1, 3])
    expected = []
    for ids in DOCUMENTS:
        with torch.no_grad():
            logprobs = smaller(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected.append(-float(logprobs.gather(1, torch.tensor(ids)[1:, None]).sum()))
    assert found == pytest.approx(expected, abs=1e-3)
    assert abs(found - whole).min() > 0.1, "the mask matters"


@pytest.mark.parametrize("architecture", OF_EXPERTS)
def test_routers_are_found_and_obey(architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    decoder = decoder_of(load_model(tiny_checkpoint(architecture, tmp_path / "tiny"), torch.float32, CPU))
    routers = find_routers(decoder.trunk)
    chosen: dict[int, set[int]] = {}
    for layer, module in expert_modules(decoder.trunk).items():

        def seen(_, inputs, layer=layer) -> None:
            _, ids, weights = inputs
            chosen[layer] = set(ids[weights != 0].tolist())

        module.register_forward_pre_hook(seen)
    assert routers.keys() == expert_modules(decoder.trunk).keys()
    with ExitStack() as stack:
        for router in routers.values():
            stack.enter_context(kept_from(router, torch.tensor([0.0, 1.0, 0.0, 1.0])))
        losses(decoder, DOCUMENTS, 4096)
    assert set(chosen) == set(routers)
    assert set().union(*chosen.values()) <= {1, 3}


def test_a_router_of_another_kind_is_refused() -> None:
    class Twice(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden) + super().forward(hidden)

    router = Twice(8, COUNT)
    with (
        kept_from(router, torch.tensor([0.0, 1, 1, 1])),
        pytest.raises(RuntimeError, match="made logits 2 times, expected once"),
    ):
        router(torch.zeros(2, 8))
    assert router(torch.zeros(2, 8)).isfinite().all(), "it is as before"


def test_what_stood_in_a_routers_place_stands_there_again() -> None:
    router, own = nn.Linear(8, COUNT), nn.Linear(8, COUNT).forward
    router.forward = own
    with kept_from(router, torch.tensor([0.0, 1, 1, 1])):
        with kept_from(router, torch.tensor([1.0, 1, 0, 1])):
            assert router(torch.zeros(1, 8)).isinf().tolist() == [[True, False, True, False]]
        assert router(torch.zeros(1, 8)).isinf().tolist() == [[True, False, False, False]]
    assert router.forward == own


def test_two_routers_are_refused(mixtral: Path) -> None:
    decoder = decoder_of(load_model(mixtral, torch.float32, CPU))
    decoder.trunk.layers[1].mlp.second = nn.Linear(8, COUNT)
    with pytest.raises(UnsupportedModelError, match="2 routers beside its experts, expected one"):
        find_routers(decoder.trunk)


def test_routing_is_the_share_of_tokens_that_have_the_expert(mixtral: Path) -> None:
    model = load_model(mixtral, torch.float32, CPU)
    decoder = decoder_of(model)
    method, seen = Routing(units_of(decoder)), {}
    expert_modules(decoder.trunk)[1].register_forward_pre_hook(lambda _, inputs: seen.update(ids=inputs[1]))
    with ModelPasses(model) as passes:
        passes.run(Batch.of(DOCUMENTS[:1], CPU), [method])
    counts = torch.bincount(seen["ids"][1:].flatten(), minlength=COUNT)  # without the start token
    shares = (counts / (len(DOCUMENTS[0]) - 1)).double()
    found = method.finalise()[1].view(COUNT, -1)
    assert torch.allclose(found, shares[:, None].expand_as(found))


def test_routing_needs_experts(tmp_path: Path) -> None:
    dense = decoder_of(load_model(tiny_checkpoint("Qwen3ForCausalLM", tmp_path / "dense"), torch.float32, CPU))
    with pytest.raises(MethodError, match=r"routing needs to know which neurons.* of which it found none\.$"):
        require_known([Routing], dense, "Qwen3ForCausalLM")


def test_commands_take_all_methods_that_a_model_has_and_refuse_one_by_name(tmp_path: Path) -> None:
    files = scored_tiny(tmp_path, "all")
    assert set(Scores.load(files["scores"]).by_method) == set(scored()) - {"routing"}
    common = ("--corpus", files["corpus"], "--out", tmp_path / "other.safetensors")
    said = run_crane("relevance", files["model"], *common, "--methods", "routing,magnitude", fails=True)
    assert "method routing needs to know which neurons are in experts" in said
    mixture = tiny_checkpoint("MixtralForCausalLM", tmp_path / "mixture")
    run_crane("relevance", mixture, *common, "--methods", "all")
    assert set(Scores.load(tmp_path / "other.safetensors").by_method) == set(scored())


def scores_of(fingerprint: Fingerprint) -> Scores:
    """One language prefers expert 2 of layer 0 and 1 of layer 1, the other expert 3 of layer 2."""
    experts, sizes = fingerprint.experts, fingerprint.intermediate_sizes
    values = torch.zeros(2, len(sizes), max(sizes))
    for language, layer, expert, value in ((0, 0, 2, 0.9), (0, 1, 1, 0.8), (0, 0, 3, 0.7), (1, 2, 3, 0.5)):
        first = experts.columns(layer, sizes).start + expert * experts.size
        values[language, layer, first : first + experts.size] = value
    return Scores({"routing": values}, info_of(fingerprint))


def info_of(fingerprint: Fingerprint) -> ScoresInfo:
    return scores_info(("en", "zh")).model_copy(update={"fingerprint": fingerprint})


def test_whole_experts_are_selected(mixtral: Path) -> None:
    scores = scores_of(Fingerprint.of(mixtral))
    selection = select(scores, SelectionOptions("routing", Rule.EXPERTS, count=2))
    assert selection.masks["en"].router.tolist() == [[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 1]]
    assert selection.masks["zh"].router[2, 3] == 0
    assert [mask.neurons for mask in selection.masks.values()] == [0, 0]
    most = select(scores, SelectionOptions("routing", Rule.EXPERTS, count=LAYERS * (COUNT - 1)))
    assert all(mask.router.sum(dim=1).tolist() == [1, 1, 1] for mask in most.masks.values())
    with pytest.raises(SelectionError, match="count is 10; all layers but one expert in each have 9"):
        select(scores, SelectionOptions("routing", Rule.EXPERTS, count=10))


def test_options_that_experts_do_not_know_are_refused(tmp_path: Path) -> None:
    for options in ({}, {"count": 1, "overlap": Overlap.EXCLUSIVE}, {"count": 1, "quotas": "uniform"}):
        with pytest.raises(SelectionError, match=r"the rule experts (needs a count|has none)"):
            SelectionOptions("routing", Rule.EXPERTS, **options)
    dense = Fingerprint.of(tiny_checkpoint("Qwen3ForCausalLM", tmp_path / "dense"))
    values = torch.zeros(2, dense.layers, max(dense.intermediate_sizes))
    with pytest.raises(SelectionError, match=r"the model \(Qwen3ForCausalLM\) has no experts"):
        select(Scores({"magnitude": values}, info_of(dense)), SelectionOptions("magnitude", Rule.EXPERTS, count=1))
