"""Scoring: from a model and a corpus to Scores, by every method asked for in one pass."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from crane_serve.masks import Fingerprint
from relevance.corpus import Corpus
from relevance.encoding import EncodedDocuments, encode
from relevance.families import UnsupportedModelError, take_apart
from relevance.measurement import measure
from relevance.method import Method, Shape, require_languages
from relevance.model import load_model, load_tokenizer
from relevance.scores import Scores, ScoresInfo


def score(
    checkpoint: Path,
    corpus: Corpus,
    methods: Sequence[type[Method]],
    *,
    batch_tokens: int,
    max_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    start: Callable[[int], None] = lambda documents: None,
    advance: Callable[[int], None] = lambda documents: None,
) -> Scores:
    """Score the neurons of a local checkpoint on all documents of `corpus`.

    batch_tokens: tokens of a batch with padding; max_tokens: where a document is cut, start token included;
    start: hears the number of documents once; advance: hears of every few documents done.

    Raises MethodError, CheckpointError, FingerprintError, UnsupportedModelError, CorpusError and NonFiniteError.
    """
    require_languages(methods, corpus.languages)
    fingerprint = Fingerprint.of(checkpoint)
    model = load_model(checkpoint, dtype, device)
    decoder = take_apart(model)
    if decoder.sizes != fingerprint.intermediate_sizes:
        raise UnsupportedModelError(f"{checkpoint}: the sizes of the MLP layers differ from those in its config")
    tokenizer = load_tokenizer(checkpoint)
    encoded: dict[str, EncodedDocuments] = {
        language: encode(tokenizer, language, documents, max_tokens) for language, documents in corpus.documents.items()
    }
    start(sum(len(of_language.token_ids) for of_language in encoded.values()))
    shape = Shape(corpus.languages, decoder.sizes)
    running = [method(shape, device) for method in methods]
    measure(model, encoded, running, batch_tokens, advance)
    return Scores(
        {method.name: method.scores().float() for method in running},
        ScoresInfo(
            languages=corpus.languages,
            fingerprint=fingerprint,
            corpus_digest=corpus.digest,
            split=corpus.split,
            documents=tuple(len(of_language.token_ids) for of_language in encoded.values()),
            tokens=tuple(of_language.tokens for of_language in encoded.values()),
            truncated=tuple(len(of_language.truncated) for of_language in encoded.values()),
            skipped=tuple(len(of_language.skipped) for of_language in encoded.values()),
            max_tokens=max_tokens,
            dtype=str(dtype).removeprefix("torch."),
        ),
    )
