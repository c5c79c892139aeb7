"""Scoring: computes Scores from a model and a corpus, by all requested methods in as few passes as possible."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from crane_serve.common.masks import Fingerprint
from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.families import decoder_of
from crane_serve.common.models.load import load_tokenizer
from crane_serve.common.text.corpus import Corpus
from relevance.encoding import EncodedDocuments, encode
from relevance.method import (
    Measured,
    MethodError,
    OfActivations,
    ScoredMethod,
    Shape,
    require_documents,
    require_known,
    require_languages,
)
from relevance.model import load_skeleton
from relevance.model_passes import units_of
from relevance.progress import Progress, ScoringPlan
from relevance.random_tokens import KEY, random_documents
from relevance.repeats import text_keys
from relevance.scores import Scores, ScoresInfo
from relevance.served import OF_SERVER, Server, measure_served, reductions, require_served
from relevance.shards import Job, Shard, deal, measure_shard, measure_with_ray, merged
from relevance.typical import MeanActivation, MedianActivation, TokenShare


@dataclass(frozen=True)
class Execution:
    """How the work is done. Apart from rounding, these options do not change the result.

    checkpointing: compute activations again instead of keeping them; workers: number of Ray tasks that share the
    documents, 1 for this process alone; ray_address: of a cluster, None for this machine; progress: directory for the
    progress, None to save none; restart: discard saved progress.
    """

    checkpointing: bool = False
    workers: int = 1
    ray_address: str | None = None
    progress: Path | None = None
    restart: bool = False


def score(
    checkpoint: Path,
    corpus: Corpus,
    methods: Sequence[type[ScoredMethod]],
    *,
    batch_tokens: int,
    max_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    output_dimensions: bool = False,
    random_tokens: bool = False,
    medians: bool = False,
    execution: Execution | None = None,
    server: str | None = None,
    each_half: Callable[[Scores], None] | None = None,
    start: Callable[[int], None] = lambda documents: None,
    advance: Callable[[int], None] = lambda documents: None,
) -> Scores:
    """Score the neurons of a local checkpoint on all documents of `corpus`.

    batch_tokens: tokens of a batch with padding; max_tokens: documents are cut to this length, start token included, or
    to the number of the model's learned positions, or to what `server` reads, if that is smaller; output_dimensions:
    score the MLPs' output dimensions too, by the methods that can; random_tokens: score random token sequences too, by
    the methods that look at activations alone and at one language at a time; medians: keep median activations beside
    the means; server: the address of a crane server of this checkpoint, which computes instead of this process, by the
    methods that `served.not_served` lets through; each_half: called with the scores of each half of the documents, too,
    which shows how much the scores depend on the texts; start: called once with the number of documents; advance:
    called with the number of further documents that are done. The caller removes the progress once the scores are
    saved.

    Raises MethodError, CheckpointError, FingerprintError, UnsupportedModelError, CorpusError, NonFiniteError,
    ProgressError, WorkerError and ServerError.
    """
    execution = execution or Execution()
    if each_half is not None and execution.workers > 2:
        raise MethodError(f"halves are dealt out to 1 or 2 workers, not to {execution.workers}")
    require_languages(methods, corpus.languages)
    fingerprint = Fingerprint.of(checkpoint)
    if output_dimensions and fingerprint.experts is not None:
        raise MethodError(f"{fingerprint.architecture} has experts; output dimensions are scored of dense models only")
    decoder = decoder_of(load_skeleton(checkpoint))
    require_known(methods, decoder, fingerprint.architecture)
    if server is not None:
        require_served(methods, decoder)
        for asked, what in ((random_tokens, "random tokens"), (medians, "medians")):
            if asked:
                raise MethodError(f"{what} cannot be computed through a server")
        with Server(server, fingerprint) as running:
            max_tokens = min(max_tokens, running.max_tokens)
    if decoder.sizes != fingerprint.intermediate_sizes:
        raise UnsupportedModelError(f"{checkpoint}: the sizes of the MLP layers differ from those in its config")
    max_tokens = min(max_tokens, decoder.positions or max_tokens)
    tokenizer = load_tokenizer(checkpoint)
    encoded: dict[str, EncodedDocuments] = {
        language: encode(tokenizer, language, documents, max_tokens, decoder.vocabulary)
        for language, documents in corpus.documents.items()
    }
    counts = {language: len(of_language.token_ids) for language, of_language in encoded.items()}
    everything = dict(encoded)
    if random_tokens:
        everything[KEY] = random_documents(tokenizer, encoded, decoder.vocabulary)
    shards = deal(everything, 2 if each_half else execution.workers)
    plain = [method for method in methods if issubclass(method, OfActivations) and method.of_one_language]
    if random_tokens and not plain:
        raise MethodError(
            f"random tokens are scored by methods of activations, such as magnitude and lape, of which none is among "
            f"{', '.join(method.name for method in methods)}"
        )
    for shard in shards if each_half else [Shard(0, {name: of.token_ids for name, of in everything.items()})]:
        require_documents(methods, {name: len(shard.documents.get(name, ())) for name in encoded})
    typical: list[type[Measured]] = [MeanActivation]
    if medians:
        typical.append(MedianActivation)
    if fingerprint.experts is not None:
        typical.append(TokenShare)
    plan = ScoringPlan(
        fingerprint=fingerprint,
        corpus_digest=corpus.digest,
        languages=tuple(everything),
        methods=tuple(method.name for method in (*methods, *typical)),
        output_dimensions=output_dimensions,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        shards=len(shards),
    )
    measured = tuple(method for method in methods if issubclass(method, Measured))
    if measured:
        measured = (*measured, *typical)
    units = replace(units_of(decoder, output_dimensions), experts=fingerprint.experts)
    shape = Shape(corpus.languages, decoder.sizes)
    info = ScoresInfo(
        languages=corpus.languages,
        fingerprint=fingerprint,
        corpus_digest=corpus.digest,
        split=corpus.split,
        documents=tuple(counts.values()),
        tokens=tuple(of_language.tokens for of_language in encoded.values()),
        truncated=tuple(len(of_language.truncated) for of_language in encoded.values()),
        skipped=tuple(len(of_language.skipped) for of_language in encoded.values()),
        max_tokens=max_tokens,
        dtype=plan.dtype,
        normalised=corpus.normalised,
        text_keys=text_keys(corpus),
    )
    start(sum(len(of.token_ids) for of in everything.values()))
    if not measured:
        return _scores(methods, (), shape, info)
    if server is not None:
        info = info.model_copy(update={"dtype": OF_SERVER})
        with Server(server, fingerprint, reductions=reductions(methods, decoder)) as running:
            return _scores(
                methods, measure_served(running, corpus, encoded, tokenizer, measured, units, advance), shape, info
            )
    with TemporaryDirectory(prefix="crane-progress-") as scratch:
        progress = None
        if execution.progress is not None or len(shards) > 1:
            progress = Progress.open(execution.progress or Path(scratch), plan, execution.restart)
        job = Job(
            checkpoint, dtype, device, measured, units, batch_tokens, execution.checkpointing, progress, tuple(plain)
        )
        scores = _scores(methods, _measure(job, shards, execution, advance), shape, info)
        if each_half is not None:
            for shard in shards:
                each_half(_scores(methods, merged(job, [shard]), shape, _info_of(shard, info)))
    return scores


def _measure(
    job: Job, shards: Sequence[Shard], execution: Execution, advance: Callable[[int], None]
) -> Iterable[tuple[str, list[Measured]]]:
    """Every language, in order, with its methods, which have seen all its documents."""
    if execution.workers > 1:
        return measure_with_ray(job, shards, execution.ray_address, advance)
    if len(shards) == 1:
        return measure_shard(job, shards[0], advance)
    for shard in shards:
        for _ in measure_shard(job, shard, advance):
            pass
    return merged(job, shards)


def _scores(
    methods: Sequence[type[ScoredMethod]],
    measured: Iterable[tuple[str, list[Measured]]],
    shape: Shape,
    info: ScoresInfo,
) -> Scores:
    finalised: dict[str, list[Tensor]] = {method.name: [] for method in methods}
    on_random: dict[str, Tensor] = {}
    for language, of_language in measured:
        for instance in of_language:
            if language == KEY:
                on_random[instance.name] = instance.finalise().where(shape.exists, 0).float()
            else:
                finalised.setdefault(instance.name, []).append(instance.finalise())
    means, medians, shares = (
        kind.score(values, shape).float() if (values := finalised.get(kind.name)) else None
        for kind in (MeanActivation, MedianActivation, TokenShare)
    )
    return Scores(
        {method.name: method.score(finalised[method.name], shape).float() for method in methods},
        info,
        _outputs([method for method in methods if issubclass(method, Measured)], finalised, shape),
        means,
        on_random=on_random,
        medians=medians,
        shares=shares,
    )


def _info_of(shard: Shard, info: ScoresInfo) -> ScoresInfo:
    """`info` with the documents and tokens of one half."""
    of_languages = [shard.documents[language] for language in info.languages]
    documents = tuple(map(len, of_languages))
    tokens = tuple(sum(len(ids) - 1 for ids in documents) for documents in of_languages)
    return info.model_copy(update={"documents": documents, "tokens": tokens})


def _outputs(
    methods: Sequence[type[Measured]], finalised: Mapping[str, Sequence[Tensor]], shape: Shape
) -> dict[str, Tensor]:
    by_method = {method.name: method.outputs(finalised[method.name], shape) for method in methods}
    return {name: outputs.float() for name, outputs in by_method.items() if outputs is not None}
