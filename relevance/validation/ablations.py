"""Ablations: losses of documents under masks, each measured once and saved in a journal."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from crane_serve.common.atomic import append_whole, write_atomically
from crane_serve.common.masks import NeuronMask
from crane_serve.common.models.decoder import Decoder
from relevance.causal import Losses, losses, masked

_UNMASKED = "none"


class JournalError(ValueError):
    """A journal belongs to other measurements, or is not a journal; the message names the file."""


class Ablations:
    """Measures the cost of masks on `texts`, documents as token ids by part ("validation", "test") and language.

    With a `journal`, measurements survive the process: a line is written for every mask, part and language, and a later
    run with the same `identity` (of everything that determines the results, except masks) measures only the rest.

    Raises JournalError for a journal of another identity.
    """

    def __init__(
        self,
        decoder: Decoder,
        texts: Mapping[str, Mapping[str, Sequence[list[int]]]],
        batch_tokens: int,
        journal: Path | None = None,
        identity: str = "",
    ) -> None:
        self.decoder = decoder
        self.texts = texts
        self.batch_tokens = batch_tokens
        self.measured = 0
        self._known: dict[tuple[str, str, str], list[float]] = {}
        self._journal = journal
        if journal is not None:
            self._open(journal, identity)

    def losses(self, mask: NeuronMask | None, part: str, language: str) -> Losses:
        """Losses in nats of the documents of `part` in `language` under `mask`, None for the unmasked model."""
        documents = self.texts[part][language]
        key = (_UNMASKED if mask is None else mask.digest, part, language)
        if key not in self._known:
            with masked(self.decoder, mask):
                result = losses(self.decoder, documents, self.batch_tokens)
            self._append(key, result.nats.tolist())
            self.measured += 1
        return Losses(np.array(self._known[key]), np.array([len(ids) - 1 for ids in documents], dtype=np.float64))

    def loss(self, mask: NeuronMask, part: str, language: str) -> float:
        """Nats per token that `language` loses by `mask`; below 0 where it gains."""
        return self.losses(mask, part, language).per_token - self.losses(None, part, language).per_token

    def _open(self, journal: Path, identity: str) -> None:
        if not journal.exists():
            write_atomically(journal, json.dumps({"identity": identity}).encode() + b"\n")
            return
        lines = journal.read_bytes().split(b"\n")
        torn = lines.pop()  # empty, unless the process died while it wrote
        try:
            first, *rest = map(json.loads, lines)
            if first["identity"] != identity:
                raise JournalError(
                    f"{journal} holds measurements of another model, other texts or other settings; "
                    "choose another output directory"
                )
            self._known = {(line["mask"], line["part"], line["language"]): line["nats"] for line in rest}
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, JournalError):
                raise
            raise JournalError(f"{journal} is not a journal of ablations: {error}") from error
        if torn:
            os.truncate(journal, journal.stat().st_size - len(torn))

    def _append(self, key: tuple[str, str, str], nats: list[float]) -> None:
        if self._journal is not None:
            line = json.dumps(dict(zip(("mask", "part", "language"), key, strict=True), nats=nats))
            with self._journal.open("ab", buffering=0) as file:
                append_whole(file, line.encode() + b"\n")
        self._known[key] = nats
