"""Scores through a server against those of this process, the server being transformers behind its routes."""

import base64
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from typer.testing import CliRunner

import relevance.served
from crane_serve.cli import app
from crane_serve.common.masks import Fingerprint, FingerprintError
from crane_serve.common.models.load import load_tokenizer
from crane_serve.common.models.prefix import encode_from_start
from crane_serve.common.text.corpus import Corpus, Document
from relevance.method import MethodError
from relevance.methods import find_scored
from relevance.scores import Scores
from relevance.scoring import score
from relevance.served import Server, ServerError, enough_of
from tests.engines import Oracle
from tests.tiny import tiny_model

TEXTS = {
    "en": ("The harbour froze.", "A boat came in, and another went out to sea.", "Rain again"),
    "zh": ("港口结冰了。", "船来了。", "又下雨了"),
}
MAX_TOKENS = 20


class FakeServer(httpx.BaseTransport):
    """Transformers behind /ready and /score."""

    def __init__(self, checkpoint: Path) -> None:
        self.fingerprint = Fingerprint.of(checkpoint)
        self.oracle = Oracle(checkpoint)
        self.busy = 2  # refusals before the first answer
        self.start = [0]
        self.context = 512
        self.bodies: list[dict] = []
        self.broken: str | None = None  # part of a text that it refuses

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/ready":
            ready = {"fingerprint": self.fingerprint.model_dump(), "max_model_tokens": self.context}
            return httpx.Response(200, json=ready)
        body = json.loads(request.content)
        [text] = body["text"]
        if self.busy:
            self.busy -= 1
            return httpx.Response(429, json={"error": {"message": "busy"}})
        if self.broken is not None and self.broken in text:
            return httpx.Response(400, json={"error": {"message": "the text is too long"}})
        self.bodies.append(body)
        token_ids = [*self.start, *self.oracle.tokenizer(text, add_special_tokens=False)["input_ids"]]
        token_ids = token_ids[: body["truncate"]]
        assert len(token_ids) < self.context
        wanted = body["activations"]
        rows, (acts, ups) = self.oracle.neurons(token_ids, None), self.oracle.gates(token_ids, None)
        end = len(token_ids)
        layers = []
        for layer in wanted["layers"]:
            seen, act, up = (each[layer][wanted["first"] : end] for each in (rows, acts, ups))
            values = {
                "mean": seen.mean(0),
                "mean_abs": seen.abs().mean(0),
                "positive": (seen > 0).float().mean(0),
                "act_positive": (act > 0).float().mean(0),
                "up_mean_abs": up.abs().mean(0),
            }
            encoded = {name: base64.b64encode(values[name].numpy().tobytes()).decode() for name in wanted["reduce"]}
            layers.append({"layer": layer, "neurons": None, **encoded})
        seen_tokens = {"first": 1, "tokens": end - 1, "layers": layers}
        return httpx.Response(200, json={"prompts": [token_ids], "activations": seen_tokens})


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(request.param, tmp_path_factory.mktemp("served") / request.param)


@pytest.fixture
def server(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    fake = FakeServer(checkpoint)
    monkeypatch.setattr(relevance.served, "_PAUSE_S", 0.0)
    monkeypatch.setattr(relevance.served, "_AT_ONCE", 1)  # hooks of two threads would see each other's tokens
    client = httpx.Client

    def connected(**options: object) -> httpx.Client:
        return client(**{**options, "transport": fake})

    monkeypatch.setattr(relevance.served.httpx, "Client", connected)
    return fake


def corpus() -> Corpus:
    documents = {
        language: (Document("empty", ""), *(Document(str(number), text) for number, text in enumerate(texts)))
        for language, texts in TEXTS.items()
    }
    return Corpus(documents)


def scores_of(checkpoint: Path, methods: list[str], server: str | None = None, **options: object) -> Scores:
    settings = {"batch_tokens": 64, "max_tokens": MAX_TOKENS, "dtype": torch.float32, "device": torch.device("cpu")}
    return score(checkpoint, corpus(), find_scored(methods), server=server, **{**settings, **options})


def gated(checkpoint: Path) -> bool:
    return checkpoint.name == "llama"


def test_the_scores_are_those_of_this_process(checkpoint: Path, server: FakeServer) -> None:
    methods = ["magnitude", "average-precision", "random", "lape", "plnd"]
    done: list[int] = []
    served = scores_of(checkpoint, methods, "http://there", advance=done.append)
    here = scores_of(checkpoint, methods)
    for method in methods:
        torch.testing.assert_close(served.of(method), here.of(method), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(served.means, here.means, rtol=1e-4, atol=1e-6)
    assert served.info.model_copy(update={"dtype": "float32"}) == here.info
    assert sum(done) == 6
    assert sum(here.info.truncated) > 0
    act = "act_positive" if gated(checkpoint) else "positive"
    assert {tuple(body["activations"]["reduce"]) for body in server.bodies} == {
        ("mean", "mean_abs", act, "up_mean_abs")
    }


def test_gates_are_asked_for_only_by_methods_that_read_them(checkpoint: Path, server: FakeServer) -> None:
    scores_of(checkpoint, ["magnitude", "average-precision"], "http://there")
    assert {tuple(body["activations"]["reduce"]) for body in server.bodies} == {("mean", "mean_abs")}


def test_without_methods_named_no_gates_are_asked_for(checkpoint: Path, server: FakeServer, tmp_path: Path) -> None:
    texts, out = tmp_path / "texts", tmp_path / "scores.safetensors"
    texts.mkdir()
    for language, of in TEXTS.items():
        lines = [json.dumps({"id": str(number), "text": text}) for number, text in enumerate(of)]
        (texts / f"{language}.jsonl").write_text("\n".join(lines))
    command = ["relevance", str(checkpoint), "--corpus", str(texts), "--server", "http://there", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    asked = {reduction for body in server.bodies for reduction in body["activations"]["reduce"]}
    assert asked == {"mean", "mean_abs"} | (set() if gated(checkpoint) else {"positive"})
    methods = {"magnitude", "average-precision", "random"} | (set() if gated(checkpoint) else {"lape"})
    assert set(Scores.load(out).by_method) == methods


def test_documents_are_cut_to_what_the_server_reads(checkpoint: Path, server: FakeServer) -> None:
    server.context = 12
    served = scores_of(checkpoint, ["magnitude"], "http://there")
    here = scores_of(checkpoint, ["magnitude"], max_tokens=11)
    torch.testing.assert_close(served.of("magnitude"), here.of("magnitude"), rtol=1e-4, atol=1e-6)
    assert served.info.model_copy(update={"dtype": "float32"}) == here.info
    assert (served.info.max_tokens, sum(served.info.truncated)) == (11, 5)
    server.context = 2
    with pytest.raises(ServerError, match="reads no more than 1 tokens of a document, expected at least 2"):
        scores_of(checkpoint, ["magnitude"], "http://there")


@pytest.mark.parametrize("text", ["A boat came in. " * 50, "船来了，又走了。" * 50, "short"])
@pytest.mark.parametrize("tokens", [1, 5, 30])
def test_enough_of_a_text_begins_with_the_same_tokens(checkpoint: Path, text: str, tokens: int) -> None:
    tokenizer = load_tokenizer(checkpoint)
    token_ids = encode_from_start(tokenizer, text)[:tokens]
    enough = enough_of(text, tokenizer, token_ids)
    assert text.startswith(enough)
    assert encode_from_start(tokenizer, enough)[:tokens] == token_ids
    assert len(enough) < 4 * tokens + 1 or enough == text


def test_layers_are_asked_for_in_groups_that_one_request_may_have(
    checkpoint: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scores_of(checkpoint, ["magnitude"], "http://there")
    monkeypatch.setattr(relevance.served, "MAX_ACTIVATIONS", 2 * 2 * 160)
    server.bodies.clear()
    assert torch.equal(scores_of(checkpoint, ["magnitude"], "http://there").of("magnitude"), whole.of("magnitude"))
    assert [body["activations"]["layers"] for body in server.bodies[:2]] == [[0, 1], [2]]


def test_methods_of_gradients_are_refused(checkpoint: Path, server: FakeServer) -> None:
    message = "method attnlrp cannot be computed through a server: it needs gradients, and a server computes none"
    with pytest.raises(MethodError, match=message):
        scores_of(checkpoint, ["attnlrp"], "http://there")
    assert not server.bodies


@pytest.mark.parametrize(("option", "what"), [("random_tokens", "random tokens"), ("medians", "medians")])
def test_what_no_server_measures_is_refused(checkpoint: Path, server: FakeServer, option: str, what: str) -> None:
    with pytest.raises(MethodError, match=f"{what} cannot be computed through a server"):
        scores_of(checkpoint, ["magnitude"], "http://there", **{option: True})
    assert not server.bodies


def test_what_a_server_refuses_names_the_document(checkpoint: Path, server: FakeServer) -> None:
    server.broken = "boat"
    with pytest.raises(ServerError, match="en: document '1': http://there/score: the text is too long"):
        scores_of(checkpoint, ["magnitude"], "http://there")


def test_a_server_that_reads_other_tokens_is_noticed(checkpoint: Path, server: FakeServer) -> None:
    server.start = [1]
    with pytest.raises(ServerError, match="reads other tokens than the checkpoint's tokenizer makes"):
        scores_of(checkpoint, ["magnitude"], "http://there")


def test_another_model_is_refused(checkpoint: Path, server: FakeServer, tmp_path: Path) -> None:
    server.fingerprint = Fingerprint.of(tiny_model("llama", tmp_path, seed=5))
    with pytest.raises(FingerprintError, match="the server at http://there"):
        scores_of(checkpoint, ["magnitude"], "http://there")


@pytest.fixture
def refusing() -> Callable[[httpx.Request], httpx.Response]:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    return answer


def test_a_server_that_is_not_there_is_named(checkpoint: Path, refusing) -> None:
    with pytest.raises(ServerError, match="http://there cannot be reached: refused"):
        Server("http://there", Fingerprint.of(checkpoint), httpx.MockTransport(refusing))
