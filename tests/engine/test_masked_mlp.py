"""The patch of the model: what it changes, and what it refuses."""

import pytest
import torch
from torch import Tensor, nn

from crane_serve.common.masks import Composition, Member, NeuronMask
from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.engine.masked_mlp import MaskedProjection, install_masks
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
        neurons_of = torch.nn.functional.silu(layer.mlp.gate(x)[0])
        neurons_of[:, off] = 0
        assert torch.equal(after[[0, 2, 4]], before[[0, 2, 4]])
        assert torch.allclose(after[[1, 3]], (neurons_of @ layer.mlp.down_proj.projection.weight.T)[[1, 3]], atol=1e-6)


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
    with pytest.raises(UnsupportedModelError, match=r"layers \[0, 1, 2\], expected one in each of layers 0 to 3"):
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
        mlp, read = model.layers[layer].mlp, []
        mlp.down_proj.projection.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))
        mlp(x)
        assert bool((read[0][:, neurons[layer]] == 0).all())
        assert int((read[0] == 0).sum()) == 2


def test_a_rank_whose_own_layer_has_no_mlp_is_refused() -> None:
    from vllm.model_executor.models.utils import PPMissingLayer

    model = Model()
    model.layers[0] = PPMissingLayer()
    del model.layers[1].mlp
    with pytest.raises(UnsupportedModelError, match=r"layers \[2\], expected one in each of layers 1 to 2"):
        install(model)


def test_another_size_is_refused() -> None:
    message = r"from its 161 neurons.*layers\.0\.mlp\.gate 64 to 160, layers\.0\.mlp\.down_proj 160 to 64"
    with pytest.raises(UnsupportedModelError, match=message):
        install(Model(), (NEURONS + 1,) * LAYERS)


def test_two_mlps_in_a_layer_are_refused() -> None:
    model = Model()
    model.layers[1].second = Mlp()
    with pytest.raises(UnsupportedModelError, match=r"layer 1 has two MLPs, with layers\.1\.mlp\.down_proj and"):
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
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.mlp\.experts .* mixture of experts"):
        install(model)


class FusedMlp(Mlp):
    """An MLP that has a last projection and does not call it."""

    def forward(self, x: Tensor) -> Tensor:
        neurons = nn.functional.silu(self.gate(x)[0])
        return neurons @ next(self.down_proj.parameters()).T


class HungryMlp(Mlp):
    """An MLP that needs more than hidden states."""

    def forward(self, x: Tensor, more: Tensor) -> Tensor:
        return super().forward(x + more)


@pytest.mark.parametrize(
    ("mlp", "message"),
    [
        (FusedMlp, r"layers\.1\.mlp: switching off all its neurons does not switch it off"),
        (HungryMlp, r"layers\.1\.mlp does not run on hidden states alone"),
    ],
)
def test_an_mlp_that_does_not_obey_is_refused(mlp: type[Mlp], message: str) -> None:
    model = Model()
    other = Layer()
    other.mlp = mlp()
    model.layers[1] = other
    with pytest.raises(UnsupportedModelError, match=message):
        install(model)


@torch.no_grad()
@pytest.mark.parametrize("outputs", [False, True])
def test_tokens_may_stand_behind_another_dimension(outputs: bool) -> None:
    """As in vLLM's Transformers backend, where projections return no bias, too."""
    torch.manual_seed(0)
    projection, x = nn.Linear(6, 4), torch.randn(1, 3, 6)
    table, slots = torch.rand(2, 6), torch.tensor([1, 0, 1, 0])
    of_outputs = torch.rand(2, 4) if outputs else None
    expected = projection(x * table[slots[:3]]) * (1 if of_outputs is None else of_outputs[slots[:3]])
    assert torch.equal(MaskedProjection(projection, table, slots, of_outputs)(x), expected)


def test_what_reads_images_is_left_alone() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision_tower, self.language_model = Model(), Model()

        def get_language_model(self) -> nn.Module:
            return self.language_model

    model = Wrapped()
    install(model)
    masked = [name for name, module in model.named_modules() if isinstance(module, MaskedProjection)]
    assert masked == [f"language_model.layers.{layer}.mlp.down_proj" for layer in range(LAYERS)]


def test_more_dimensions_of_tokens_are_refused() -> None:
    masked = MaskedProjection(nn.Linear(6, 4), torch.rand(2, 6), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(UnsupportedModelError, match=r"come as \[2, 3, 6\]"):
        masked(torch.randn(2, 3, 6))


def test_a_bias_that_is_added_elsewhere_is_refused_where_outputs_are_masked() -> None:
    model = Model()
    projection = model.layers[2].mlp.down_proj
    projection.skip_bias_add, projection.bias = True, nn.Parameter(torch.ones(HIDDEN))
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.mlp: the bias"):
        install(model, outputs=True)


def test_scales_have_the_dtype_of_activations_not_of_quantised_weights() -> None:
    model = Model()
    first = next(iter(model.layers)).mlp
    first.qweight = nn.Parameter(torch.zeros(2, dtype=torch.int32), requires_grad=False)
    first._parameters = {"qweight": first._parameters["qweight"], **first._parameters}
    model.layers[0].register_parameter("before", nn.Parameter(torch.zeros(1, dtype=torch.int32), requires_grad=False))
    install(model)
    assert {masked.table.dtype for masked in model.modules() if isinstance(masked, MaskedProjection)} == {torch.float32}
