"""`crane relevance`, `select` and `corpus import`. Problems with the input are raised as ValueError."""

from pathlib import Path
from shutil import rmtree
from typing import Annotated, Literal

import typer

from crane_serve.common.bars import bar
from crane_serve.common.models.resolve import Revision, resolve_checkpoint
from crane_serve.common.text.corpus import EMBEDDED_CORPUS, Corpus, CorpusError
from crane_serve.common.text.language_files import EXPECTED
from relevance.corpus_import import Unit, line_parts, parse_splits, squad_parts, write_corpus
from relevance.sources import load_corpus
from relevance.text_options import Normalise, TextColumn


def relevance(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub id.")],
    revision: Revision = None,
    corpus: Annotated[
        str,
        typer.Option(
            help=f"Directory of files {EXPECTED}; or hf:NAME[:CONFIG], a dataset of the Hub whose name or "
            "configuration may hold {lang}.",
            show_default="the packaged parallel corpus",
        ),
    ] = str(EMBEDDED_CORPUS),
    split: Annotated[
        str, typer.Option(help="Split of the corpus to use; a corpus without splits is used whole.")
    ] = "relevance",
    languages: Annotated[
        str | None,
        typer.Option(help="Comma-separated languages; default: all. Of a dataset of the Hub also vi=vie_Latn."),
    ] = None,
    text_column: TextColumn = "text",
    normalise: Normalise = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents per language, at even distances; default: all.")
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write the scores to.")] = Path("scores.safetensors"),
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated methods, or 'all'.",
            show_default="those that one AttnLRP pass serves; of an unknown family, plain gradients and activations",
        ),
    ] = None,
    output_dimensions: Annotated[
        bool, typer.Option("--output-dimensions", help="Score the dimensions of the MLPs' outputs too (crane).")
    ] = False,
    random_tokens: Annotated[
        bool,
        typer.Option(
            "--random-tokens", help="Score random tokens too, by activation methods (crane select --contrast)."
        ),
    ] = False,
    medians: Annotated[
        bool,
        typer.Option("--medians", help="Keep the median activation of each neuron too (crane select --intervention)."),
    ] = False,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a batch, with padding; default: 512 on the CPU, else 2048.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Documents are cut to so many tokens.")] = 2048,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; default: bfloat16, or float32 on a CPU that is slow at it.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: cuda where there is one.")] = None,
    checkpointing: Annotated[
        bool, typer.Option(help="Compute activations again in the backward pass: less memory, a third more time.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes among which the documents are dealt out, by Ray.")] = 1,
    ray_address: Annotated[
        str | None, typer.Option(help="A Ray cluster that shares this file system; default: this machine.")
    ] = None,
    halves: Annotated[
        bool,
        typer.Option(
            "--halves", help="Also write OUT's scores from two halves of the documents, as OUT-first and -second."
        ),
    ] = False,
    server: Annotated[
        str | None,
        typer.Option(
            help="Address of a server of MODEL, started with --activations, which computes the means of neurons: for "
            "magnitude and average-precision, and, if it was started with --gates, for lape and plnd."
        ),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard the progress of an earlier, unfinished run in OUT.progress.")
    ] = False,
) -> None:
    """Score how much each language needs each MLP neuron of MODEL.

    Progress is saved in OUT.progress: the same command continues after the last batch. Through a server none is.
    """
    if server is not None:
        from relevance.served import ServerError

        here = {
            "--checkpointing": checkpointing,
            "--halves": halves,
            "--output-dimensions": output_dimensions,
            "--restart": restart,
            "--workers": workers > 1,
            "--batch-tokens": batch_tokens is not None,
            "--dtype": dtype is not None,
            "--device": device is not None,
        }
        if misplaced := [option for option, used in here.items() if used]:
            raise ServerError(f"--server computes elsewhere; {', '.join(misplaced)} cannot be used with it")
    texts = load_corpus(corpus, split, _names(languages), text_column, normalise).spread(limit)

    from crane_serve.common.models.families import decoder_of
    from crane_serve.common.models.load import architecture_of, load_config
    from relevance.doubts import doubts
    from relevance.method import ScoredMethod, lacking
    from relevance.methods import find_scored
    from relevance.model import load_skeleton, pick_device, pick_dtype
    from relevance.scores import Scores
    from relevance.scoring import Execution, score
    from relevance.served import needs_gates, not_served

    for doubt in doubts(texts):
        typer.echo(f"warning: {doubt}", err=True)
    checkpoint = resolve_checkpoint(model, revision)
    architecture = architecture_of(load_config(checkpoint))
    names, skeleton = _names(methods), decoder_of(load_skeleton(checkpoint))

    def left_out(kind: type[ScoredMethod]) -> bool:
        """Others that the model lacks something for are refused by name later."""
        return names is None or (kind.of_experts and kind.name not in names)

    chosen = [
        kind for kind in find_scored(names, architecture) if lacking(kind, skeleton) is None or not left_out(kind)
    ]
    if methods is None and server is not None:
        chosen = [method for method in chosen if not (not_served(method, skeleton) or needs_gates(method, skeleton))]
    unfinished = out.with_name(f"{out.name}.progress")
    torch_device = pick_device(device)
    of_halves: list[Scores] = []
    with bar("relevance", "documents", f"{', '.join(method.name for method in chosen)} of {model}") as progress_bar:
        scores = score(
            checkpoint,
            texts,
            chosen,
            batch_tokens=batch_tokens or (512 if torch_device.type == "cpu" else 2048),
            max_tokens=max_tokens,
            dtype=pick_dtype(dtype, torch_device),
            device=torch_device,
            output_dimensions=output_dimensions,
            random_tokens=random_tokens,
            medians=medians,
            execution=Execution(checkpointing, workers, ray_address, unfinished, restart),
            server=server,
            each_half=of_halves.append if halves else None,
            start=lambda documents: progress_bar.start(documents, what=f"in {', '.join(texts.languages)}"),
            advance=progress_bar.advance,
        )
        info = scores.info
        for language, truncated, skipped in zip(info.languages, info.truncated, info.skipped, strict=True):
            if truncated:
                progress_bar.say(f"{language}: {truncated} document(s) cut to {info.max_tokens} tokens")
            if skipped:
                progress_bar.say(f"{language}: {skipped} document(s) without a token to predict skipped")
    for name, half in zip(("first", "second"), of_halves, strict=False):
        half.save(out.with_stem(f"{out.stem}-{name}"))
    scores.save(out)
    rmtree(unfinished, ignore_errors=True)
    counts = ", ".join(
        f"{language} {documents} documents, {tokens} tokens"
        for language, documents, tokens in zip(info.languages, info.documents, info.tokens, strict=True)
    )
    typer.echo(f"{out}: {', '.join(scores.by_method)} ({counts})")


def select(
    scores: Annotated[Path, typer.Argument(help="File written by `crane relevance`.")],
    method: Annotated[str, typer.Option(help="Method whose scores rank the neurons.")],
    rule: Annotated[
        Literal["budget", "z", "published", "experts"],
        typer.Option(
            help="Take the first so many, those that stand out by z, or what the method's own rule takes; or whole "
            "experts, which routers then do not choose."
        ),
    ] = "budget",
    budget: Annotated[
        float | None, typer.Option(help="Fraction of all neurons to switch off, 0 to 1.", show_default="0.01")
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Number of neurons to switch off, instead of a budget; or of experts.")
    ] = None,
    z: Annotated[
        float | None, typer.Option(help="Standard deviations above the mean for the rule z.", show_default="1")
    ] = None,
    contrast: Annotated[
        str | None,
        typer.Option(
            help="none, minus-mean, minus-max, share or margin: how languages are compared. Rankings by share alone "
            "prefer tiny neurons. Or random-tokens: the method's own, without neurons that score as high on those.",
            show_default="the method's own",
        ),
    ] = None,
    quotas: Annotated[
        str | None,
        typer.Option(
            help="Neurons per layer: global (as ranked), uniform, or like:METHOD (as many as METHOD, none of its own).",
            show_default="the method's own",
        ),
    ] = None,
    match: Annotated[
        str | None, typer.Option(help="Short for --quotas like:METHOD; 'none' for --quotas global.")
    ] = None,
    overlap: Annotated[
        Literal["shared", "exclusive"],
        typer.Option(help="Whether a neuron may be taken for several languages, or where it ranks best."),
    ] = "shared",
    output_dimensions: Annotated[
        bool, typer.Option("--output-dimensions", help="Take MLP output dimensions too (rules z and published).")
    ] = False,
    intervention: Annotated[
        str | None,
        typer.Option(
            help="What becomes of the neurons: zero; mean, their mean activation in all languages; mean:LANG, in one; "
            "median and median:LANG alike; add:LANG-LANG2, the difference of two means is added.",
            show_default="that for which a search made the scores, else zero",
        ),
    ] = None,
    strength: Annotated[
        float, typer.Option(help="Share of the value that is replaced, or how many times the difference is added.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of methods that draw.")] = 0,
    out: Annotated[Path, typer.Option(help="Directory of masks to write to.")] = Path("masks"),
    name: Annotated[
        str, typer.Option(help="Names of the masks; {method}, {language}, {rule} and {seed} are filled in.")
    ] = "{method}-{language}",
) -> None:
    """Write one mask per language: the neurons that METHOD ranks highest."""
    from relevance.scores import Scores
    from relevance.selection import select as select_neurons
    from relevance.selection_options import Overlap, Rule, SelectionError, SelectionOptions

    thresholds = {
        option: value for option, value in (("budget", budget), ("count", count), ("z", z)) if value is not None
    }
    if (
        len(thresholds) > 1
        or (thresholds and (rule == "z") != ("z" in thresholds))
        or (thresholds and rule == "published")
        or ("budget" in thresholds and rule == "experts")
    ):
        raise SelectionError(f"--{', --'.join(thresholds)} and the rule {rule} do not go together")
    if match is not None and quotas is not None:
        raise SelectionError("--match and --quotas do not go together")
    if match is not None:
        quotas = "global" if match == "none" else f"like:{match}"
    loaded = Scores.load(scores)
    options = SelectionOptions(
        method=method,
        rule=Rule(rule),
        budget=0.01 if budget is None else budget,
        count=count,
        z=1.0 if z is None else z,
        contrast=contrast,
        quotas=quotas,
        overlap=Overlap(overlap),
        seed=seed,
        output_dimensions=output_dimensions,
        intervention=intervention,
        strength=strength,
    )
    selection = select_neurons(loaded, options)
    for path, mask in zip(selection.write(out, loaded, name), selection.masks.values(), strict=True):
        dimensions = "" if mask.output is None else f", {int((mask.output != 1).sum())} output dimensions"
        what = f"{mask.neurons} neurons of {loaded.shape.neurons}{dimensions}"
        typer.echo(f"{path}: {what if mask.router is None else f'{mask.experts_off} experts'}")


def import_corpus(
    out: Annotated[Path, typer.Option(help="Directory to write {lang}.jsonl to.")],
    squad: Annotated[
        str | None,
        typer.Option(help="SQuAD-form JSON files, as 'xquad.{lang}.json': one document per paragraph."),
    ] = None,
    lines: Annotated[
        str | None, typer.Option(help="Line-aligned text files, as '{lang}.txt': line N says the same in each.")
    ] = None,
    document_ids: Annotated[
        Path | None, typer.Option(help="File with the document id of each line of --lines.")
    ] = None,
    by: Annotated[
        Unit | None,
        typer.Option(help="A document is a line, or the lines of one document id.", show_default="document if ids"),
    ] = None,
    languages: Annotated[
        str | None, typer.Option(help="Comma-separated languages; default: every file that fits.")
    ] = None,
    splits: Annotated[
        str | None, typer.Option(help="As relevance=0.6,validation=0.2,test=0.2; a document lies in one split.")
    ] = None,
    normalise: Normalise = None,
) -> None:
    """Turn parallel texts of another form into a corpus directory.

    A document that repeats one of an earlier split word for word is left out, in all languages.
    """
    if (squad is None) == (lines is None):
        raise CorpusError("expected either --squad or --lines")
    shares = parse_splits(splits)
    if squad is not None:
        if document_ids is not None or by is not None:
            raise CorpusError("--document-ids and --by belong to --lines")
        parts = squad_parts(squad, _names(languages))
    else:
        assert lines is not None
        parts = line_parts(lines, _names(languages), document_ids, by, _warn)
    paths = write_corpus(parts, shares, out, normalise, _warn)
    from relevance.doubts import doubts

    names = list(shares)
    whole = Corpus.load(out, languages=list(parts))
    for number, split in enumerate(names or [None]):
        corpus = Corpus.load(out, split, list(parts)) if split else whole
        for doubt in doubts(corpus, names[number + 1 :]):
            _warn(doubt)
    for path, language in zip(paths, parts, strict=True):
        typer.echo(f"{path}: {len(whole.documents[language])} documents")


def _warn(line: str) -> None:
    typer.echo(f"warning: {line}", err=True)


def _names(listed: str | None) -> list[str] | None:
    return None if listed is None else [name.strip() for name in listed.split(",") if name.strip()]
