"""The patch of the model: what it changes, and what it refuses."""

import pytest
import torch
from torch import Tensor, nn

from crane_serve.common.masks import Composition, Member, NeuronMask
from crane_serve.engine.masked_mlp import UnsupportedModel, install_masks
from tests.engine.stand_in import Layer, Mlp, Model
from tests.tiny import HIDDEN, LAYERS, NEURONS

SIZES = (NEURONS,) * LAYERS


def install(model: Model, sizes: tuple[int, ...] = SIZES, outputs: bool = False):
    return install_masks(model, sizes, rows=4, max_tokens=8, outputs=outputs)


def as_it_is(mask: NeuronMask) -> Composition:
    return Composition([Member(mask)])


@torch.no_grad()
def test_each_token_gets_its_mask_and_unmasked_tokens_are_untouched() -> None:
    model, x = Model(), torch.randn(5, HIDDEN)
    plain = [layer.mlp(x) for layer in model.layers]
    table, slots = install(model)
    neurons = [list(range(0, NEURONS, 3)), [], [7]]
    (row,) = table.assign([as_it_is(NeuronMask.switching_off(neurons, SIZES))])
    slots[:5] = torch.tensor([0, row, 0, row, 0])
    for layer, before, off in zip(model.layers, plain, neurons, strict=True):
        after = layer.mlp(x)
        activations = torch.nn.functional.silu(layer.mlp.gate(x))
        activations[:, off] = 0
        assert torch.equal(after[[0, 2, 4]], before[[0, 2, 4]])
        assert torch.allclose(after[[1, 3]], (activations @ layer.mlp.down_proj.weight.T)[[1, 3]], atol=1e-6)


@torch.no_grad()
def test_outputs_are_scaled_where_the_engine_was_made_for_it() -> None:
    model, x = Model(), torch.randn(2, HIDDEN)
    before = model.layers[1].mlp(x)
    table, slots = install(model, outputs=True)
    output = torch.ones(LAYERS, HIDDEN)
    output[1, :10] = 0.5
    (row,) = table.assign([as_it_is(NeuronMask(torch.ones(LAYERS, NEURONS), SIZES, output))])
    slots[:2] = torch.tensor([0, row])
    after = model.layers[1].mlp(x)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1] * output[1])


def test_a_mask_of_outputs_never_runs_without_them() -> None:
    table, _ = install(Model())
    mask = NeuronMask(torch.ones(LAYERS, NEURONS), SIZES, torch.zeros(LAYERS, HIDDEN))
    with pytest.raises(RuntimeError, match="scales MLP output dimensions"):
        table.assign([as_it_is(mask)])


def test_a_layer_too_many_or_too_few_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"layers \[0, 1, 2\], expected one in each of layers 0 to 3"):
        install(Model(), (NEURONS,) * (LAYERS + 1))


@torch.no_grad()
def test_a_pipeline_rank_installs_its_own_layers_by_their_global_index() -> None:
    from vllm.model_executor.models.utils import PPMissingLayer

    model, x = Model(), torch.randn(2, HIDDEN)
    model.layers[0] = PPMissingLayer()
    table, slots = install(model)
    neurons = [[1], [2], [3]]
    (row,) = table.assign([as_it_is(NeuronMask.switching_off(neurons, SIZES))])
    slots[:2] = row
    for layer in (1, 2):
        activations = model.layers[layer].mlp.act_fn(model.layers[layer].mlp.gate(x))
        assert bool((activations[:, neurons[layer]] == 0).all())
        assert int((activations == 0).sum()) == 2


def test_a_rank_whose_own_layer_has_no_mlp_is_refused() -> None:
    from vllm.model_executor.models.utils import PPMissingLayer

    model = Model()
    model.layers[0] = PPMissingLayer()
    del model.layers[1].mlp
    with pytest.raises(UnsupportedModel, match=r"layers \[2\], expected one in each of layers 1 to 2"):
        install(model)


def test_another_size_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.down_proj takes 160 inputs, expected 161"):
        install(Model(), (NEURONS + 1,) * LAYERS)


def test_two_mlps_in_a_layer_are_refused() -> None:
    model = Model()
    model.layers[1].second = Mlp()
    with pytest.raises(UnsupportedModel, match="layer 1 has two MLPs"):
        install(model)


class SharedExpert(nn.Module):
    """Beside a shared expert that looks like an MLP stand experts that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_expert = Mlp()
        self.experts = nn.Linear(HIDDEN, HIDDEN)


def test_a_mixture_of_experts_is_refused_even_if_one_expert_looks_like_an_mlp() -> None:
    model = Model()
    model.layers[2].mlp = SharedExpert()
    with pytest.raises(UnsupportedModel, match=r"layers\.2\.mlp\.experts .* mixture of experts"):
        install(model)


class FusedMlp(Mlp):
    """An MLP that has an activation and does not use it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate(x)))[0]


def test_an_mlp_that_goes_around_its_activation_is_refused() -> None:
    model = Model()
    fused = Layer()
    fused.mlp = FusedMlp()
    model.layers[1] = fused
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp: switching off all its neurons does not switch it off"):
        install(model)
