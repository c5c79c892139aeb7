"""ScoredModel: a model together with scores that were made for it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from crane_serve.common.masks import Fingerprint
from crane_serve.common.models.decoder import Decoder
from crane_serve.common.models.families import decoder_of
from crane_serve.common.models.load import load_tokenizer
from crane_serve.common.models.resolve import resolve_checkpoint
from crane_serve.common.text.corpus import Corpus
from relevance.doubts import doubts
from relevance.encoding import encode
from relevance.model import load_model, pick_device, pick_dtype
from relevance.repeats import repeated_keys
from relevance.scores import Scores, ScoresError, Search
from relevance.sources import TextSource, load_corpus


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids of documents by language, each beginning with the start token, and their origin."""

    documents: Mapping[str, tuple[list[int], ...]]
    corpus_digest: str
    split: str | None


@dataclass(frozen=True)
class ScoredModel:
    """A model in evaluation mode and scores of its neurons."""

    checkpoint: Path
    model: nn.Module
    decoder: Decoder
    scores: Scores
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def open(
        cls, model: str, scores: Path, dtype: str | None, device: str | None, revision: str | None = None
    ) -> "ScoredModel":
        """Load both. dtype: None as of `pick_dtype`; revision: of a hub id.

        Raises ScoresError or FingerprintError, before the weights are read, for scores of another model.
        """
        loaded = Scores.load(scores)
        checkpoint = resolve_checkpoint(model, revision)
        Fingerprint.of(checkpoint).require(loaded.info.fingerprint, str(scores))
        where = pick_device(device)
        kind = pick_dtype(dtype, where)
        opened = load_model(checkpoint, kind, where)
        return cls(checkpoint, opened, decoder_of(opened), loaded, kind, where)

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages of the scores."""
        return self.scores.info.languages

    def search_texts(self, texts: TextSource, split: str, limit: int | None, max_tokens: int) -> EncodedTexts:
        """The texts that the scores come from, the only ones that a search may use. Raises ScoresError for other
        texts."""
        corpus = self._load(texts, split).spread(limit)
        if corpus.digest != self.scores.info.corpus_digest:
            forms = f"form {corpus.normalised}, of the scores {self.scores.info.normalised}"
            raise ScoresError(
                f"{texts.place} (split {corpus.split!r}, limit {limit}, {forms}) is not the corpus that the scores "
                "come from; a search has to keep to it, so that texts for validation and report stay unseen"
            )
        for doubt in doubts(corpus):
            texts.notice(doubt)
        return self.encoded(corpus, max_tokens)

    def validation_texts(
        self, texts: TextSource, choice: str, report: str, limit: int | None, max_tokens: int
    ) -> dict[str, EncodedTexts]:
        """Texts for choices ("validation") and for reporting ("test"), `limit` documents of each language of a split.

        Raises ScoresError if the scores come from one of them, or if the two are the same.
        """
        info = self.scores.info
        # Scores may come from only so many documents of a split, at even distances.
        limit_of_scores = max(used + skipped for used, skipped in zip(info.documents, info.skipped, strict=True))
        encoded: dict[str, EncodedTexts] = {}
        corpora: list[Corpus] = []
        for part, split in (("validation", choice), ("test", report)):
            corpus = self._load(texts, split)
            if corpus.split is None:
                raise ScoresError(f"{texts.place} has no splits; expected splits {choice!r} and {report!r}")
            of_scores = info.corpus_digest in (corpus.digest, corpus.spread(limit_of_scores).digest)
            if of_scores or corpus.digest in {other.digest for other in corpora}:
                raise ScoresError(
                    f"split {split!r} of {texts.place} is used twice; scores, choices and report need their own"
                )
            corpora.append(corpus)
            encoded[part] = self.encoded(corpus.spread(limit), max_tokens)
        for doubt in self._doubts(corpora[0], corpora[1], limit_of_scores):
            texts.notice(doubt)
        return encoded

    def require_absent(self, method: str, *, replace: bool) -> None:
        """Raise ScoresError, before a search begins, if the file already has its scores and they must not be
        replaced."""
        if method in self.scores.by_method and not replace:
            raise ScoresError(f"the file holds scores of {method} already; pass --replace to replace them")

    def add_scores(
        self,
        path: Path,
        method: str,
        values: Mapping[str, Tensor],
        search: Search,
        spread: Mapping[str, Tensor] | None = None,
        *,
        replace: bool,
    ) -> None:
        """Add scores [layers, widest] of every language, and their spread between seeds, to their file, which is read
        again, since others may have added to it.

        Raises ScoresError for a method that is there already, unless `replace`.
        """
        current = Scores.load(path)
        if method in current.by_method and not replace:
            raise ScoresError(f"{path} holds scores of {method} already; pass --replace to replace them")
        together, spreads = (
            None if of is None else torch.stack([of[language] for language in current.info.languages])
            for of in (values, spread)
        )
        assert together is not None
        current.replaced(method, together, search, spreads).save(path)

    def halves(self, listed: str | None) -> Sequence[Scores]:
        """The two files of scores in `listed`, joined with a comma; none for None. Raises ScoresError."""
        if listed is None:
            return ()
        files = [Path(name.strip()) for name in listed.split(",")]
        if len(files) != 2:
            raise ScoresError(f"{listed!r} names {len(files)} files; expected two, from halves of a corpus")
        loaded = [Scores.load(file) for file in files]
        for file, scores in zip(files, loaded, strict=True):
            self.scores.info.fingerprint.require(scores.info.fingerprint, str(file))
            if scores.info.languages != self.languages:
                raise ScoresError(f"{file} has the languages {', '.join(scores.info.languages)}")
        return loaded

    def identity(self, texts: Mapping[str, EncodedTexts], batch_tokens: int) -> str:
        """A digest of everything that losses under a mask depend on, except the mask."""
        parts = {
            "fingerprint": self.scores.info.fingerprint.model_dump(mode="json"),
            "dtype": str(self.dtype),
            "batch_tokens": batch_tokens,
            "texts": {part: [of.corpus_digest, of.documents] for part, of in texts.items()},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def encoded(self, corpus: Corpus, max_tokens: int) -> EncodedTexts:
        """Its documents, each cut to `max_tokens` or to what the model has places for."""
        tokenizer = load_tokenizer(self.checkpoint)
        limit = min(max_tokens, self.decoder.positions or max_tokens)
        documents = {
            language: encode(tokenizer, language, of_language, limit, self.decoder.vocabulary).token_ids
            for language, of_language in corpus.documents.items()
        }
        return EncodedTexts(documents, corpus.digest, corpus.split)

    def _load(self, texts: TextSource, split: str) -> Corpus:
        """A split in the scores' languages, in the normal form of the scores' texts unless `texts` names one."""
        form = texts.normalise or self.scores.info.normalised
        return load_corpus(texts.place, split, list(self.languages), texts.text_column, form)

    def _doubts(self, choice: Corpus, report: Corpus, limit_of_scores: int) -> list[str]:
        """Doubts about both splits, and their repeats of each other and of the texts that the scores come from.

        The latter are in the same files; otherwise only the keys in the scores file are compared.
        """
        info, split = self.scores.info, self.scores.info.split or ""
        others = choice.others or {of: {report.split or "": texts} for of, texts in report.documents.items()}
        scored = Corpus({language: of.get(split, ()) for language, of in others.items()}).spread(limit_of_scores)
        in_files = scored.digest == info.corpus_digest
        own = [split] if in_files else []
        lines = doubts(replace(choice, others=others), [report.split or "", *own]) + doubts(report, own)
        if not in_files:
            lines += [line for corpus in (choice, report) for line in repeated_keys(corpus, info.text_keys)]
        return list(dict.fromkeys(lines))
