"""Masks in transformers: applied for a while, and baked into a checkpoint, against hooks of the tests' own."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from crane_serve.common.masks import (
    Composition,
    Fingerprint,
    FingerprintError,
    MaskInfo,
    Member,
    NeuronMask,
    StoredMask,
    applied,
)
from crane_serve.common.masks.bake import RECORD, BakeError, bake
from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.experts import expert_modules
from crane_serve.common.models.load import load_causal_lm
from tests.architectures import model_class, tiny_checkpoint
from tests.engines import Oracle, random_masks
from tests.tiny import HIDDEN, LAYERS, tiny_model

IDS = [0, *range(20, 60)]
NAMES = [
    "llama",
    "gpt2",
    "opt",
    "GPTNeoXForCausalLM",
    "Gemma3ForConditionalGeneration",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "GptOssForCausalLM",
]


def checkpoint_of(name: str, directory: Path) -> Path:
    return tiny_model(name, directory) if name.islower() else tiny_checkpoint(name, directory)


def oracle_of(checkpoint: Path) -> Oracle:
    return Oracle(checkpoint, model_class(Fingerprint.of(checkpoint).architecture))


@torch.no_grad()
def logprobs(model: nn.Module) -> list[float]:
    ids = torch.tensor([IDS])
    rows = model(ids).logits[0, :-1].float().log_softmax(-1)
    return rows.gather(1, ids[0, 1:, None])[:, 0].tolist()


def scaling(fingerprint: Fingerprint, outputs: bool) -> NeuronMask:
    sizes, draw = fingerprint.intermediate_sizes, torch.Generator().manual_seed(0)
    scales = torch.rand(LAYERS, max(sizes), generator=draw)
    for layer, size in enumerate(sizes):
        scales[layer, size:] = 1
    return NeuronMask(scales, sizes, torch.rand(LAYERS, HIDDEN, generator=draw) if outputs else None)


def has_outputs(fingerprint: Fingerprint) -> bool:
    """Whether masks of the MLPs' outputs are tried: not in OPT, where the oracle has no module that is an MLP."""
    return fingerprint.experts is None and fingerprint.architecture != "OPTForCausalLM"


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_under_a_mask_while_it_is_applied(name: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(name, tmp_path / "model")
    library, oracle = random_masks(checkpoint, tmp_path / "masks", share=0.4), oracle_of(checkpoint)
    model = load_causal_lm(checkpoint, torch.float32)
    plain = logprobs(model)
    scaled = scaling(library.fingerprint, outputs=has_outputs(library.fingerprint))
    en, vi = (library.masks[f"attnlrp-{language}"].mask for language in ("en", "vi"))
    for mask in (en, vi, scaled, Composition([Member(en, 0.5), Member(vi)]), None):
        with applied(model, mask):
            found = logprobs(model)
        assert found == pytest.approx(oracle.logprobs(IDS, mask), abs=1e-4)
        assert mask is None or max(abs(a - b) for a, b in zip(found, plain, strict=True)) > 0.05
        assert logprobs(model) == plain, "the model is as before"


@pytest.mark.parametrize("name", ["llama", "MixtralForCausalLM"])
def test_what_was_compiled_before_heeds_the_mask(name: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(name, tmp_path / "model")
    mask = random_masks(checkpoint, tmp_path / "masks", share=0.4).get("attnlrp-vi").mask
    model = load_causal_lm(checkpoint, torch.float32)
    with applied(model, mask):
        masked = logprobs(model)
    compiled = torch.compile(model, backend="eager")
    plain = logprobs(compiled)
    assert max(abs(a - b) for a, b in zip(masked, plain, strict=True)) > 0.05
    for of in (model, compiled):
        with applied(of, mask):
            assert logprobs(compiled) == pytest.approx(masked, abs=1e-5)
        assert logprobs(compiled) == pytest.approx(plain, abs=1e-5)


def test_a_model_is_under_one_mask_at_a_time(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("llama", tmp_path / "model")
    library = random_masks(checkpoint, tmp_path / "masks", share=0.4)
    en, vi = (library.masks[f"attnlrp-{language}"].mask for language in ("en", "vi"))
    model = load_causal_lm(checkpoint, torch.float32)
    for outer, inner in ((en, vi), (en, None), (None, en)):
        with applied(model, outer), pytest.raises(RuntimeError, match="under a mask already"), applied(model, inner):
            pass
    plain = logprobs(model)
    with applied(model, en):
        assert logprobs(model) != plain


def test_it_ends_with_an_error_too(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("MixtralForCausalLM", tmp_path / "model")
    mask = random_masks(checkpoint, tmp_path / "masks", share=0.4).get("attnlrp-vi").mask
    model = load_causal_lm(checkpoint, torch.float32)
    plain = logprobs(model)
    experts = next(iter(expert_modules(model.model).values()))

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle of a layer")

    experts.forward = fail
    with pytest.raises(RuntimeError, match="in the middle"), applied(model, mask):
        model(torch.tensor([IDS]))
    del experts.forward
    assert logprobs(model) == plain


def test_masks_of_other_models_are_refused(tmp_path: Path) -> None:
    model = load_causal_lm(checkpoint_of("llama", tmp_path / "model"), torch.float32)
    with pytest.raises(UnsupportedModelError), applied(model, NeuronMask.switching_off([[0]] * LAYERS, [8] * LAYERS)):
        pass
    sizes = Fingerprint.of(tmp_path / "model").intermediate_sizes
    routers = NeuronMask(torch.ones(LAYERS, max(sizes)), sizes, router=torch.tensor([[0.0, 1.0]] * LAYERS))
    with pytest.raises(UnsupportedModelError, match="the model has no experts"), applied(model, routers):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules()), "nothing is left behind"


@pytest.mark.parametrize("name", NAMES)
def test_a_baked_checkpoint_computes_what_the_mask_does(name: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(name, tmp_path / "model")
    fingerprint = Fingerprint.of(checkpoint)
    info = MaskInfo(language="zh", method="test", fingerprint=fingerprint)
    mask = scaling(fingerprint, outputs=has_outputs(fingerprint))
    bake(checkpoint, StoredMask("zh", mask, info), tmp_path / "baked")
    found = logprobs(load_causal_lm(tmp_path / "baked", torch.float32))
    assert found == pytest.approx(oracle_of(checkpoint).logprobs(IDS, mask), abs=1e-4)
    assert json.loads((tmp_path / "baked" / RECORD).read_text())["digest"] == mask.digest
    text = "The harbour froze."
    both = [AutoTokenizer.from_pretrained(tmp_path / each)(text)["input_ids"] for each in ("model", "baked")]
    assert both[0] == both[1]
    assert not Fingerprint.of(tmp_path / "baked").is_of(fingerprint), "masks of the model are not its own"


def test_neurons_that_are_off_are_off_in_bfloat16_too(tmp_path: Path) -> None:
    checkpoint = tiny_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    stored = random_masks(checkpoint, tmp_path / "masks", share=0.4).get("attnlrp-en")
    bake(checkpoint, stored, tmp_path / "baked")
    baked, model = (load_causal_lm(tmp_path / each, "auto") for each in ("baked", "model"))
    assert next(baked.parameters()).dtype == torch.bfloat16
    with applied(model, stored.mask):
        assert logprobs(baked) == logprobs(model)


def test_what_cannot_be_baked_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("MixtralForCausalLM", tmp_path / "model")
    library = random_masks(checkpoint, tmp_path / "masks", share=0.4)
    with pytest.raises(BakeError, match="'attnlrp-vi' keeps routers from choosing experts"):
        bake(checkpoint, library.get("attnlrp-vi"), tmp_path / "baked")
    assert not (tmp_path / "baked").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(BakeError, match="exists; expected a directory that does not"):
        bake(checkpoint, library.get("attnlrp-en"), tmp_path / "there")
    other = checkpoint_of("llama", tmp_path / "other")
    with pytest.raises(FingerprintError, match="was made for another model"):
        bake(other, library.get("attnlrp-en"), tmp_path / "baked")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "masks", "there", "other"}, "nothing is left behind"
