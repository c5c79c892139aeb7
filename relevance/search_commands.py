"""`crane refine`, `learn`, `validate` and `masks compare`: the commands that switch neurons off and measure the
effect."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from crane_serve.common.bars import bar
from crane_serve.common.hub_name import HUB_NAME
from crane_serve.common.models.resolve import Revision
from crane_serve.common.text.corpus import EMBEDDED_CORPUS
from relevance.sources import TextSource, load_corpus
from relevance.text_options import Normalise, ScoresForm, TextColumn

_Model = Annotated[str, typer.Argument(help="Checkpoint directory or hub id.")]
_Scores = Annotated[Path, typer.Argument(help="File written by `crane relevance`; the new scores are added to it.")]
_Corpus = Annotated[
    str, typer.Option(help="The corpus that the scores come from.", show_default="the packaged parallel corpus")
]
_Split = Annotated[str, typer.Option(help="The split that the scores come from.")]
_Limit = Annotated[int | None, typer.Option(min=1, help="The limit of documents that the scores were made with.")]
_Tokens = Annotated[int, typer.Option(min=8, help="Documents are cut to so many tokens while searching.")]
_Seed = Annotated[int, typer.Option(help="Which documents are drawn, and in what order.")]
_Dtype = Annotated[
    str | None, typer.Option(help="float32 or bfloat16; default: bfloat16, or float32 on a CPU that is slow at it.")
]
_Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: cuda where there is one.")]
_Intervention = Annotated[
    str,
    typer.Option(
        help="What becomes of a neuron that is switched off: zero; mean, its mean activation in all languages; "
        "mean:LANG, in one; median and median:LANG alike."
    ),
]
_Replace = Annotated[bool, typer.Option("--replace", help="Replace existing scores of this method.")]

_NO_START = "none"


def refine(
    model: _Model,
    scores: _Scores,
    revision: Revision = None,
    corpus: _Corpus = str(EMBEDDED_CORPUS),
    split: _Split = "relevance",
    text_column: TextColumn = "text",
    normalise: ScoresForm = None,
    limit: _Limit = None,
    start: Annotated[str, typer.Option("--from", help="Method whose ranking proposes the neurons.")] = "attnlrp",
    candidates: Annotated[int, typer.Option(min=1, help="How many of the best ranked neurons are tried.")] = 512,
    group: Annotated[int, typer.Option(min=1, help="How many neurons are switched off at a time.")] = 8,
    price: Annotated[
        float, typer.Option(min=0.0, help="Nats that the target must lose for each nat another language loses.")
    ] = 2.0,
    documents: Annotated[int, typer.Option(min=1, help="Documents per language to measure on.")] = 8,
    intervention: _Intervention = "zero",
    max_tokens: _Tokens = 80,
    seed: _Seed = 0,
    dtype: _Dtype = None,
    device: _Device = None,
    replace: _Replace = False,
) -> None:
    """Refine a ranking by ablation: neurons that matter to one language more than to the others come first."""
    from relevance.scored_model import ScoredModel
    from relevance.scores import Search
    from relevance.search.refinement import Refinement, refine_scores
    from relevance.selection import order
    from relevance.selection_options import Intervention

    with bar("refine", "groups", f"{scores} of {model}") as progress_bar:
        scored_model = ScoredModel.open(model, scores, dtype, device, revision)
        scored_model.require_absent("ablation-refined", replace=replace)
        instead = Intervention.of_ablation(intervention, scored_model.scores)
        options = Refinement(candidates=candidates, group=group, price=price, documents=documents, seed=seed)
        proposed = order(scored_model.scores, start)
        source = TextSource(corpus, text_column, normalise, lambda doubt: progress_bar.say(f"warning: {doubt}"))
        texts = scored_model.search_texts(source, split, limit, max_tokens)
        progress_bar.start(
            len(scored_model.languages) * 2 * -(-candidates // group),
            what=f"of {group} neurons for {', '.join(scored_model.languages)}, each group alone and then together",
        )
        values, counts = refine_scores(
            scored_model.decoder, texts.documents, proposed, options, lambda _: progress_bar.advance(), instead.values
        )
    search = Search(intervention=intervention, seeds=(seed,))
    scored_model.add_scores(scores, "ablation-refined", values, search, replace=replace)
    for language, count in counts.items():
        typer.echo(f"{scores}: ablation-refined for {language} keeps {count} of {candidates} neurons of {start}")


def learn(
    model: _Model,
    scores: _Scores,
    revision: Revision = None,
    corpus: _Corpus = str(EMBEDDED_CORPUS),
    split: _Split = "relevance",
    text_column: TextColumn = "text",
    normalise: ScoresForm = None,
    limit: _Limit = None,
    budget: Annotated[float, typer.Option(help="Fraction of all neurons that the learned mask switches off.")] = 0.005,
    start: Annotated[str, typer.Option("--from", help="Method whose ranking it starts from, or none.")] = _NO_START,
    steps: Annotated[int, typer.Option(min=1, help="Steps of gradient descent, at most.")] = 64,
    effect: Annotated[float, typer.Option(help="Nats that the target is to lose on average; more is no gain.")] = 1.5,
    hold: Annotated[float, typer.Option(min=0.0, help="Weight of what the other languages lose.")] = 1.0,
    spare: Annotated[
        float,
        typer.Option(help="Nats per token that the others may lose for a mask to be done before the last step."),
    ] = 0.02,
    documents: Annotated[int, typer.Option(min=1, help="Documents per language in a step.")] = 2,
    intervention: _Intervention = "zero",
    target: Annotated[
        Literal["loss", "language"],
        typer.Option(
            help="What the target is to lose: the log-probability of its documents' tokens; or the log of the share of "
            "the next token's probability that its own words have, those more frequent in it than in all others."
        ),
    ] = "loss",
    max_tokens: _Tokens = 56,
    seed: _Seed = 0,
    seeds: Annotated[
        int, typer.Option(min=1, help="How many runs, with SEED and those after it, whose mean is taken.")
    ] = 1,
    dtype: _Dtype = None,
    device: _Device = None,
    replace: _Replace = False,
) -> None:
    """Learn masks by gradient descent: the target language should lose, the others keep their predictions."""
    from relevance.scored_model import ScoredModel
    from relevance.scores import Search
    from relevance.search.agreement import agreed
    from relevance.search.learning import Learning, Target, learn_scores
    from relevance.selection import order
    from relevance.selection_options import Intervention, neurons_of_budget

    with bar("learn", "steps", f"{scores} of {model}") as progress_bar:
        scored_model = ScoredModel.open(model, scores, dtype, device, revision)
        scored_model.require_absent("learned", replace=replace)
        starts = None if start == _NO_START else order(scored_model.scores, start)
        instead = Intervention.of_ablation(intervention, scored_model.scores)
        drawn = tuple(range(seed, seed + seeds))
        options = Learning(
            neurons=neurons_of_budget(budget, scored_model.scores.shape.neurons),
            steps=steps,
            effect=effect,
            hold=hold,
            spare=spare,
            documents=documents,
            target=Target(target),
        )
        source = TextSource(corpus, text_column, normalise, lambda doubt: progress_bar.say(f"warning: {doubt}"))
        texts = scored_model.search_texts(source, split, limit, max_tokens)
        progress_bar.start(seeds * len(scored_model.languages) * steps, what=f"for {', '.join(scored_model.languages)}")
        runs = [
            learn_scores(
                scored_model.decoder,
                texts.documents,
                dataclasses.replace(options, seed=of_run),
                starts,
                lambda step: progress_bar.advance(note=str(step)),
                instead.values,
            )
            for of_run in drawn
        ]
    found = agreed(runs, scored_model.scores.shape.exists, options.neurons)
    search = Search(
        intervention=intervention,
        target=target,
        neurons=options.neurons,
        seeds=drawn,
        jaccard=dict(found.jaccard),
        rank_correlation=dict(found.rank_correlation),
    )
    scored_model.add_scores(scores, "learned", found.scores, search, found.spread, replace=replace)
    typer.echo(f"{scores}: learned {options.neurons} neurons for {', '.join(scored_model.languages)}")
    for language, overlap in found.jaccard.items():
        typer.echo(
            f"{language}: {seeds} seeds share {overlap:.2f} of what two of them choose (Jaccard), rank correlation "
            f"{found.rank_correlation[language]:.2f}"
        )


def validate(
    model: _Model,
    scores: Annotated[Path, typer.Argument(help="File written by `crane relevance`, `crane refine`, `crane learn`.")],
    revision: Revision = None,
    corpus: Annotated[
        str, typer.Option(help="Corpus to measure on.", show_default="the packaged parallel corpus")
    ] = str(EMBEDDED_CORPUS),
    choice_split: Annotated[str, typer.Option(help="Split on which matched effects are searched.")] = "validation",
    report_split: Annotated[str, typer.Option(help="Split on which everything is reported.")] = "test",
    text_column: TextColumn = "text",
    normalise: ScoresForm = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated methods; default: all in SCORES.")] = None,
    budgets: Annotated[str, typer.Option(help="Comma-separated fractions of all neurons.")] = "0.005,0.01,0.02,0.05",
    effect: Annotated[float, typer.Option(help="Nats per token the target loses at matched effect; 0: leave out.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="How many draws of random methods.")] = 3,
    like: Annotated[
        str | None, typer.Option(help="Method whose neurons per layer random controls take over too.")
    ] = None,
    published: Annotated[
        bool, typer.Option(help="Try the selection rules that the methods were published with.")
    ] = True,
    intervention: Annotated[
        str | None,
        typer.Option(
            help="What becomes of the neurons, as of crane select.",
            show_default="that for which a search made a method's scores, else zero",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per language and split; default: all.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Documents are cut to so many tokens.")] = 256,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a batch, with padding.")] = 1024,
    halves: Annotated[
        str | None,
        typer.Option(help="Two files of scores from halves of a corpus, joined with a comma: stability."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for the results; an unfinished run in it is continued.")] = Path(
        "validation"
    ),
    dtype: _Dtype = None,
    device: _Device = None,
) -> None:
    """Measure what the neurons of every method cost every language when they are switched off."""
    from relevance.scored_model import ScoredModel
    from relevance.validation.report import write_all
    from relevance.validation.result import ValidationPlan
    from relevance.validation.validator import run

    with bar("validate", "masks", f"{scores} of {model}") as progress_bar:
        scored_model = ScoredModel.open(model, scores, dtype, device, revision)
        chosen = tuple(name.strip() for name in methods.split(",")) if methods else tuple(scored_model.scores.by_method)
        plan = ValidationPlan(
            methods=chosen,
            budgets=_numbers(budgets),
            effect=effect or None,
            seeds=tuple(range(seeds)),
            matched_to=like,
            published=published,
            intervention=intervention,
        )
        source = TextSource(corpus, text_column, normalise, lambda doubt: progress_bar.say(f"warning: {doubt}"))
        texts = scored_model.validation_texts(source, choice_split, report_split, limit, max_tokens)
        stability = scored_model.halves(halves)
        result = run(
            scored_model,
            texts,
            plan,
            out,
            batch_tokens,
            stability,
            lambda done: progress_bar.advance(note=done),
            lambda masks: progress_bar.start(
                masks, what=f"of {', '.join(chosen)} in {', '.join(scored_model.languages)}"
            ),
        )
    for path in write_all(result, out):
        typer.echo(path)


def compare_masks(
    base: Annotated[str, typer.Argument(help="The model that the masks were made for.")],
    chat: Annotated[str, typer.Argument(help="A model of the same shape to use them on as well.")],
    base_revision: Revision = None,
    chat_revision: Revision = None,
    masks: Annotated[str, typer.Option(help=f"Directory of masks, or {HUB_NAME}.")] = "masks",
    names: Annotated[str | None, typer.Option(help="Comma-separated masks; default: all.")] = None,
    corpus: Annotated[
        str, typer.Option(help="Corpus to measure on.", show_default="the packaged parallel corpus")
    ] = str(EMBEDDED_CORPUS),
    split: Annotated[str, typer.Option(help="Split of the corpus.")] = "test",
    languages: Annotated[str | None, typer.Option(help="Comma-separated languages; default: all.")] = None,
    text_column: TextColumn = "text",
    normalise: Normalise = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per language; default: all.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Documents are cut to so many tokens.")] = 256,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a batch, with padding.")] = 1024,
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = Path("pair"),
    dtype: _Dtype = None,
    device: _Device = None,
) -> None:
    """Measure what masks of BASE cost BASE and, transferred, CHAT. The result has both fingerprints."""
    from crane_serve.common.masks.hub import mask_directory
    from relevance.doubts import doubts
    from relevance.model import pick_device, pick_dtype
    from relevance.transfer_effects import compare

    where = pick_device(device)
    listed = [name.strip() for name in languages.split(",")] if languages else None
    texts = load_corpus(corpus, split, listed, text_column, normalise).spread(limit)
    with bar("masks compare", "masks", f"{masks} on {base} and {chat}") as progress_bar:
        for doubt in doubts(texts):
            progress_bar.say(f"warning: {doubt}")
        result = compare(
            base,
            chat,
            mask_directory(masks),
            [name.strip() for name in names.split(",")] if names else [],
            texts,
            out,
            max_tokens=max_tokens,
            batch_tokens=batch_tokens,
            dtype=pick_dtype(dtype, where),
            device=where,
            revisions=(base_revision, chat_revision),
            start=lambda count: progress_bar.start(count, what=f"in {', '.join(texts.languages)}"),
            advance=lambda done: progress_bar.advance(note=done),
        )
    for path in result.save(out):
        typer.echo(path)


def _numbers(listed: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in listed.split(","))
    except ValueError as error:
        raise ValueError(f"{listed!r} is not a list of numbers; expected fractions joined with commas") from error
