"""Mixtures of experts: their neurons in fingerprints, mask files, transformers' modules and methods."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from crane_serve.common.masks import Fingerprint, MaskFileError, MaskInfo, NeuronMask, StoredMask, decode_mask
from crane_serve.common.masks.files import encode_mask
from crane_serve.common.masks.transfer import TransferError, transferred
from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.experts import Experts, expert_modules, experts_of
from crane_serve.common.models.families import available, decoder_of
from crane_serve.common.models.open_experts import open_experts
from crane_serve.common.text.corpus import Corpus, Document
from crane_serve.sizing import ModelSizes
from relevance.causal import losses, masked
from relevance.encoding import Batch
from relevance.method import Activations, Gradients, MethodError, OfActivations, OfGradients, Site, require_known
from relevance.methods import find_scored
from relevance.methods.attnlrp import AttnLRP
from relevance.methods.crane import Crane
from relevance.methods.gradient import Gradient
from relevance.methods.lape import Lape
from relevance.methods.magnitude import Magnitude
from relevance.model import load_model
from relevance.model_passes import ModelPasses, units_of
from relevance.rules import ATTNLRP, propagation
from relevance.scoring import score
from tests.architectures import EXPERT_NEURONS, model_class, tiny_checkpoint
from tests.decoders import random_decoder
from tests.engines import Oracle, random_masks
from tests.experts import dense_by_layer, expert_neurons, experts_by_layer
from tests.tiny import HIDDEN, LAYERS, NEURONS

CPU = torch.device("cpu")
DOCUMENTS = [[0, *range(20, 60)], [0, 7, *range(90, 99)]]
# With and without shared experts, dense layers before, biases, transposed weights, a gate of another form.
SHAPES = {
    "MixtralForCausalLM": ((4 * NEURONS,) * 3, Experts(count=4, size=NEURONS, layers=(0, 1, 2))),
    "Qwen2MoeForCausalLM": (
        (NEURONS + 4 * EXPERT_NEURONS,) * 3,
        Experts(count=4, size=EXPERT_NEURONS, layers=(0, 1, 2)),
    ),
    "Glm4MoeForCausalLM": (
        (NEURONS, 5 * EXPERT_NEURONS, 5 * EXPERT_NEURONS),
        Experts(count=4, size=EXPERT_NEURONS, layers=(1, 2)),
    ),
    "GptOssForCausalLM": ((4 * NEURONS,) * 3, Experts(count=4, size=NEURONS, layers=(0, 1, 2))),
}


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request, tmp_path_factory) -> Path:
    return tiny_checkpoint(request.param, tmp_path_factory.mktemp("experts") / request.param)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    return tiny_checkpoint("MixtralForCausalLM", tmp_path_factory.mktemp("experts") / "mixtral")


def test_the_fingerprint_counts_the_neurons_of_experts(checkpoint: Path) -> None:
    fingerprint = Fingerprint.of(checkpoint)
    sizes, experts = SHAPES[fingerprint.architecture]
    assert (fingerprint.intermediate_sizes, fingerprint.experts) == (sizes, experts)
    assert ModelSizes.of(checkpoint).neurons == sizes
    assert Fingerprint.model_validate_json(fingerprint.model_dump_json()) == fingerprint


def test_a_dense_fingerprint_is_written_as_before(tmp_path: Path) -> None:
    dense = Fingerprint.of(tiny_checkpoint("Qwen3ForCausalLM", tmp_path / "dense"))
    assert "experts" not in dense.model_dump(mode="json")
    assert dense.dense_sizes == dense.intermediate_sizes


def random_mask(fingerprint: Fingerprint) -> NeuronMask:
    sizes = fingerprint.intermediate_sizes
    scales = torch.rand(len(sizes), max(sizes), generator=torch.Generator().manual_seed(0))
    for layer, size in enumerate(sizes):
        scales[layer, size:] = 1
    return NeuronMask(scales, sizes)


def encoded(fingerprint: Fingerprint) -> tuple[NeuronMask, bytes]:
    mask = random_mask(fingerprint)
    return mask, encode_mask("zh", mask, MaskInfo(language="zh", method="test", fingerprint=fingerprint))


def test_a_mask_file_has_experts_in_a_tensor_of_their_own(checkpoint: Path) -> None:
    fingerprint = Fingerprint.of(checkpoint)
    mask, content = encoded(fingerprint)
    tensors, experts = load(content), fingerprint.experts
    assert experts is not None
    assert tensors["experts"].shape == (LAYERS, experts.count, experts.size)
    assert tensors["intermediate"].shape == (LAYERS, max(fingerprint.dense_sizes))
    layer, first = LAYERS - 1, fingerprint.dense_sizes[-1] + 2 * experts.size  # of the third expert
    assert torch.equal(tensors["experts"][layer, 2], mask.intermediate[layer, first : first + experts.size])
    stored = decode_mask("zh", content, source="the file")
    assert stored.mask.digest == mask.digest
    assert stored.info.fingerprint == fingerprint


def header(content: bytes) -> dict[str, str]:
    import json

    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def with_tensors(content: bytes, **changed: Tensor | None) -> bytes:
    tensors = {name: tensor for name, tensor in {**load(content), **changed}.items() if tensor is not None}
    return save(tensors, metadata=header(content))


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    fingerprint = Fingerprint.of(tiny_checkpoint("Glm4MoeForCausalLM", tmp_path / "glm"))
    _, content = encoded(fingerprint)
    experts, dense = load(content)["experts"], load(content)["intermediate"]
    elsewhere = experts.clone()
    elsewhere[0, 0, 0] = 0  # the first layer has none
    beyond = dense.clone()
    beyond[1, -1] = 0
    for changed, problem in (
        ({"experts": None}, r"expected 'intermediate' and 'experts'"),
        ({"experts": experts[:, :3].clone()}, r"'experts' has shape \[3, 3, 32\]"),
        ({"experts": experts.int()}, "dtype torch.int32, expected"),
        ({"intermediate": dense[:, :5].clone()}, r"'intermediate' has shape \[3, 5\]"),
        ({"experts": elsewhere}, "layer 0 has scales of neurons that the model does not have"),
        ({"intermediate": beyond}, "layer 1 has scales of neurons that the model does not have"),
        ({"experts": experts * float("nan")}, "not finite|does not have"),
        ({"experts": experts * 0.5}, "digest|does not have"),
    ):
        with pytest.raises(MaskFileError, match=problem):
            decode_mask("zh", with_tensors(content, **changed), source="the file")


def test_a_model_whose_experts_do_not_fit_its_layers_is_refused(mixtral: Path) -> None:
    fingerprint = Fingerprint.of(mixtral)
    _, content = encoded(fingerprint)
    for layers in ((0, 1, 7), (0,), (1, 0, 2), (0, 0, 1)):
        other = Experts.model_construct(count=4, size=NEURONS, layers=layers).model_dump_json()
        text = header(content)["crane"].replace(fingerprint.experts.model_dump_json(), other)
        assert other in text
        with pytest.raises(MaskFileError, match=r"has shape|do not fit its layers|does not have|in ascending order"):
            decode_mask("zh", save(load(content), metadata={"crane": text}), source="the file")


def test_experts_of_different_shapes_are_refused() -> None:
    class Held(nn.Module):
        def __init__(self, neurons: int) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(4, HIDDEN, neurons))

    decoder = nn.ModuleDict({"layers": nn.ModuleList([Held(8), Held(16)])})
    with pytest.raises(UnsupportedModelError, match="experts of different shapes"):
        experts_of(decoder, HIDDEN)
    with pytest.raises(UnsupportedModelError, match="expected 65 to be one of them"):
        experts_of(decoder, HIDDEN + 1)


def test_masked_losses_are_those_of_an_oracle(checkpoint: Path, tmp_path: Path) -> None:
    architecture = Fingerprint.of(checkpoint).architecture
    oracle = Oracle(checkpoint, model_class(architecture))
    mask = random_masks(checkpoint, tmp_path, share=0.3).get("attnlrp-en").mask
    decoder = decoder_of(load_model(checkpoint, torch.float32, CPU))
    assert decoder.sizes == mask.intermediate_sizes
    for of in (None, mask):
        with masked(decoder, of):
            found = losses(decoder, DOCUMENTS, 4096).nats
        expected = [-sum(oracle.logprobs(ids, of)) for ids in DOCUMENTS]
        assert found == pytest.approx(expected, abs=1e-3)
    assert abs(expected[0] + sum(oracle.logprobs(DOCUMENTS[0], None))) > 0.1, "the mask matters"


def test_statistics_are_those_of_experts_computed_token_by_token(checkpoint: Path) -> None:
    model = load_model(checkpoint, torch.float32, CPU)
    decoder = decoder_of(model)
    units = units_of(decoder)
    (ids,) = DOCUMENTS[:1]
    methods = [Magnitude(units), Gradient(units)]
    with ModelPasses(model) as passes:
        passes.run(Batch.of([ids], CPU), methods)
    measured, gradients = (method.finalise() for method in methods)
    plain = model_class(type(model).__name__).from_pretrained(checkpoint, dtype=torch.float32).eval()
    neurons = observed(plain, ids)  # by layer, [tokens, neurons], with gradients
    for layer, (of_layer, gradient) in neurons.items():
        counted = of_layer.detach()[1:]
        assert torch.allclose(measured[layer, : counted.shape[1]].float(), counted.abs().mean(0), atol=1e-5)
        effects = (of_layer.detach() * gradient)[1:].sum(0)
        assert torch.allclose(gradients[layer, : counted.shape[1]].float(), effects, atol=1e-5)


def observed(model, ids: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """Neurons of each layer and their gradients of the mean log-probability; the router's weights held fixed."""
    dense, experts = dense_by_layer(model), experts_by_layer(model)
    kept: dict[tuple[int, bool], Tensor] = {}
    hooks = []
    for layer, module in dense.items():

        def keep(_, inputs, layer=layer):
            kept[layer, False] = inputs[0].reshape(len(ids), -1)
            inputs[0].retain_grad()
            kept[layer, False] = inputs[0]

        hooks.append(module.register_forward_pre_hook(keep))
    for layer, module in experts.items():

        def hold(tensor: Tensor, layer=layer) -> None:
            tensor.retain_grad()
            kept[layer, True] = tensor

        module.forward = expert_neurons(module, hold)
    embeddings = model.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()
    logprobs = model(inputs_embeds=embeddings, use_cache=False).logits[0].log_softmax(-1)
    logprobs[:-1].gather(1, torch.tensor(ids)[1:, None]).mean().backward()
    found = {}
    for layer in range(LAYERS):
        parts = [kept[place] for place in ((layer, False), (layer, True)) if place in kept]
        values = torch.cat([part.reshape(len(ids), -1) for part in parts], dim=1)
        gradients = torch.cat([part.grad.reshape(len(ids), -1) for part in parts], dim=1)
        found[layer] = values, gradients
    return found


def test_lape_counts_the_tokens_that_an_expert_has(mixtral: Path) -> None:
    """A neuron of an expert that a token does not have is not active in it."""
    model = load_model(mixtral, torch.float32, CPU)
    decoder = decoder_of(model)
    lape = Lape(units_of(decoder))
    seen = {}
    first = expert_modules(decoder.trunk)[0]
    original = first.forward

    def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        seen["hidden"], seen["ids"] = hidden, ids
        return original(hidden, ids, weights)

    first.forward = forward
    with ModelPasses(model) as passes:
        passes.run(Batch.of(DOCUMENTS[:1], CPU), [lape])
    active = torch.zeros(4, NEURONS)
    for hidden, ids in zip(seen["hidden"][1:], seen["ids"][1:].tolist(), strict=True):
        for expert in ids:
            gate = first.gate_up_proj[expert, :NEURONS] @ hidden
            active[expert] += torch.nn.functional.silu(gate) > 0
    shares = active.flatten() / (len(DOCUMENTS[0]) - 1)
    assert torch.allclose(lape.finalise()[0].float(), shares.detach(), atol=1e-6)


def test_lape_needs_to_know_the_activation_function(tmp_path: Path) -> None:
    from relevance.method import lacking

    decoder = decoder_of(load_model(tiny_checkpoint("GptOssForCausalLM", tmp_path / "oss"), torch.float32, CPU))
    assert lacking(Lape, decoder) == "the activation function of the MLP, as a module"
    assert lacking(Magnitude, decoder) is None


KNOWN = [architecture for architecture in SHAPES if architecture in available()]


class Kept(OfActivations):
    name = "kept"
    reads = frozenset({"act", "up"})

    def accumulate(self, activations: Activations) -> None:
        vars(self).setdefault("seen", {})[activations.layer] = activations

    def finalise(self) -> Tensor:
        return torch.zeros(0)


@pytest.mark.parametrize("architecture", KNOWN)
def test_acts_and_ups_of_experts_are_0_where_a_token_does_not_have_them(architecture: str) -> None:
    model = random_decoder(architecture, dtype=torch.float64).requires_grad_(False)
    decoder, routed = decoder_of(model), {}
    for layer, module in expert_modules(decoder.trunk).items():
        module.register_forward_pre_hook(lambda _, inputs, layer=layer: routed.update({layer: inputs[:2]}))
    kept = Kept(units_of(decoder))
    with ModelPasses(model) as passes:
        passes.run(Batch.of(DOCUMENTS[:1], CPU), [kept])
    for layer, (hidden, ids) in routed.items():
        experts, seen = expert_modules(decoder.trunk)[layer], kept.seen[layer]
        columns = decoder.layers[layer].groups[-1].columns
        for token, chosen in enumerate(ids.tolist()):
            products = torch.stack([weight @ hidden[token] for weight in experts.gate_up_proj])  # [experts, 2 neurons]
            products[[expert not in chosen for expert in range(len(products))]] = 0
            gate, up = products.chunk(2, dim=1)
            act = torch.nn.functional.silu(gate)
            for found, expected in ((seen.act, act), (seen.up, up), (seen.neurons, act * up)):
                torch.testing.assert_close(found[0, token, columns], expected.flatten())


@pytest.mark.parametrize("architecture", KNOWN)
def test_rows_of_experts_are_sums_of_the_gradients_of_their_weights(architecture: str) -> None:
    model = random_decoder(architecture, dtype=torch.float64).requires_grad_(False)
    decoder = decoder_of(model)
    (ids,) = DOCUMENTS[:1]
    modules = expert_modules(decoder.trunk)
    weights = [module.gate_up_proj.requires_grad_() for module in modules.values()]
    with propagation(model, ATTNLRP):
        logits = model(torch.tensor([ids])).logits[0, :-1]
        gradients = torch.autograd.grad(logits.gather(1, torch.tensor(ids)[1:, None]).mean(), weights)
    model.requires_grad_(False)
    rows: dict[tuple[int, Site], Tensor] = {}

    class Rows(OfGradients):
        name = "rows"
        source = Crane.source
        sites = frozenset({Site.GATE, Site.UP})

        def accumulate(self, gradients: Gradients) -> None:
            rows[gradients.layer, gradients.site] = Crane.rows(gradients)[0]

        def finalise(self) -> Tensor:
            return torch.zeros(0)

    with ModelPasses(model) as passes:
        passes.run(Batch.of([ids], CPU), [Rows(units_of(decoder))])
    for layer, gradient in zip(modules, gradients, strict=True):
        columns = decoder.layers[layer].groups[-1].columns
        for site, of_site in zip((Site.GATE, Site.UP), gradient.chunk(2, dim=1), strict=True):
            assert of_site.any()
            torch.testing.assert_close(rows[layer, site][columns], of_site.sum(dim=2).flatten())


def test_rules_are_refused_by_name_without_a_family(tmp_path: Path) -> None:
    decoder = decoder_of(load_model(tiny_checkpoint("GptOssForCausalLM", tmp_path / "oss"), torch.float32, CPU))
    with pytest.raises(MethodError, match=r"attnlrp needs to know the places of norms.*Of GptOssForCausalLM only"):
        require_known([AttnLRP], decoder, "GptOssForCausalLM")


def test_all_methods_score_a_mixture(mixtral: Path) -> None:
    texts = {"aa": ("one", "two", "three", "four"), "bb": ("1", "22", "333", "4444")}
    corpus = Corpus({name: tuple(Document(of, of) for of in each) for name, each in texts.items()})
    options: dict[str, Any] = {"batch_tokens": 64, "max_tokens": 64, "dtype": torch.float32, "device": CPU}
    scores = score(mixtral, corpus, find_scored(["all"], "MixtralForCausalLM"), **options)
    assert "routing" in scores.by_method
    for name, of_method in scores.by_method.items():
        assert of_method.shape == (2, LAYERS, 4 * NEURONS)
        assert bool((of_method != 0).any(dim=2).all()), name
    with pytest.raises(MethodError, match="MixtralForCausalLM has experts; output dimensions"):
        score(mixtral, corpus, [Crane], output_dimensions=True, **options)


def test_opening_twice_is_opening_once(mixtral: Path) -> None:
    model = load_model(mixtral, torch.float32, CPU)
    assert decoder_of(model).layers == decoder_of(model).layers


def test_a_file_with_other_metadata_is_refused_before_it_is_read_closely(mixtral: Path) -> None:
    fingerprint = Fingerprint.of(mixtral)
    _, content = encoded(fingerprint)
    sizes = str(list(fingerprint.intermediate_sizes)).replace(" ", "")
    many = header(content)["crane"].replace(sizes, str([0] * 50_000).replace(" ", ""))
    assert many != header(content)["crane"]
    with pytest.raises(MaskFileError, match="not one intermediate size for each layer"):
        decode_mask("zh", save(load(content), metadata={"crane": many}), source="the file")


def test_outputs_are_not_known_for_experts(mixtral: Path) -> None:
    fingerprint = Fingerprint.of(mixtral)
    mask = random_mask(fingerprint)
    mask = NeuronMask(mask.intermediate, mask.intermediate_sizes, torch.ones(LAYERS, HIDDEN))
    with pytest.raises(MaskFileError, match="'output' is not known for models with experts"):
        encode_mask("zh", mask, MaskInfo(language="zh", method="test", fingerprint=fingerprint))


def test_masks_do_not_move_to_other_experts_of_the_same_number_of_neurons(mixtral: Path) -> None:
    fingerprint = Fingerprint.of(mixtral)
    other = fingerprint.model_copy(update={"experts": Experts(count=2, size=2 * NEURONS, layers=(0, 1, 2))})
    stored = StoredMask("zh", random_mask(fingerprint), MaskInfo(language="zh", method="test", fingerprint=fingerprint))
    with pytest.raises(TransferError, match="experts"):
        transferred(stored, other)


def test_experts_that_do_more_than_their_parts_are_not_opened(mixtral: Path) -> None:
    model = load_model(mixtral, torch.float32, CPU)
    (first, *_) = expert_modules(model).values()
    fresh = type(first)(model.config)
    for name, parameter in first.named_parameters(recurse=False):
        setattr(fresh, name, parameter)
    open_experts(fresh)
    other = type("More", (type(first),), {"forward": lambda self, *inputs: 2 * type(first).forward(self, *inputs)})
    more = other(model.config)
    for name, parameter in first.named_parameters(recurse=False):
        setattr(more, name, parameter)
    with pytest.raises(UnsupportedModelError, match="does more than its parts show"):
        open_experts(more)


def test_experts_of_mixers_are_refused() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(4, HIDDEN, 8))

    decoder = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mixer": Mixer()})])})
    with pytest.raises(UnsupportedModelError, match="in a place that mixes tokens"):
        expert_modules(decoder)
