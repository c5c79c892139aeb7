"""The real model, in bfloat16, against plain transformers in float32."""

from statistics import mean

import pytest

from clients import CraneClient
from crane_serve.common.masks import MaskLibrary
from crane_serve.common.text.corpus import EMBEDDED_CORPUS, Corpus
from tests.conftest import GEMMA
from tests.engines import Oracle, Server

pytestmark = [pytest.mark.engine, pytest.mark.model]

MEAN_DIFFERENCE = 0.02  # nats per token
CHARACTERS = 80


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(GEMMA)


@pytest.mark.parametrize("mask", ["none", "zh", "en,vi"])
def test_score_equals_transformers(gemma_server: Server, gemma_library: MaskLibrary, oracle: Oracle, mask: str) -> None:
    corpus = Corpus.load(EMBEDDED_CORPUS, "validation")
    texts = [document.text[:CHARACTERS] for language in corpus.languages for document in corpus.documents[language][:1]]
    resolved = gemma_library.resolve(mask)
    with CraneClient(gemma_server.url) as client:
        scores = client.score_text(texts, mask=mask).scores
    differences = []
    for text, score in zip(texts, scores, strict=True):
        expected = oracle.text_logprobs(text, None if resolved is None else resolved.mask)
        assert score.tokens == len(expected)
        differences.append(abs(score.logprob - sum(expected)) / score.tokens)
    assert mean(differences) < MEAN_DIFFERENCE


def test_prompts_begin_with_bos_and_nothing_else_is_added(gemma_server: Server, oracle: Oracle) -> None:
    prompt_ids = oracle.tokenizer("The ferry leaves at nine.")["input_ids"]
    assert prompt_ids[0] == oracle.tokenizer.bos_token_id
    with CraneClient(gemma_server.url) as client:
        output = client.generate("The ferry leaves at nine.", max_tokens=1).outputs[0]
    assert output.prompt_tokens == len(prompt_ids)
