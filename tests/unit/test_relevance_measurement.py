from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from crane_serve.checkpoints.resolve import CheckpointError
from relevance.attnlrp import attnlrp
from relevance.commands import relevance, select
from relevance.corpus import Corpus, CorpusError, Document
from relevance.encoding import Batch, EncodedDocuments, batches, encode
from relevance.families import UnsupportedModelError, take_apart
from relevance.measurement import captures, last_hidden, mean_target_logits, measure
from relevance.method import Capture, Method, MethodError, Needs, Shape
from relevance.methods import available
from relevance.methods.attnlrp import AttnLRP
from relevance.methods.lape import Lape
from relevance.methods.random import Random
from relevance.model import ModelOptionError, load_model, pick_device, pick_dtype
from relevance.scores import Scores
from relevance.scoring import score
from relevance.statistics import NonFiniteError

CPU = torch.device("cpu")
LANGUAGES = ("en", "zh")
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
    texts = {"en": ("The cat sat.", "It rained all day.", "No."), "zh": ("猫坐着。", "下雨。", "不，今天不行。")}
    return Corpus({lang: tuple(Document(str(i), text) for i, text in enumerate(of)) for lang, of in texts.items()})


def test_encoding_begins_with_bos_cuts_and_skips() -> None:
    documents = [Document("a", "abcdef"), Document("b", ""), Document("c", "ab")]
    encoded = encode(byte_tokenizer(), "en", documents, max_tokens=4)
    assert [len(ids) for ids in encoded.token_ids] == [4, 3]
    assert all(ids[0] == 0 for ids in encoded.token_ids)
    assert (encoded.skipped, encoded.truncated, encoded.tokens) == (("b",), ("a",), 5)
    with pytest.raises(CorpusError, match="no document of en has a token to predict"):
        encode(byte_tokenizer(), "en", documents[1:2], max_tokens=4)


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


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma])
def test_target_logits_are_those_of_the_whole_vocabulary(build: type[nn.Module]) -> None:
    model = build().double()
    decoder = take_apart(model)
    documents = documents_of_lengths(12, 5, 2).token_ids
    batch = Batch.of(documents, CPU)
    found = mean_target_logits(decoder, last_hidden(decoder, decoder.embedding(batch.token_ids)), batch)
    for ids, mean in zip(documents, found, strict=True):
        token_ids = torch.tensor(ids)
        logits = model(token_ids[None]).logits[0, :-1]
        torch.testing.assert_close(mean, logits.gather(1, token_ids[1:, None]).mean())


class Whole(Method):
    """Keeps everything, to look at it."""

    name = "whole"
    needs = Needs.BACKWARD

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.seen: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}
        self.lengths: list[int] = []

    def accumulate(self, capture: Capture) -> None:
        assert capture.gradient is not None
        for counted, *rows in zip(capture.counted, capture.gate, capture.activation, capture.gradient, strict=True):
            key = (capture.language, capture.layer, int(counted.sum()))
            self.seen[key] = tuple(row[counted] for row in rows)  # type: ignore[assignment]

    def scores(self) -> Tensor:
        return torch.zeros(self.shape.tensor)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma])
def test_a_padded_batch_equals_one_document_at_a_time(build: type[nn.Module]) -> None:
    model = build().double()
    documents = {"en": documents_of_lengths(17, 9, 3, 2), "zh": documents_of_lengths(6, 5)}
    shape = Shape(LANGUAGES, (24, 24))
    together, alone = Whole(shape), Whole(shape)
    measure(model, documents, [together], batch_tokens=1000)
    measure(model, documents, [alone], batch_tokens=1)
    assert len(together.seen) == len(alone.seen) == 6 * 2
    for key, expected in alone.seen.items():
        for found, wanted in zip(together.seen[key], expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_gradients_are_those_of_the_mean_target_logit() -> None:
    model = tiny_llama().double()
    ids = documents_of_lengths(9).token_ids[0]
    token_ids = torch.tensor(ids)
    neurons: list[Tensor] = []
    decoder = take_apart(model)
    handles = [
        layer.down_proj.register_forward_pre_hook(lambda _, inputs: neurons.append(inputs[0]))
        for layer in decoder.layers
    ]
    with attnlrp(model):
        logits = model(token_ids[None]).logits[0, :-1]
    expected = torch.autograd.grad(logits.gather(1, token_ids[1:, None]).mean(), neurons)
    for handle in handles:
        handle.remove()
    with attnlrp(model):
        found = list(captures(decoder, Batch.of([ids], CPU), language=0, backward=True))
    for capture, neuron, gradient in zip(found, neurons, expected, strict=True):
        assert capture.gradient is not None
        torch.testing.assert_close(capture.gradient, gradient)
        torch.testing.assert_close(capture.activation, neuron.detach())


def test_one_pass_serves_all_methods_and_leaves_the_model_alone() -> None:
    model = tiny_llama()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    documents = {"en": documents_of_lengths(9, 5), "zh": documents_of_lengths(6)}
    shape = Shape(LANGUAGES, (24, 24))
    alone = {kind.name: kind(shape) for kind in (AttnLRP, Lape)}
    for method in alone.values():
        measure(model, documents, [method], batch_tokens=64)
    done: list[int] = []
    together = [kind(shape) for kind in available().values()]
    measure(model, documents, together, batch_tokens=9, advance=done.append)
    for method in together:
        if method.name in alone:
            torch.testing.assert_close(method.scores(), alone[method.name].scores(), rtol=1e-4, atol=1e-7)
    assert done == [1, 1, 1]
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_pass_and_no_backward_pass_unless_needed() -> None:
    model = tiny_llama()
    documents = {"en": documents_of_lengths(5), "zh": documents_of_lengths(5)}
    calls: list[bool] = []
    model.model.norm.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    shape = Shape(LANGUAGES, (24, 24))
    measure(model, documents, [Random(shape)], batch_tokens=64)
    assert calls == []
    measure(model, documents, [Random(shape), Lape(shape)], batch_tokens=64)
    assert calls == [False, False]


def test_layers_of_different_sizes_are_padded() -> None:
    model = tiny_llama()
    config = LlamaConfig(**{**SIZES, "intermediate_size": 10}, num_attention_heads=4)
    model.model.layers[1].mlp = LlamaForCausalLM(config).model.layers[0].mlp
    shape = Shape(LANGUAGES, take_apart(model).sizes)
    method = AttnLRP(shape)
    measure(model, {"en": documents_of_lengths(5), "zh": documents_of_lengths(4)}, [method], batch_tokens=64)
    assert method.scores().shape == (2, 2, 24)
    assert method.scores()[:, 1, 10:].abs().sum() == 0
    assert bool((method.scores()[:, 1, :10] != 0).all())


@pytest.mark.parametrize(("projection", "what"), [("up_proj", "activations"), ("down_proj", "gradients")])
def test_overflow_names_the_layer(projection: str, what: str) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule(f"model.layers.1.mlp.{projection}").weight.fill_(torch.inf)
    shape = Shape(LANGUAGES, (24, 24))
    with pytest.raises(NonFiniteError, match=f"layer 1: {what} are not finite in torch.float32"):
        measure(model, {"en": documents_of_lengths(5)}, [AttnLRP(shape)], batch_tokens=64)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma])
def test_from_checkpoint_to_scores(tmp_path: Path, build: type[nn.Module]) -> None:
    checkpoint = write_checkpoint(tmp_path, build())
    started: list[int] = []
    scores = score(
        checkpoint,
        small_corpus(),
        list(available().values()),
        batch_tokens=32,
        max_tokens=16,
        dtype=torch.float32,
        device=CPU,
        start=started.append,
    )
    assert started == [6]
    assert list(scores.by_method) == ["attnlrp", "lape", "random"]
    assert scores.info.documents == (3, 3)
    assert scores.info.tokens == (12 + 15 + 3, 12 + 9 + 15)
    assert scores.info.truncated == (1, 1)
    assert scores.info.corpus_digest == small_corpus().digest
    assert scores.info.fingerprint.intermediate_sizes == (24, 24)
    assert all(bool((of_method != 0).all()) for of_method in scores.by_method.values())


def test_commands_write_scores_and_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", tiny_llama())
    texts = tmp_path / "corpus"
    texts.mkdir()
    for language, documents in small_corpus().documents.items():
        (texts / f"{language}.txt").write_text("\n".join(document.text for document in documents), encoding="utf-8")
    file, masks = tmp_path / "scores.safetensors", tmp_path / "masks"
    relevance(str(checkpoint), corpus=texts, out=file, methods="lape, random", device="cpu")
    assert list(Scores.load(file).by_method) == ["lape", "random"]
    select(file, method="random", budget=0.25, match="lape", out=masks)
    assert sorted(path.name for path in masks.iterdir()) == ["random-en.safetensors", "random-zh.safetensors"]
    assert "random-en.safetensors: 12 neurons of 48" in capsys.readouterr().out
    with pytest.raises(MethodError, match="methods are attnlrp, lape, random"):
        relevance(str(checkpoint), corpus=texts, methods="lapse")
    with pytest.raises(MethodError, match="needs at least 2, found 1: en"):
        relevance(str(checkpoint), corpus=texts, languages="en", device="cpu")


def test_an_unknown_architecture_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    config = Qwen2Config(**SIZES, num_attention_heads=2, num_key_value_heads=2)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="Qwen2ForCausalLM"):
        load_model(tmp_path, torch.float32, CPU)


def test_a_checkpoint_without_weights(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, tiny_llama())
    (checkpoint / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(checkpoint, torch.float32, CPU)


def test_devices_and_dtypes() -> None:
    assert pick_device("cpu") == CPU
    assert (pick_dtype(None, CPU), pick_dtype("bfloat16", CPU)) == (torch.float32, torch.bfloat16)
    with pytest.raises(ModelOptionError, match="unknown dtype 'int8'; expected float32 or bfloat16"):
        pick_dtype("int8", CPU)
    with pytest.raises(ModelOptionError, match="unknown device 'gpu'"):
        pick_device("gpu")
    with pytest.raises(ModelOptionError, match="device 'meta' is not supported"):
        pick_device("meta")
