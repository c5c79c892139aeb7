"""`crane relevance --server` over a running server, against transformers and definitions written out once more."""

import json

import httpx
import pytest
import torch
from typer.testing import CliRunner

from crane_serve.cli import app
from relevance.scores import Scores
from tests.conftest import TINY_CHUNK_TOKENS, Tiny
from tests.engines import Oracle, Server, same_shares

pytestmark = pytest.mark.engine

CONTEXT = 512  # of the server
TEXTS = {
    "en": ["The harbour froze.", "A boat came in, and another went out.", "It rained. " * 15, "It snowed again. " * 50],
    "zh": ["港口结冰了。", "船来了，又走了。", "又下雨了", "五月以前雪没有化。" * 40],
}


def neurons_of(oracle: Oracle, text: str) -> torch.Tensor:
    """Of a document that is cut, without its start token: [layers, tokens, neurons]."""
    start = oracle.tokenizer.bos_token_id
    token_ids = [start, *oracle.tokenizer(text, add_special_tokens=False)["input_ids"]]
    return oracle.neurons(token_ids[: CONTEXT - 1], None)[:, 1:].double()


def gates_of(oracle: Oracle, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Likewise, act(gate) and up."""
    start = oracle.tokenizer.bos_token_id
    token_ids = [start, *oracle.tokenizer(text, add_special_tokens=False)["input_ids"]]
    act, up = oracle.gates(token_ids[: CONTEXT - 1], None)
    return act[:, 1:].double(), up[:, 1:].double()


def average_precision(responses: torch.Tensor, own: list[bool]) -> float:
    """Mean, over the documents of a language, of its share of those that respond as strongly.

    responses: [documents]; own: whether each is of the language.
    """
    of_language = torch.tensor(own)
    shares = [of_language[responses >= value].double().mean().item() for value in responses[of_language]]
    return sum(shares) / len(shares)


@pytest.fixture(scope="module")
def served(tiny: Tiny, tiny_server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Scores, str]:
    """What the command wrote, and said."""
    directory = tmp_path_factory.mktemp("served-relevance")
    texts, out = directory / "texts", directory / "scores.safetensors"
    texts.mkdir()
    for language, of in TEXTS.items():
        lines = [json.dumps({"id": str(number), "text": text}) for number, text in enumerate(of)]
        (texts / f"{language}.jsonl").write_text("\n".join(lines))
    options = ["--server", tiny_server.url, "--methods", "magnitude,average-precision,lape,plnd"]
    command = ["relevance", str(tiny.checkpoint), "--corpus", str(texts), *options, "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return Scores.load(out), result.output


def test_scores_are_those_of_transformers(served: tuple[Scores, str], tiny_oracle: Oracle) -> None:
    scores, _ = served
    neurons = {language: [neurons_of(tiny_oracle, text) for text in texts] for language, texts in TEXTS.items()}
    assert max(each.shape[1] for of in neurons.values() for each in of) > 2 * TINY_CHUNK_TOKENS
    responses = torch.stack(
        [each.mean(dim=1) for of in neurons.values() for each in of]
    )  # [documents, layers, neurons]
    labels = [language for language, of in neurons.items() for _ in of]
    for index, (language, of) in enumerate(neurons.items()):
        magnitude = torch.cat(of, dim=1).abs().mean(dim=1)
        torch.testing.assert_close(scores.of("magnitude")[index].double(), magnitude, rtol=1e-4, atol=1e-5)
        own = [label == language for label in labels]
        expected = [[average_precision(neuron, own) for neuron in layer.T] for layer in responses.unbind(1)]
        found = scores.of("average-precision")[index].double()
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)


def test_lape_and_plnd_are_those_of_transformers(served: tuple[Scores, str], tiny_oracle: Oracle) -> None:
    scores, _ = served
    for index, texts in enumerate(TEXTS.values()):
        acts, ups = zip(*(gates_of(tiny_oracle, text) for text in texts), strict=True)
        acts_of_all = torch.cat(acts, dim=1)  # [layers, tokens, neurons]
        for found, act in zip(scores.of("lape")[index].tolist(), acts_of_all, strict=True):
            assert same_shares(found, (act > 0).double().mean(dim=0), len(act))
        strengths = torch.stack([up.abs().sum(dim=1) for up in ups])  # [documents, layers, neurons]
        top = strengths.shape[-1] // 10
        present = strengths >= strengths.topk(top).values[..., -1:]
        shares = scores.of("plnd")[index].double()
        # Ties are broken by less than one document's share.
        assert torch.equal((shares * len(texts)).floor(), present.double().sum(dim=0))


def test_documents_are_cut_to_what_the_engine_reads(served: tuple[Scores, str]) -> None:
    scores, said = served
    assert (scores.info.max_tokens, scores.info.truncated) == (CONTEXT - 1, (1, 1))
    assert scores.info.tokens[0] == sum(map(len, TEXTS["en"][:3])) + CONTEXT - 2
    for language in TEXTS:
        assert f"{language}: 1 document(s) cut to {CONTEXT - 1} tokens" in said


def test_a_text_that_fills_the_context_is_scored_and_shown_but_for_its_last_token(
    tiny_server: Server, tiny_oracle: Oracle
) -> None:
    text = "a" * (CONTEXT - 1)  # behind its start token
    wanted = {"layers": [1], "reduce": "mean", "first": 1}

    def score(**options: object) -> httpx.Response:
        return httpx.post(f"{tiny_server.url}/score", json={"text": [text], **options}, timeout=60)

    plain = score().raise_for_status().json()
    shown = score(activations={**wanted, "end": CONTEXT - 1}).raise_for_status().json()
    assert shown["scores"][0]["logprob"] == pytest.approx(plain["scores"][0]["logprob"], abs=1e-3)
    cut = score(activations=wanted, truncate=CONTEXT - 1).raise_for_status().json()
    assert cut["scores"][0]["tokens"] == plain["scores"][0]["tokens"] - 1
    means = neurons_of(tiny_oracle, text)[1].mean(dim=0).tolist()
    for answer in (shown, cut):
        assert answer["activations"]["tokens"] == CONTEXT - 2
        assert answer["activations"]["layers"][0]["mean"] == pytest.approx(means, rel=1e-4, abs=1e-5)
    refused = score(activations=wanted)
    assert refused.status_code == 400
    assert f"with activations a text may have {CONTEXT - 1}, or 'end' may be" in refused.json()["error"]["message"]
