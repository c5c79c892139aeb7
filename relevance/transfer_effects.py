"""What masks of one checkpoint (a base model) cost it, and cost another of the same shape (its chat model)."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

import crane_serve
from crane_serve.common.atomic import write_atomically
from crane_serve.common.masks import Fingerprint
from crane_serve.common.masks.transfer import read_masks, transferred
from crane_serve.common.models.families import decoder_of
from crane_serve.common.models.load import load_tokenizer
from crane_serve.common.models.resolve import resolve_checkpoint
from crane_serve.common.numbers.bootstrap import Estimate, change_per_token
from crane_serve.common.text.corpus import Corpus
from relevance.encoding import encode
from relevance.model import load_model
from relevance.validation.ablations import Ablations

RESULT_FILE, TABLE_FILE, REPORT_FILE = "pair.json", "pair.csv", "pair.md"

_PART = "test"


class ModelSide(BaseModel):
    """One of the two models, and its nats per token unmasked, by language."""

    model_config = ConfigDict(frozen=True)

    name: str
    fingerprint: Fingerprint
    nats_per_token: dict[str, float]


class TransferEffect(BaseModel):
    """The cost of one mask for both models: changes in nats per token by language, above 0 for a loss."""

    model_config = ConfigDict(frozen=True)

    mask: str
    method: str
    language: str
    neurons: int
    digest: str
    base: dict[str, Estimate]
    chat: dict[str, Estimate]


class TransferEffects(BaseModel):
    """The result: `base` is the model that the masks were made for, `chat` the one they were transferred to."""

    model_config = ConfigDict(frozen=True)

    base: ModelSide
    chat: ModelSide
    corpus_digest: str
    split: str | None
    documents: int
    dtype: str
    effects: list[TransferEffect]
    created_by: str = f"crane-serve {crane_serve.__version__}"

    def save(self, directory: Path) -> list[Path]:
        """Write pair.json, pair.csv and pair.md; returns their paths."""
        contents = {RESULT_FILE: self.model_dump_json(indent=1), TABLE_FILE: self._table(), REPORT_FILE: self._report()}
        for name, content in contents.items():
            write_atomically(directory / name, content.encode())
        return [directory / name for name in contents]

    def _table(self) -> str:
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("mask", "method", "mask_language", "neurons", "model", "language", "change", "low", "high"))
        for effect in self.effects:
            for model, changes in (("base", effect.base), ("chat", effect.chat)):
                for language, of in changes.items():
                    row = (effect.mask, effect.method, effect.language, effect.neurons, model, language)
                    writer.writerow((*row, of.mean, of.low, of.high))
        return file.getvalue()

    def _report(self) -> str:
        languages = list(self.base.nats_per_token)
        lines = [
            "# Base masks on a base and a chat model",
            "",
            f"Base: {self.base.name} (weights {self.base.fingerprint.weights_digest[:12]}). "
            f"Chat: {self.chat.name} (weights {self.chat.fingerprint.weights_digest[:12]}), to which the masks were "
            "transferred.",
            f"Change in nats per token by a mask, with 95 % intervals; {self.documents} documents per language, "
            f"{self.dtype}. Above 0 is a loss.",
            "",
            "| nats per token, unmasked | " + " | ".join(languages) + " |",
            "|---|" + "---|" * len(languages),
        ]
        for name, side in (("base", self.base), ("chat", self.chat)):
            lines.append(f"| {name} | " + " | ".join(f"{side.nats_per_token[of]:.2f}" for of in languages) + " |")
        headings = [f"{model} {language}" for model in ("base", "chat") for language in languages]
        lines += ["", "| mask | neurons | " + " | ".join(headings) + " |", "|---|---|" + "---|" * len(headings)]
        for effect in self.effects:
            cells = [_estimate_text(changes[of]) for changes in (effect.base, effect.chat) for of in languages]
            lines.append(f"| {effect.mask} | {effect.neurons} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def compare(
    base: str,
    chat: str,
    masks: Path,
    names: Sequence[str],
    texts: Corpus,
    directory: Path,
    *,
    max_tokens: int,
    batch_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    revisions: tuple[str | None, str | None] = (None, None),
    start: Callable[[int], None] = lambda masks: None,
    advance: Callable[[str], None] = lambda done: None,
) -> TransferEffects:
    """Measure every mask of the directory `masks` (or those of `names`) on both models; the result is saved.

    revisions: of hub ids; start: called with the number of measurements, one per mask and model; advance: called after
    each. A journal per model in `directory` lets a killed run continue. Raises MaskFileError for no masks,
    FingerprintError for masks of another model than `base`, TransferError when `chat` has another shape.
    """
    checkpoints = [resolve_checkpoint(model, of) for model, of in zip((base, chat), revisions, strict=True)]
    prints = [Fingerprint.of(checkpoint) for checkpoint in checkpoints]
    stored = read_masks(masks, names)
    for mask in stored:
        prints[0].require(mask.info.fingerprint, f"mask {mask.name!r}")
        transferred(mask, prints[1])
    directory.mkdir(parents=True, exist_ok=True)
    start(2 * len(stored))
    sides: list[ModelSide] = []
    changes: list[list[dict[str, Estimate]]] = []
    for name, checkpoint, fingerprint in zip(("base", "chat"), checkpoints, prints, strict=True):
        decoder = decoder_of(load_model(checkpoint, dtype, device))
        tokenizer = load_tokenizer(checkpoint)
        limit = min(max_tokens, decoder.positions or max_tokens)
        documents = {
            language: encode(tokenizer, language, of, limit, decoder.vocabulary).token_ids
            for language, of in texts.documents.items()
        }
        identity = f"{fingerprint.model_dump_json()} {texts.digest} {limit} {batch_tokens} {dtype}"
        ablations = Ablations(
            decoder, {_PART: documents}, batch_tokens, directory / f"ablations-{name}.jsonl", identity
        )
        whole = {language: ablations.losses(None, _PART, language) for language in texts.languages}
        per_token = {language: of.per_token for language, of in whole.items()}
        sides.append(ModelSide(name=checkpoint.name, fingerprint=fingerprint, nats_per_token=per_token))
        changes.append([])
        for mask in stored:
            ablated = {language: ablations.losses(mask.mask, _PART, language) for language in texts.languages}
            estimates = {of: change_per_token(ablated[of].nats, whole[of].nats, ablated[of].tokens) for of in ablated}
            changes[-1].append(estimates)
            advance(f"{name} {mask.name}")
    result = TransferEffects(
        base=sides[0],
        chat=sides[1],
        corpus_digest=texts.digest,
        split=texts.split,
        documents=max(len(of) for of in texts.documents.values()),
        dtype=str(dtype).removeprefix("torch."),
        effects=[
            TransferEffect(
                mask=mask.name,
                method=mask.info.method,
                language=mask.info.language,
                neurons=mask.mask.neurons,
                digest=mask.mask.digest,
                base=of_base,
                chat=of_chat,
            )
            for mask, of_base, of_chat in zip(stored, *changes, strict=True)
        ],
    )
    result.save(directory)
    return result


def _estimate_text(of: Estimate) -> str:
    return f"{of.mean:.2f}" if of.low is None else f"{of.mean:.2f} [{of.low:.2f}, {of.high:.2f}]"
