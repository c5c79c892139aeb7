"""Relevance of models without a family: activations and plain gradients, where the structure shows the neurons."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, XLMConfig, XLMWithLMHeadModel

from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.families import available, decoder_of
from crane_serve.common.models.mlps import intermediate_sizes
from crane_serve.common.text.corpus import Corpus, Document
from relevance.encoding import Batch
from relevance.method import Measured, MethodError, lacking
from relevance.methods import find_scored
from relevance.methods.gradient import Gradient
from relevance.methods.lape import Lape
from relevance.methods.magnitude import Magnitude
from relevance.model import load_model
from relevance.model_passes import ModelPasses, units_of
from relevance.proof import prove_logits
from relevance.scoring import score
from relevance.search.learning import Learning, learn_scores
from tests.architectures import model_class, tiny_checkpoint, tiny_config
from tests.tiny import LAYERS, NEURONS, mlp_projections

CPU = torch.device("cpu")
WITHOUT_FAMILY = (
    "ApertusForCausalLM",
    "BitNetForCausalLM",
    "BloomForCausalLM",
    "FalconForCausalLM",
    "Gemma4ForCausalLM",
    "GPTBigCodeForCausalLM",
    "GPTNeoXForCausalLM",
    "HyperCLOVAXForCausalLM",
    "MiniCPM3ForCausalLM",
)
WITH_FAMILY = (
    "Gemma3ForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "CohereForCausalLM",
    "GraniteForCausalLM",
    "PhiForCausalLM",
    "VaultGemmaForCausalLM",
)
# Config settings that only a model which heeds them computes right.
_TELLING: dict[str, dict[str, Any]] = {
    "CohereForCausalLM": {"logit_scale": 0.25},
    "Gemma4ForCausalLM": {"final_logit_softcapping": 5.0},
    "GraniteForCausalLM": {"logits_scaling": 4.0},
    "HyperCLOVAXForCausalLM": {"logits_scaling": 4.0},
    "VaultGemmaForCausalLM": {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0},
}
_ROWS = ([0, 7, 9, 30, 31, 32], [0, 99, 4])


def model_of(architecture: str, **settings: Any) -> nn.Module:
    torch.manual_seed(1)
    config = tiny_config(architecture)
    for name, value in {**_TELLING.get(architecture, {}), **settings}.items():
        setattr(config, name, value)
    model = model_class(architecture).from_config(config, dtype=torch.float32, attn_implementation="eager")
    assert type(model).__name__ == architecture
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model.eval().requires_grad_(False)


@pytest.fixture(params=(*WITHOUT_FAMILY, *WITH_FAMILY))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return model_of(request.param)


def _neurons(model: nn.Module) -> int:
    return decoder_of(model).sizes[0]


def by_hand(model: nn.Module, rows: Sequence[Sequence[int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Per layer the mean over documents of sum over tokens of a * d(mean log p)/da, and the mean over tokens of |a|."""
    relevance, magnitude = ([torch.zeros(_neurons(model)) for _ in range(LAYERS)] for _ in range(2))
    for row in rows:
        neurons: list[Tensor] = []
        hooks = [
            projection.register_forward_pre_hook(lambda _, inputs, kept=neurons: _kept(inputs[0], kept))
            for _, projection in mlp_projections(model)
        ]
        ids = torch.tensor([list(row)])
        mean = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).mean()
        gradients = _gradients(mean, neurons, hooks)
        for layer, (value, gradient) in enumerate(zip(neurons, gradients, strict=True)):
            counted = value.detach().flatten(0, -2)[1:]
            relevance[layer] += (counted * gradient.flatten(0, -2)[1:]).sum(0) / len(rows)
            magnitude[layer] += counted.abs().sum(0) / sum(len(each) - 1 for each in rows)
    return relevance, magnitude


def _kept(value: Tensor, kept: list[Tensor]) -> tuple[Tensor]:
    kept.append(value if value.requires_grad else value.detach().requires_grad_())
    return (kept[-1],)


def _gradients(target: Tensor, neurons: Sequence[Tensor], hooks: Sequence[Any]) -> Sequence[Tensor]:
    for hook in hooks:
        hook.remove()
    return torch.autograd.grad(target, neurons)


def test_gradients_and_magnitudes_are_those_of_the_model(model: nn.Module) -> None:
    decoder = decoder_of(model)
    prove_logits(model, decoder)
    methods: list[Measured] = [Gradient(units_of(decoder)), Magnitude(units_of(decoder))]
    with ModelPasses(model) as passes:
        passes.run(Batch.of([list(row) for row in _ROWS], CPU), methods)
    relevance, magnitude = by_hand(model, _ROWS)
    torch.testing.assert_close(methods[0].finalise().float(), torch.stack(relevance), atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(methods[1].finalise().float(), torch.stack(magnitude), atol=1e-6, rtol=1e-4)
    assert all(float(of_layer.abs().max()) > 1e-4 for of_layer in relevance)


@pytest.mark.parametrize("architecture", ["BitNetForCausalLM", "GraniteForCausalLM", "PhiForCausalLM"])
def test_masks_are_learned(architecture: str) -> None:
    decoder = decoder_of(model_of(architecture))
    documents = {"en": [list(_ROWS[0])], "zh": [list(_ROWS[1])]}
    learned = learn_scores(decoder, documents, Learning(neurons=8, steps=2))
    assert {name: tuple(of.shape) for name, of in learned.items()} == dict.fromkeys(documents, (LAYERS, NEURONS))
    assert all(bool(of.any()) for of in learned.values())


def test_what_a_method_needs_is_named(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("HyperCLOVAXForCausalLM", tmp_path / "model")
    corpus = Corpus({"en": (Document("a", "abc"),), "zh": (Document("a", "汉字"),)})
    options: dict[str, Any] = {"batch_tokens": 64, "max_tokens": 64, "dtype": torch.float32, "device": CPU}
    known = ", ".join(available())
    for name, needed in (
        ("attnlrp", "the places of norms, attention and MLP, at which its rules act"),
        ("crane", "the places of norms"),
        ("plnd", "the up projection of the MLP"),
    ):
        with pytest.raises(
            MethodError, match=rf"method {name} needs to know {needed}.* Of HyperCLOVAXForCausalLM only .*{known}"
        ):
            score(checkpoint, corpus, find_scored([name]), **options)
    names = ["average-precision", "gradient", "lape", "magnitude", "random"]
    scores = score(checkpoint, corpus, find_scored(names), **options)
    assert list(scores.by_method) == names


def test_without_names_the_methods_are_those_that_need_no_family() -> None:
    names = [kind.name for kind in find_scored(None, "HyperCLOVAXForCausalLM")]
    assert names == ["average-precision", "gradient", "lape", "magnitude", "random", "routing"]
    of_experts = {kind.name for kind in find_scored(None, "LlamaForCausalLM")} - {
        kind.name for kind in find_scored(None)
    }
    assert of_experts == {"routing"}  # which commands leave out for models that have none


def test_logits_that_are_something_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = model_of("GraniteForCausalLM")
    prove_logits(model, decoder_of(model))
    model.config.logits_scaling = 1.0
    decoder = decoder_of(model)
    model.config.logits_scaling = 4.0
    with pytest.raises(UnsupportedModelError, match="GraniteForCausalLM: log-probabilities of its parts differ from"):
        prove_logits(model, decoder)


def test_families_are_proved_too(tmp_path: Path) -> None:
    for architecture in available():
        load_model(tiny_checkpoint(architecture, tmp_path / architecture), torch.float32, CPU)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: XLMWithLMHeadModel(XLMConfig(n_words=99, emb_dim=16, n_layers=1, n_heads=2)), "later tokens|MLP"),
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1)), "found MLPs in"),
    ],
)
def test_what_is_no_causal_decoder_with_mlps_is_refused(model: Callable[[], nn.Module], message: str) -> None:
    made = model().eval()
    with pytest.raises(UnsupportedModelError, match=message):
        prove_logits(made, decoder_of(made))


def test_layers_that_are_twice_as_wide(tmp_path: Path) -> None:
    config: Any = tiny_config("Gemma4ForCausalLM")
    config.num_kv_shared_layers, config.use_double_wide_mlp = 1, True
    assert intermediate_sizes(config, LAYERS) == (NEURONS,) * (LAYERS - 1) + (2 * NEURONS,)


def test_the_activation_function_may_be_unknown() -> None:
    model: Any = model_of("HyperCLOVAXForCausalLM")
    for layer in model.model.layers:
        act = layer.mlp.act_fn
        del layer.mlp.act_fn
        layer.mlp.forward = lambda x, mlp=layer.mlp, act=act: mlp.down_proj(act(mlp.gate_proj(x)) * mlp.up_proj(x))
    decoder = decoder_of(model)
    assert [layer.groups[0].act_fn for layer in decoder.layers] == [None] * LAYERS
    assert lacking(Lape, decoder) == "the activation function of the MLP, as a module"
    assert lacking(Magnitude, decoder) is None
