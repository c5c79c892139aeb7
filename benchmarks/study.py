"""Every method on one model: what its neurons cost their language and the others, set to zero and to their mean.

    python benchmarks/study.py models/gemma-3-270m --xquad DIR --ntrex DIR --out results/study

XQuAD: `xquad.{lang}.json`; NTREX: `{lang}.txt`, line-aligned, and `document_ids.txt`. Scores and searches see some
articles of XQuAD. How many neurons cost the target 1 nat per token is chosen on sentences of a part of NTREX. What is
shown is measured on sentences of the rest (news), on paragraphs of the other articles (encyclopaedia) and on questions
about them (questions). Each step goes on where it was stopped. OUT/study.md has the tables of docs/results.md.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import torch
from steps import LANGUAGES, crane, done, import_corpus
from torch import Tensor

from crane_serve.common.atomic import write_atomically
from crane_serve.common.masks import NeuronMask
from crane_serve.common.numbers.bootstrap import Estimate, change_per_token
from crane_serve.common.reports.content import Cell, Section, Table
from crane_serve.common.reports.numbers import interval_text, number_text, percent_text
from crane_serve.common.reports.render import markdown_page
from relevance.methods import find
from relevance.scored_model import EncodedTexts, ScoredModel
from relevance.scores import Scores
from relevance.search.agreement import agreed
from relevance.selection import order
from relevance.selection_options import Intervention, neurons_of_budget
from relevance.sources import load_corpus
from relevance.validation.ablations import Ablations
from relevance.validation.overlap import jaccard, members, stability
from relevance.validation.validator import collateral, fewest

SEEDS = (0, 1, 2)
INTERVENTIONS = ("zero", "mean")
EFFECT = 1.0
TEXTS = ("news", "encyclopaedia", "questions")
SEARCHED = {"learned": INTERVENTIONS, "ablation-refined": ("zero",)}
SHARES = (0.001, 0.01, 0.05, 0.2, 0.5)  # of all neurons, for faithfulness and completeness
CHOICE, SAMPLE = "choice", "sample"  # parts of the texts, beside TEXTS
NEAR = 1.15  # numbers of neurons are chosen to within this ratio
AGREEMENT = 0.001  # of all neurons; fewer than the candidates of a refinement, whose set is given


def main() -> None:
    """Run all steps that are not done, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--xquad", type=Path, required=True)
    parser.add_argument("--ntrex", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/study"))
    parser.add_argument("--documents", type=int, default=128, help="per language, for the choice and for each text")
    parser.add_argument("--max-tokens", type=int, default=48, help="where documents of the choice and the report end")
    parser.add_argument("--steps", type=int, default=64, help="steps of learning, at most")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    keep_options(options)
    import_texts(options)
    score(options)
    study = Study.open(options)
    effects = list(study.effects())
    circuits = list(study.circuits())
    write_atomically(options.out / "study.json", json.dumps([*map(record, effects)], indent=1).encode())
    write_atomically(options.out / "study.md", page(study, effects, circuits).encode())


def keep_options(options: argparse.Namespace) -> None:
    """Leave, if OUT was begun with other options: what is done there would not be done again."""
    path, given = options.out / "options.json", {name: str(value) for name, value in sorted(vars(options).items())}
    if path.exists() and json.loads(path.read_text()) != given:
        sys.exit(f"{path} says that {options.out} was begun with other options; choose another --out")
    write_atomically(path, json.dumps(given, indent=1).encode())


def import_texts(options: argparse.Namespace) -> None:
    """Corpora below OUT, each whole or not there. Questions have the split of their article."""
    xquad = options.out / "xquad"
    with made_whole(xquad) as aside:
        if aside is not None:
            pattern = options.xquad / "xquad.{lang}.json"
            import_corpus("--squad", pattern, "--splits", "relevance=0.45,test=0.55", "--out", aside)
    with made_whole(options.out / "ntrex") as aside:
        if aside is not None:
            lines = ("--lines", options.ntrex / "{lang}.txt", "--document-ids", options.ntrex / "document_ids.txt")
            import_corpus(*lines, "--by", "line", "--splits", "choice=0.25,test=0.75", "--out", aside)
    with made_whole(options.out / "questions") as aside:
        if aside is not None:
            for language in LANGUAGES:
                write_questions(options.xquad / f"xquad.{language}.json", xquad, aside, language)


@contextmanager
def made_whole(directory: Path) -> Iterator[Path | None]:
    """A directory to fill, which then becomes `directory`; None if that is there already."""
    if directory.exists():
        yield None
        return
    aside = directory.with_name(f".{directory.name}")
    shutil.rmtree(aside, ignore_errors=True)
    yield aside
    aside.rename(directory)


def write_questions(source: Path, xquad: Path, out: Path, language: str) -> None:
    """The questions of the paragraphs that the scores do not see."""
    unseen = {document.text for document in load_corpus(xquad, "test", [language]).documents[language]}
    rows = [
        {"id": answer["id"], "split": "test", "text": answer["question"]}
        for article in json.loads(source.read_text())["data"]
        for paragraph in article["paragraphs"]
        if paragraph["context"].strip() in unseen
        for answer in paragraph["qas"]
    ]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(out / f"{language}.jsonl", content.encode())


def score(options: argparse.Namespace) -> None:
    """OUT/scores.safetensors, and a file of its own for every seed of a search and every ablation."""
    scores = options.out / "scores.safetensors"
    common = ("--corpus", options.out / "xquad", "--dtype", options.dtype)
    if not scores.exists():
        how = ("--max-tokens", 128, "--methods", "all", "--halves")
        crane("relevance", options.model, *common, *how, "--out", scores)
    for method, seed, intervention, file in searches(options.out):
        if not file.exists():
            write_atomically(file, scores.read_bytes())
        if not done(file, method):
            where = (options.model, file, *common, "--seed", seed, "--intervention", intervention)
            if method == "learned":
                crane("learn", *where, "--steps", options.steps)
            else:
                crane("refine", *where, "--candidates", 128, "--documents", 4)


def searches(out: Path) -> Iterator[tuple[str, int, str, Path]]:
    """Method, seed, intervention, and the file with its scores."""
    for method, interventions in SEARCHED.items():
        for intervention in interventions:
            for seed in SEEDS:
                yield method, seed, intervention, out / f"{method}-{intervention}-{seed}.safetensors"


@dataclass(frozen=True)
class Effect:
    """What one mask costs. neurons: None, and nothing else, if the whole ranking does not reach the effect. changes:
    nats per token, by text and language; collateral: by text, None where the mask's own language loses nothing."""

    method: str
    seed: int | None
    intervention: str
    language: str
    neurons: int | None
    changes: Mapping[str, Mapping[str, Estimate]]
    collateral: Mapping[str, Estimate | None]


@dataclass(frozen=True)
class Circuit:
    """faithfulness: what the best `neurons` of a language keep when all others are set to their mean, from 0 (all are)
    to 1 (none is); completeness: what is left without them. Means over the languages."""

    method: str
    neurons: int
    faithfulness: float
    completeness: float


@dataclass(frozen=True)
class Ranking:
    """A method's neurons, best first, by language."""

    method: str
    seed: int | None
    intervention: str
    scores: Scores
    orders: Mapping[str, Tensor]

    @cached_property
    def ablation(self) -> Intervention:
        """What becomes of its neurons."""
        return Intervention.of(self.intervention, self.scores)

    def mask(self, language: str, count: int, *, kept: bool = False) -> NeuronMask:
        """The first `count` switched off; kept: all others."""
        off = members(self.orders[language][:count], self.scores.shape.tensor[1:])
        return self.ablation.mask(~off & self.scores.shape.exists if kept else off, self.scores.shape.sizes)


class Study:
    """A model, its scores, and measurements that survive the process."""

    def __init__(self, opened: ScoredModel, texts: Mapping[str, EncodedTexts], out: Path) -> None:
        self.opened = opened
        self.texts = texts
        self.out = out
        self.languages = opened.languages
        documents = {part: of.documents for part, of in texts.items()}
        identity = opened.identity(texts, 1024)
        self.ablations = Ablations(opened.decoder, documents, 1024, out / "ablations.jsonl", identity)

    @classmethod
    def open(cls, options: argparse.Namespace) -> "Study":
        """Load the model and encode all texts."""
        opened = ScoredModel.open(options.model, options.out / "scores.safetensors", options.dtype, None)
        of = {CHOICE: ("ntrex", "choice"), "news": ("ntrex", "test")}
        of |= {"encyclopaedia": ("xquad", "test"), "questions": ("questions", "test")}
        texts = {}
        for part, (corpus, split) in of.items():
            found = load_corpus(options.out / corpus, split, list(opened.languages)).spread(options.documents)
            texts[part] = opened.encoded(found, options.max_tokens)
        sample = {language: of_language[::8] for language, of_language in texts[CHOICE].documents.items()}
        texts[SAMPLE] = EncodedTexts(sample, texts[CHOICE].corpus_digest, texts[CHOICE].split)
        return cls(opened, texts, options.out)

    def rankings(self) -> Iterator[Ranking]:
        """Searches, then every other method, with every seed, set to zero and to the mean."""
        for intervention in INTERVENTIONS:
            yield self.together("learned", intervention)
        for name, run, how, file in searches(self.out):
            yield self.ranking(name, run, how, Scores.load(file))
        for intervention in INTERVENTIONS:
            for method in self.opened.scores.by_method:
                for seed in SEEDS if find(method).matched_to else (None,):
                    yield self.ranking(method, seed, intervention, self.opened.scores)

    def ranking(self, method: str, seed: int | None, intervention: str, scores: Scores) -> Ranking:
        """One of them."""
        return Ranking(method, seed, intervention, scores, order(scores, method, seed=seed or 0))

    def together(self, method: str, intervention: str) -> Ranking:
        """The mean ranking of a search's seeds, as `crane learn --seeds` makes it."""
        files = [file for name, _, how, file in searches(self.out) if (name, how) == (method, intervention)]
        runs = [Scores.load(file) for file in files]
        of_runs = [dict(zip(self.languages, run.of(method), strict=True)) for run in runs]
        means = agreed(of_runs, runs[0].shape.exists, 1).scores
        stacked = torch.stack([means[language] for language in self.languages])
        scores = runs[0].replaced(method, stacked, runs[0].info.searches[method])
        return Ranking(f"{method}, seeds together", None, intervention, scores, order(scores, method))

    def effects(self) -> Iterator[Effect]:
        """At matched effect, on all texts."""
        for ranking in self.rankings():
            for language in self.languages:
                count = self.count(ranking, language)
                print(f"{ranking.method} {ranking.seed} {ranking.intervention} {language}: {count}", flush=True)
                yield self.effect(ranking, language, count)

    def count(self, ranking: Ranking, language: str) -> int | None:
        """How many neurons cost the language `EFFECT`: roughly on an eighth of the documents, then on all."""

        def costs(part: str) -> Callable[[int], bool]:
            return lambda count: self.ablations.loss(ranking.mask(language, count), part, language) >= EFFECT

        rough = fewest(costs(SAMPLE), len(ranking.orders[language]))
        return None if rough is None else near(costs(CHOICE), rough, len(ranking.orders[language]))

    def effect(self, ranking: Ranking, language: str, count: int | None) -> Effect:
        """On the texts for reporting."""
        changes, costs = {}, {}
        if count is None:
            return Effect(ranking.method, ranking.seed, ranking.intervention, language, None, {}, {})
        mask = ranking.mask(language, count)
        for text in TEXTS:
            off = {name: self.ablations.losses(mask, text, name) for name in self.languages}
            whole = {name: self.ablations.losses(None, text, name) for name in self.languages}
            tokens = {name: off[name].tokens for name in self.languages}
            changes[text] = {
                name: change_per_token(off[name].nats, whole[name].nats, tokens[name]) for name in self.languages
            }
            lost = {name: off[name].nats - whole[name].nats for name in self.languages}
            costs[text] = collateral(lost, tokens, language)
        seed, method, intervention = ranking.seed, ranking.method, ranking.intervention
        return Effect(method, seed, intervention, language, count, changes, costs)

    def circuits(self) -> Iterator[Circuit]:
        """Of some rankings, by the mean and on the sample, so that each costs little."""
        rankings = [
            self.ranking(method, None, "mean", self.opened.scores)
            for method in ("attnlrp", "lape", "magnitude", "random")
        ]
        everything = order(self.opened.scores, "attnlrp", "none")
        rankings.append(Ranking("attnlrp without contrast", None, "mean", self.opened.scores, everything))
        learned = Scores.load(self.out / "learned-mean-0.safetensors")
        rankings.append(self.ranking("learned", None, "mean", learned))
        for ranking in rankings:
            for share in SHARES:
                count = round(share * ranking.scores.shape.neurons)
                kept = [self.left(ranking.mask(name, count, kept=True), ranking, name) for name in self.languages]
                without = [self.left(ranking.mask(name, count), ranking, name) for name in self.languages]
                yield Circuit(ranking.method, count, sum(kept) / len(kept), sum(without) / len(without))

    def left(self, mask: NeuronMask, ranking: Ranking, language: str) -> float:
        """1 as good as the whole model, 0 as bad as one with all neurons at their mean."""
        nothing = self.ablations.loss(ranking.mask(language, 0, kept=True), SAMPLE, language)
        return 1 - self.ablations.loss(mask, SAMPLE, language) / nothing


def near(enough: Callable[[int], bool], start: int, most: int) -> int | None:
    """A count that is `enough` while one `NEAR` times smaller is not, looked for around `start`; None if `most` is not
    enough."""
    count = start
    if enough(count):
        while count > 1 and enough(smaller := min(count - 1, round(count / NEAR))):
            count = smaller
        return count
    while count < most:
        count = min(most, max(count + 1, round(count * NEAR)))
        if enough(count):
            return count
    return None


def record(effect: Effect) -> dict[str, object]:
    """As JSON."""
    estimates = {
        text: {name: of.model_dump() for name, of in changes.items()} for text, changes in effect.changes.items()
    }
    costs = {text: None if of is None else of.model_dump() for text, of in effect.collateral.items()}
    plain = {name: getattr(effect, name) for name in ("method", "seed", "intervention", "language", "neurons")}
    return {**plain, "changes": estimates, "collateral": costs}


def page(study: Study, effects: Sequence[Effect], circuits: Sequence[Circuit]) -> str:
    """The tables."""
    sections = [Section("Texts", (), (texts_table(study),))]
    for text in TEXTS:
        sections.append(Section(f"Collateral on {text}", (), (collateral_table(study, effects, text),)))
    sections.append(Section("Faithfulness and completeness", (), (circuits_table(circuits),)))
    sections.append(Section("Agreement", (), (agreement_table(study),)))
    return markdown_page("Every method at matched effect", sections)


def texts_table(study: Study) -> Table:
    rows = []
    for part in (CHOICE, *TEXTS):
        for language in study.languages:
            whole = study.ablations.losses(None, part, language)
            figures = (f"{len(whole.nats)}", f"{int(whole.tokens.sum()):,}", number_text(whole.per_token))
            rows.append((Cell(part), Cell(language), *map(Cell, figures)))
    return Table(("text", "language", "documents", "tokens", "unmasked nats per token"), tuple(rows))


def collateral_table(study: Study, effects: Sequence[Effect], text: str) -> Table:
    """A row for each method and ablation, the least collateral first."""
    groups: dict[tuple[str, str], list[Effect]] = {}
    for effect in effects:
        groups.setdefault((effect.method, effect.intervention), []).append(effect)
    rows = []
    for (method, intervention), of_group in groups.items():
        cells, means = [], []
        for language in study.languages:
            mean, *of_language = language_cells([one for one in of_group if one.language == language], text)
            means.append(mean)
            cells += of_language
        mean = None if None in means else sum(filter(None, means)) / len(means)
        label = "" if mean is None else number_text(mean)
        rows.append((mean, (Cell(method), Cell(intervention), Cell(label, strong=True), *cells)))
    rows.sort(key=lambda row: float("inf") if row[0] is None else row[0])
    columns = [f"{language}: {what}" for language in study.languages for what in ("collateral", "own change (neurons)")]
    return Table(("method", "set to", "mean collateral", *columns), tuple(cells for _, cells in rows))


def language_cells(of_seeds: Sequence[Effect], text: str) -> tuple[float | None, Cell, Cell]:
    """The mean collateral over the seeds of one method, and the cells with it and with the own change."""
    reached = [effect for effect in of_seeds if effect.neurons is not None]
    if len(reached) < len(of_seeds):
        return None, Cell(f"not reached by {len(of_seeds) - len(reached)} of {len(of_seeds)}"), Cell("")
    counts = sorted(effect.neurons or 0 for effect in reached)
    ranged = f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[0]:,} to {counts[-1]:,}"
    own = sum(effect.changes[text][effect.language].mean for effect in reached) / len(reached)
    change = Cell(number_text(own, signed=True), f"({ranged})")
    costs = [cost for effect in reached if (cost := effect.collateral[text]) is not None]
    if len(costs) < len(reached):
        return None, Cell(f"loses nothing here: {len(reached) - len(costs)} of {len(reached)}"), change
    mean = sum(cost.mean for cost in costs) / len(costs)
    return mean, Cell(number_text(mean), spread(costs)), change


def spread(costs: Sequence[Estimate]) -> str:
    """The interval of one mask; of several, from the lowest end to the highest; none unless all have one."""
    ends = [(cost.low, cost.high) for cost in costs if cost.low is not None and cost.high is not None]
    if len(ends) < len(costs):
        return ""
    lows, highs = zip(*ends, strict=True)
    return interval_text(Estimate(mean=costs[0].mean, low=min(lows), high=max(highs)))


def circuits_table(circuits: Sequence[Circuit]) -> Table:
    counts = sorted({circuit.neurons for circuit in circuits})
    rows = []
    for method in dict.fromkeys(circuit.method for circuit in circuits):
        of_method = {circuit.neurons: circuit for circuit in circuits if circuit.method == method}
        figures = [(of_method[count].faithfulness, of_method[count].completeness) for count in counts]
        cells = (Cell(f"{number_text(kept)} / {number_text(without)}") for kept, without in figures)
        rows.append((Cell(method), *cells))
    return Table(("method: faithfulness / completeness", *(f"{count:,} neurons" for count in counts)), tuple(rows))


def agreement_table(study: Study) -> Table:
    """Jaccard overlap of the best `AGREEMENT` of all neurons: from two halves of the corpus, or of every two seeds."""
    halves = [Scores.load(study.out / f"scores-{half}.safetensors") for half in ("first", "second")]
    found = {f"{method}: two halves of the corpus": of for method, of in stability(halves, AGREEMENT).items()}
    for method, interventions in SEARCHED.items():
        for intervention in interventions:
            files = [file for name, _, how, file in searches(study.out) if (name, how) == (method, intervention)]
            runs = [Scores.load(file) for file in files]
            found[f"{method}, {intervention}: mean of pairs of {len(runs)} seeds"] = between_seeds(runs, method)
    rows = [
        (Cell(method), *(Cell(number_text(of[language])) for language in study.languages))
        for method, of in found.items()
    ]
    share = percent_text(AGREEMENT)
    return Table((f"overlap (Jaccard) of the best {share} of all neurons", *study.languages), tuple(rows))


def between_seeds(runs: Sequence[Scores], method: str) -> dict[str, float]:
    """Mean over all pairs, by language."""
    orders = [order(run, method) for run in runs]
    shape, count = runs[0].shape.tensor[1:], neurons_of_budget(AGREEMENT, runs[0].shape.neurons)
    means = {}
    for language in runs[0].info.languages:
        chosen = [members(of[language][:count], shape) for of in orders]
        pairs = [jaccard(*pair) for pair in combinations(chosen, 2)]
        means[language] = sum(pairs) / len(pairs)
    return means


if __name__ == "__main__":
    main()
