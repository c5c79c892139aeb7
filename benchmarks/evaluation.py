"""What docs/results.md needs before `crane eval benchmarks/plans/gemma-3-270m.yaml`: texts, scores and masks.

Scores come from some paragraphs of XQuAD; the questions that are asked come from its other paragraphs. Masks of four
methods take 0.5 % of the neurons each, three random draws as many in the same layers as `attnlrp`; further budgets are
for the dose-response. Every step leaves a file behind by which it is known to be done.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from steps import LANGUAGES, crane, done, import_corpus

BUDGET = 0.005
METHODS = ("crane", "attnlrp", "lape", "learned")
DOSES = {
    "crane": (0.02, 0.05, 0.15),
    "attnlrp": (0.0002, 0.0005, 0.001, 0.002),
    "lape": (0.0005, 0.001, 0.02, 0.04),
    "learned": (0.0005, 0.001, 0.002),
}
SEEDS = (0, 1, 2)


def main() -> None:
    """Run all steps that are not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--xquad", type=Path, required=True, help="directory of xquad.{lang}.json")
    parser.add_argument("--ntrex", type=Path, required=True, help="directory of {lang}.txt, line-aligned")
    parser.add_argument("--copa", type=Path, required=True, help="directory of dev.en, val.zh and val.vi, .jsonl")
    parser.add_argument("--questions", type=Path, required=True, help="directory of {lang}.txt, a question a line")
    parser.add_argument("--out", type=Path, default=Path("results/evaluation"))
    parser.add_argument("--paragraphs", type=int, default=100, help="XQuAD paragraphs per language for the scores")
    parser.add_argument("--max-tokens", type=int, default=128, help="where paragraphs are cut for the scores")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--steps", type=int, default=30, help="steps of learning per language, of four short paragraphs"
    )
    run(parser.parse_args())


def run(options: argparse.Namespace) -> None:
    """Corpus, questions, scores, masks."""
    out = options.out
    xquad, scores, masks = out / "xquad", out / "scores.safetensors", out / "masks"
    texts = ("--corpus", xquad, "--limit", options.paragraphs, "--dtype", options.dtype)
    if not xquad.exists():
        import_corpus("--squad", options.xquad / "xquad.{lang}.json", "--splits", "relevance=1", "--out", xquad)
    write_questions(options.xquad, xquad, options.paragraphs, out / "questions")
    for language in LANGUAGES:
        link(out / "questions" / f"open.{language}.txt", options.questions / f"{language}.txt")
    link(out / "ntrex", options.ntrex)
    link(out / "copa", options.copa)
    if not scores.exists():
        how = ("--max-tokens", options.max_tokens, "--methods", "attnlrp,crane,lape,random", "--out", scores)
        crane("relevance", options.model, *texts, *how)
    if not done(scores, "learned"):
        crane("learn", options.model, scores, *texts, "--steps", options.steps, "--documents", 4, "--max-tokens", 64)
    for method in METHODS:
        crane("select", scores, "--method", method, "--budget", BUDGET, "--out", masks)
        for budget in DOSES[method]:
            name = f"{method}-{{language}}-{round(budget * 1e4)}e-4"
            crane("select", scores, "--method", method, "--budget", budget, "--name", name, "--out", masks)
    for seed in SEEDS:
        how = ("--match", "attnlrp", "--seed", seed, "--name", "random-{language}-s{seed}")
        crane("select", scores, "--method", "random", "--budget", BUDGET, *how, "--out", masks)


def write_questions(xquad: Path, corpus: Path, paragraphs: int, out: Path) -> None:
    """XQuAD files with the paragraphs that the scores do not come from."""
    from crane_serve.common.text.corpus import Corpus

    used = Corpus.load(corpus, "relevance", LANGUAGES).spread(paragraphs).documents
    out.mkdir(parents=True, exist_ok=True)
    for language in LANGUAGES:
        seen = {document.text.strip() for document in used[language]}
        content: dict[str, Any] = json.loads((xquad / f"xquad.{language}.json").read_text())
        for article in content["data"]:
            article["paragraphs"] = [one for one in article["paragraphs"] if one["context"].strip() not in seen]
        left = sum(len(article["paragraphs"]) for article in content["data"])
        assert left > 0, f"{language}: no paragraph is left for questions"
        (out / f"xquad.{language}.json").write_text(json.dumps(content, ensure_ascii=False))
        print(f"{out}/xquad.{language}.json: {left} paragraphs that the scores did not see")


def link(path: Path, target: Path) -> None:
    """Let the plan find a text where it looks."""
    if not path.exists():
        path.symlink_to(target.resolve(strict=True))


if __name__ == "__main__":
    main()
