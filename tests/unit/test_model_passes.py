import weakref
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from crane_serve.common.models.errors import CheckpointError
from crane_serve.common.models.families import take_apart
from crane_serve.common.text.corpus import Corpus, CorpusError, Document
from relevance.accumulators import NonFiniteError
from relevance.commands import relevance, select
from relevance.encoding import Batch, EncodedDocuments, batches, encode
from relevance.method import (
    Activations,
    AttributionTarget,
    Gradients,
    Measured,
    MethodError,
    OfActivations,
    OfGradients,
    Pass,
    Site,
)
from relevance.methods import find_scored, scored
from relevance.methods.attnlrp import AttnLRP
from relevance.methods.crane import Crane
from relevance.methods.crane_textbook import CraneTextbook
from relevance.methods.lape import Lape
from relevance.model import ModelOptionError, load_model, load_skeleton, pick_device, pick_dtype
from relevance.model_passes import ModelPasses, by_pass, last_hidden, units_of
from relevance.rules import ATTNLRP, PLAIN, RELP, Rules, propagation, soft_cap
from relevance.scores import Scores
from relevance.scoring import score
from relevance.targets import log_probabilities, per_document, target_logits
from tests.decoders import MIXTURES, random_decoder
from tests.tiny import tiny_model

CPU = torch.device("cpu")
SIZES = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; BOS is 0, EOS is 1."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    return LlamaForCausalLM(config).eval()


def tiny_gemma() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **SIZES,
        num_attention_heads=4,
        num_key_value_heads=1,
        initializer_range=0.3,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    return Gemma3ForCausalLM(config).eval()


def tiny_gemma_with_a_cap() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    config = Gemma2Config(
        **SIZES,
        num_attention_heads=4,
        num_key_value_heads=1,
        initializer_range=0.5,
        final_logit_softcapping=2.0,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config).eval()


def documents_of_lengths(*lengths: int) -> EncodedDocuments:
    generator = torch.Generator().manual_seed(7)
    return EncodedDocuments(
        tuple([0, *torch.randint(2, 258, (length - 1,), generator=generator).tolist()] for length in lengths)
    )


def write_checkpoint(directory: Path, model: nn.Module) -> Path:
    model.save_pretrained(directory)  # type: ignore[operator]
    byte_tokenizer().save_pretrained(directory)
    return directory


def small_corpus() -> Corpus:
    texts = {
        "en": ("The cat sat.", "It rained all day.", "No.", "Perhaps"),
        "zh": ("猫坐着。", "下雨。", "不，今天不行。", "也许"),
    }
    return Corpus({lang: tuple(Document(str(i), text) for i, text in enumerate(of)) for lang, of in texts.items()})


def test_encoding_begins_with_bos_cuts_and_skips() -> None:
    documents = [Document("a", "abcdef"), Document("b", ""), Document("c", "ab")]
    encoded = encode(byte_tokenizer(), "en", documents, max_tokens=4, vocabulary=512)
    assert [len(ids) for ids in encoded.token_ids] == [4, 3]
    assert all(ids[0] == 0 for ids in encoded.token_ids)
    assert (encoded.skipped, encoded.truncated, encoded.tokens) == (("b",), ("a",), 5)
    with pytest.raises(CorpusError, match="no document of en has a token to predict"):
        encode(byte_tokenizer(), "en", documents[1:2], max_tokens=4, vocabulary=512)


def test_batches_keep_to_their_budget_and_lose_nothing() -> None:
    documents = documents_of_lengths(5, 30, 7, 2, 9, 5).token_ids
    found = list(batches(documents, batch_tokens=20, device=CPU))
    assert [tuple(batch.token_ids.shape) for batch in found] == [(1, 30), (2, 9), (3, 5)]
    rows = [
        row[:length].tolist() for batch in found for row, length in zip(batch.token_ids, batch.lengths, strict=True)
    ]
    assert sorted(rows) == sorted(documents)
    assert sum(int(batch.counted.sum()) for batch in found) == sum(len(ids) - 1 for ids in documents)
    assert not any(bool(batch.counted[:, 0].any()) for batch in found)


def batch_of(*lengths: int) -> Batch:
    return Batch.of(documents_of_lengths(*lengths).token_ids, CPU)


BUILDS = [tiny_llama, tiny_gemma, tiny_gemma_with_a_cap]


@pytest.mark.parametrize("build", BUILDS)
def test_target_logits_are_those_of_the_whole_vocabulary(build: type[nn.Module]) -> None:
    model = build().double()
    decoder = take_apart(model)
    documents = documents_of_lengths(12, 5, 2).token_ids
    batch = Batch.of(documents, CPU)
    hidden = last_hidden(decoder, decoder.embedding(batch.token_ids))
    logits, logs = target_logits(decoder, hidden, batch), log_probabilities(decoder, hidden, batch)
    assert not logits[~batch.counted[:, 1:]].any()
    assert not logs[~batch.counted[:, 1:]].any()
    for index, ids in enumerate(documents):
        token_ids = torch.tensor(ids)
        every = model(token_ids[None]).logits[0, :-1]
        expected = every.gather(1, token_ids[1:, None])
        torch.testing.assert_close(per_document(logits, batch)[index], expected.mean())
        torch.testing.assert_close(logits[index, : len(ids) - 1], expected.squeeze(1))
        expected = every.log_softmax(dim=1).gather(1, token_ids[1:, None]).squeeze(1)
        torch.testing.assert_close(logs[index, : len(ids) - 1], expected)


@pytest.mark.parametrize("rules", [PLAIN, RELP])
@pytest.mark.parametrize("build", BUILDS)
def test_gradients_of_log_probabilities_over_several_blocks(
    build: type[nn.Module], rules: Rules, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relevance.targets.VOCABULARY_BLOCK", 100)
    decoder = take_apart(build().double())
    batch = batch_of(9, 4)
    torch.manual_seed(1)
    hidden = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 8, dtype=torch.float64)
    (found,) = torch.autograd.grad((log_probabilities(decoder, hidden, batch, rules) * weights).sum(), hidden)
    logits = hidden[:, :-1] @ decoder.unembedding.weight.T
    if decoder.final_softcap is not None:
        logits = soft_cap(logits, decoder.final_softcap, rules)
    logs = logits.log_softmax(dim=-1).gather(2, batch.token_ids[:, 1:, None]).squeeze(2)
    (expected,) = torch.autograd.grad((logs * weights).where(batch.counted[:, 1:], 0).sum(), hidden)
    torch.testing.assert_close(found, expected)


def test_log_probabilities_of_bfloat16_states_are_summed_in_float32() -> None:
    decoder = take_apart(tiny_llama().bfloat16())
    hidden = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    batch = batch_of(6, 3)
    found = log_probabilities(decoder, hidden, batch)
    logs = (hidden[:, :-1].float() @ decoder.unembedding.weight.float().T).log_softmax(dim=-1)
    expected = logs.gather(2, batch.token_ids[:, 1:, None]).squeeze(2).where(batch.counted[:, 1:], 0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)  # logits are rounded to 8 bits
    assert torch.autograd.grad(found.sum(), hidden)[0].dtype == torch.bfloat16


class _Keeps:
    """Keeps everything, to look at it: per document and layer (and site), the real tokens."""

    seen: dict[tuple[object, ...], Tensor]

    def keep(self, batch: Batch, key: tuple[object, ...], tensor: Tensor) -> None:
        for document, row, real in zip(batch.keys.tolist(), tensor, batch.real, strict=True):
            assert (document, *key) not in self.seen
            self.seen[document, *key] = row[real].clone()
            assert key[-1] != "gradient" or not row[~real].any()

    def finalise(self) -> Tensor:
        return torch.zeros(0)


class Gradient(_Keeps, OfGradients):
    name = "gradient-whole"
    source = Pass(ATTNLRP, AttributionTarget.TARGET_LOGIT)
    sites = frozenset(Site)

    def accumulate(self, seen: Gradients) -> None:
        for name in ("value", "gradient"):
            self.keep(seen.batch, (seen.layer, seen.site, name), getattr(seen, name))


class Activation(_Keeps, OfActivations):
    name = "activation-whole"
    reads = frozenset({"act", "up"})

    def accumulate(self, seen: Activations) -> None:
        for name in ("act", "up", "neurons"):
            self.keep(seen.batch, (seen.layer, name), getattr(seen, name))


def whole(model: nn.Module) -> list[Measured]:
    kept: list[Measured] = [Gradient(units_of(take_apart(model))), Activation(units_of(take_apart(model)))]
    for method in kept:
        method.seen = {}  # type: ignore[attr-defined]
    return kept


def measured(
    model: nn.Module,
    documents: EncodedDocuments,
    methods: list[Measured],
    batch_tokens: int,
    checkpointing: bool = False,
) -> list[Measured]:
    with ModelPasses(model, checkpointing) as passes:
        for batch in batches(documents.token_ids, batch_tokens, CPU):
            passes.run(batch, methods)
    return methods


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: tiny_model(family, root / family, layers=2) for family in ("gemma3", "phi3", "opt", "gpt2")}


@pytest.mark.parametrize("family", ["gemma3", "phi3", "opt", "gpt2", *MIXTURES])
def test_a_padded_batch_equals_one_document_at_a_time(checkpoints: dict[str, Path], family: str) -> None:
    if family in checkpoints:
        model = load_model(checkpoints[family], torch.float64, CPU)
    else:
        model = random_decoder(family, dtype=torch.float64).requires_grad_(False)
    documents, layers = documents_of_lengths(17, 9, 6, 5, 3, 2), take_apart(model).layers
    together = measured(model, documents, whole(model), batch_tokens=1000)
    alone = measured(model, documents, whole(model), batch_tokens=1)
    again = measured(model, documents, whole(model), batch_tokens=1000, checkpointing=True)
    dense = [len(layer.groups) == 1 and not layer.groups[0].of_experts for layer in layers]  # these have outputs, too
    sites = sum(2 + layer.gated + with_outputs for layer, with_outputs in zip(layers, dense, strict=True))
    for found, expected, recomputed, kinds in zip(together, alone, again, (2 * sites, 3 * len(layers)), strict=True):
        assert len(expected.seen) == 6 * kinds  # type: ignore[attr-defined]
        assert found.seen.keys() == expected.seen.keys() == recomputed.seen.keys()  # type: ignore[attr-defined]
        for key, tensor in expected.seen.items():  # type: ignore[attr-defined]
            torch.testing.assert_close(found.seen[key], tensor, rtol=1e-6, atol=1e-9)  # type: ignore[attr-defined]
            assert torch.equal(recomputed.seen[key], found.seen[key])  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["gemma3", "phi3", "opt", "gpt2"])
def test_gradients_are_those_of_the_weights_and_of_the_mean_target_logit(
    checkpoints: dict[str, Path], family: str
) -> None:
    model = load_model(checkpoints[family], torch.float64, CPU)
    ids = documents_of_lengths(9).token_ids[0]
    token_ids = torch.tensor(ids)
    decoder = take_apart(model)
    layers = [(group.gate, group.up, group.down_proj) for layer in decoder.layers for group in layer.groups]
    weights = {
        id(module): module.get_parameter("weight").requires_grad_()
        for gate, up, down in layers
        for module in (gate.module, down, *([up.module] if up else []))
    }
    neurons: list[Tensor] = []
    handles = [
        layer.groups[0].down_proj.register_forward_pre_hook(lambda _, inputs: neurons.append(inputs[0]))
        for layer in decoder.layers
    ]
    with propagation(model, ATTNLRP):
        logits = model(token_ids[None]).logits[0, :-1]
        mean = logits.gather(1, token_ids[1:, None]).mean()
        found = torch.autograd.grad(mean, [*neurons, *weights.values()])
    expected = dict(zip(weights, found[2:], strict=True))
    for handle in handles:
        handle.remove()
    model.requires_grad_(False)

    class Rows(OfGradients):
        name = "rows"
        source = Gradient.source
        sites = frozenset(Site)

        def accumulate(self, seen: Gradients) -> None:
            if seen.site is Site.NEURONS:
                torch.testing.assert_close(seen.gradient, found[seen.layer].view_as(seen.gradient))
                torch.testing.assert_close(seen.value, neurons[seen.layer].detach().view_as(seen.value))
                return
            gate, up, down = layers[seen.layer]
            part = {Site.GATE: gate, Site.UP: up}.get(seen.site)
            module, rows = (part.module, part.rows) if part else (down, slice(None))
            weight, gradient = module.get_parameter("weight"), expected[id(module)]
            if type(module).__name__ == "Conv1D":  # [inputs, outputs]
                weight, gradient = weight.T, gradient.T
            torch.testing.assert_close(Crane.rows(seen)[0], gradient[rows].sum(dim=1))
            relevance = (weight[rows] * gradient[rows]).sum(dim=1)
            if (bias := getattr(module, "bias", None)) is not None:
                relevance = relevance + bias[rows] * seen.gradient.sum(dim=(0, 1))
            torch.testing.assert_close(CraneTextbook.rows(seen)[0], relevance)
            compared.append((seen.layer, seen.site))

        def finalise(self) -> Tensor:
            return torch.zeros(0)

    compared: list[tuple[int, Site]] = []
    measured(model, EncodedDocuments((ids,)), [Rows(units_of(decoder))], batch_tokens=64)
    assert len(compared) == 2 * (3 if decoder.layers[0].gated else 2)


def instances(model: nn.Module, outputs: bool = True) -> list[Measured]:
    units = units_of(take_apart(model), outputs)
    return [kind(units) for kind in find_scored(["all"]) if issubclass(kind, Measured)]


def test_passes_are_shared() -> None:
    methods = instances(tiny_llama())
    served = {
        None if key is None else key.rules.name: {method.name for method in of} for key, of in by_pass(methods).items()
    }
    listening = {"average-precision", "lape", "magnitude", "plnd"}
    assert served == {
        "attnlrp": {"attnlrp", "crane", "crane-textbook", *listening},
        "cp-lrp": {"cp-lrp"},
        "plain": {"gradient"},
        "relp": {"relp"},
    }
    assert list(by_pass([method for method in methods if method.name == "lape"])) == [None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_methods_together_give_what_each_gives_alone_and_leave_the_model_alone(dtype: torch.dtype) -> None:
    model = tiny_gemma().to(dtype)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    documents = documents_of_lengths(9, 7, 6, 5, 4)
    together = {
        checkpointing: measured(model, documents, instances(model), 20, checkpointing)
        for checkpointing in (False, True)
    }
    for index, method in enumerate(instances(model)):
        measured(model, documents, [method], 20)
        assert torch.equal(together[False][index].finalise(), method.finalise()), method.name
        assert torch.equal(together[True][index].finalise(), method.finalise()), method.name
        assert bool(torch.isfinite(method.finalise()).all())
        assert method.finalise().any()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_no_backward_pass_unless_needed_and_none_below_the_lowest_neurons() -> None:
    model = tiny_llama()
    calls: list[bool] = []
    reached: list[str] = []
    model.model.norm.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for name, module in model.named_modules():
        if name.endswith(("layers.0.self_attn", "layers.0.mlp.gate_proj", "layers.1.mlp.gate_proj")):
            module.register_full_backward_hook(lambda *_, name=name: reached.append(name))
    documents = documents_of_lengths(5)
    units = units_of(take_apart(model))
    measured(model, documents, [Lape(units)], 64)
    assert calls == [False]
    measured(model, documents, [Lape(units), AttnLRP(units)], 64)
    assert calls == [False, True]
    assert reached == ["model.layers.1.mlp.gate_proj"]


def test_gradients_are_not_kept() -> None:
    """When a layer's gradients come, those of the layers above are gone."""
    model = tiny_llama()
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []

    class Counts(OfGradients):
        name = "counts"
        source = AttnLRP.source
        sites = frozenset({Site.NEURONS})

        def accumulate(self, seen: Gradients) -> None:
            counts.append(sum(reference() is not None for reference in alive))
            alive.append(weakref.ref(seen.gradient))

        def finalise(self) -> Tensor:
            return torch.zeros(0)

    measured(model, documents_of_lengths(5), [Counts(units_of(take_apart(model)))], 64)
    assert counts == [0, 0]


def test_layers_of_different_sizes_are_padded() -> None:
    model = tiny_llama()
    config = LlamaConfig(**{**SIZES, "intermediate_size": 10}, num_attention_heads=4)
    model.model.layers[1].mlp = LlamaForCausalLM(config).model.layers[0].mlp
    for method in measured(model, documents_of_lengths(9, 8, 7, 6, 5), instances(model, outputs=False), 20):
        found = method.finalise()
        assert found.shape[-2:] == (2, 24)
        assert not found[..., 1, 10:].any()
        assert bool(found[..., 1, :10].any())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [AttnLRP, Crane])
@pytest.mark.parametrize(("projection", "what"), [("up_proj", "activations"), ("down_proj", "gradients")])
def test_overflow_names_the_layer(projection: str, what: str, kind: type[Measured], checkpointing: bool) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule(f"model.layers.1.mlp.{projection}").weight.fill_(torch.nan if kind is Crane else torch.inf)
    methods: list[Measured] = [kind(units_of(take_apart(model)))]
    with pytest.raises(NonFiniteError, match=f"layer 1: {what} are not finite in torch.float32"):
        measured(model, documents_of_lengths(5), methods, 64, checkpointing)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("build", BUILDS)
def test_from_checkpoint_to_scores(tmp_path: Path, build: type[nn.Module]) -> None:
    checkpoint = write_checkpoint(tmp_path, build())
    started: list[int] = []
    done: list[int] = []
    scores = score(
        checkpoint,
        small_corpus(),
        find_scored(["all"]),
        batch_tokens=32,
        max_tokens=16,
        dtype=torch.float32,
        device=CPU,
        output_dimensions=True,
        start=started.append,
        advance=done.append,
    )
    assert (started, sum(done)) == ([8], 8)
    assert set(scores.by_method) == set(scored()) - {"routing"}
    assert scores.means is not None
    assert set(scores.outputs) == {"crane", "crane-textbook"}
    assert scores.info.documents == (4, 4)
    assert scores.info.tokens == (12 + 15 + 3 + 7, 12 + 9 + 15 + 6)
    assert scores.info.truncated == (1, 1)
    assert scores.info.corpus_digest == small_corpus().digest
    assert scores.info.fingerprint.intermediate_sizes == (24, 24)
    for name, of_method in scores.by_method.items():
        assert bool((of_method != 0).any(dim=2).all()), name


def test_too_few_documents_for_a_kurtosis(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, tiny_llama())
    corpus = Corpus({"en": small_corpus().documents["en"], "zh": small_corpus().documents["zh"][:3]})
    with pytest.raises(MethodError, match="method crane needs at least 4 documents of every language, found 3 of zh"):
        score(checkpoint, corpus, [Crane], batch_tokens=32, max_tokens=16, dtype=torch.float32, device=CPU)


def test_documents_are_cut_where_learned_positions_end(checkpoints: dict[str, Path]) -> None:
    corpus = Corpus({"en": (Document("a", "x" * 3000),), "zh": (Document("a", "y"),)})
    options = {"batch_tokens": 512, "max_tokens": 4096, "dtype": torch.float32, "device": CPU}
    scores = score(checkpoints["gpt2"], corpus, [Lape], **options)  # type: ignore[arg-type]
    assert (scores.info.max_tokens, scores.info.tokens) == (2048, (2047, 1))


def test_commands_write_scores_and_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", tiny_llama())
    texts = tmp_path / "corpus"
    texts.mkdir()
    for language, documents in small_corpus().documents.items():
        (texts / f"{language}.txt").write_text("\n".join(document.text for document in documents), encoding="utf-8")
    file, masks = tmp_path / "scores.safetensors", tmp_path / "masks"
    relevance(str(checkpoint), corpus=str(texts), out=file, methods="lape, random", device="cpu")
    assert list(Scores.load(file).by_method) == ["lape", "random"]
    assert not (tmp_path / "scores.safetensors.progress").exists()
    select(file, method="random", budget=0.25, match="lape", out=masks)
    assert sorted(path.name for path in masks.iterdir()) == ["random-en.safetensors", "random-zh.safetensors"]
    assert "random-en.safetensors: 12 neurons of 48" in capsys.readouterr().out
    with pytest.raises(MethodError, match="unknown method 'lapse'"):
        relevance(str(checkpoint), corpus=str(texts), methods="lapse")
    with pytest.raises(MethodError, match="needs at least 2, found 1: en"):
        relevance(str(checkpoint), corpus=str(texts), languages="en", device="cpu")


def test_a_skeleton_has_the_sizes_and_no_weights(checkpoints: dict[str, Path]) -> None:
    for checkpoint in checkpoints.values():
        skeleton = load_skeleton(checkpoint)
        model = load_model(checkpoint, torch.float32, CPU)
        assert units_of(take_apart(skeleton)) == units_of(take_apart(model))
        assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_a_checkpoint_without_weights(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, tiny_llama())
    (checkpoint / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a safetensors file"):
        load_model(checkpoint, torch.float32, CPU)


@pytest.mark.parametrize(
    ("ability", "expected"), [("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx2", torch.float32)]
)
def test_a_cpu_that_is_slow_at_bfloat16_has_float32(monkeypatch, ability: str, expected: torch.dtype) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {ability: True})
    assert pick_dtype(None, CPU) == expected
    assert pick_dtype(None, torch.device("cuda")) == torch.bfloat16
    assert [pick_dtype(name, CPU) for name in ("bfloat16", "float32")] == [torch.bfloat16, torch.float32]


def test_devices_and_dtypes() -> None:
    assert pick_device("cpu") == CPU
    with pytest.raises(ModelOptionError, match="unknown dtype 'int8'; expected float32 or bfloat16"):
        pick_dtype("int8", CPU)
    with pytest.raises(ModelOptionError, match="unknown device 'gpu'"):
        pick_device("gpu")
    with pytest.raises(ModelOptionError, match="device 'meta' is not supported"):
        pick_device("meta")
