"""Finding the MLPs of a transformers model; of vLLM's, see tests/engine/test_masked_mlp.py."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3Config, MixtralConfig

from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.mlps import find_mlps, language_model, require_mlps
from tests.tiny import FAMILIES, LAYERS, NEURONS, mlp_projections

SIZES = (NEURONS,) * LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_the_projections_of_every_family(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES[family](LAYERS))
    mlps = require_mlps(language_model(model), SIZES)
    assert [mlp.projection for mlp in mlps.values()] == [projection for _, projection in mlp_projections(model)]
    assert [mlp.is_own_module for mlp in mlps.values()] == [family != "opt"] * LAYERS


def test_a_model_without_them_is_refused() -> None:
    with torch.device("meta"):
        decoder = language_model(AutoModelForCausalLM.from_config(FAMILIES["llama"](2)))
    with pytest.raises(UnsupportedModelError, match=r"in layers \[0, 1\], expected one in each of layers 0 to 2"):
        require_mlps(decoder, SIZES)
    with pytest.raises(UnsupportedModelError, match=r"its 150 neurons.* it has .*layers\.0\.mlp\.down_proj 160 to 64"):
        require_mlps(decoder, (150, 150))


def test_layers_may_differ_in_size() -> None:
    class Layer(nn.Module):
        def __init__(self, neurons: int) -> None:
            super().__init__()
            self.fc_in, self.fc_out = nn.Linear(8, neurons), nn.Linear(neurons, 8)

    decoder = nn.ModuleList([Layer(16), Layer(24)])
    assert list(require_mlps(decoder, (16, 24))) == [0, 1]
    assert list(find_mlps(decoder, (16, 16))) == [0]
    assert list(require_mlps(decoder, (16, 16), elsewhere=[1])) == [0]


def test_a_mixture_of_experts_is_refused() -> None:
    config = MixtralConfig(hidden_size=64, intermediate_size=NEURONS, num_hidden_layers=1, vocab_size=10)
    with torch.device("meta"):
        decoder = language_model(AutoModelForCausalLM.from_config(config))
    with pytest.raises(UnsupportedModelError, match="belongs to a mixture of experts"):
        find_mlps(decoder, (NEURONS,))


def test_a_vision_tower_is_no_part_of_the_language_model() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": NEURONS, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    config = Gemma3Config(text_config=FAMILIES["gemma3"](LAYERS).to_dict(), vision_config=sizes)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    names = [name for name, module in model.named_modules() if "vision" in name and isinstance(module, nn.Linear)]
    assert names
    mlps = require_mlps(language_model(model), SIZES)
    inside = {id(module) for name, module in model.named_modules() if "vision" not in name}
    assert all(id(mlp.projection) in inside for mlp in mlps.values())
