"""Every method on one model: scores on XQuAD paragraphs, choices on a part of NTREX, the report on the rest.

    python benchmarks/methods.py models/gemma-3-270m --xquad DIR --ntrex DIR --out results/methods

XQuAD: `xquad.{lang}.json`; NTREX: `{lang}.txt`, line-aligned, and `document_ids.txt`. Both are turned into corpora,
then the commands below run one after the other; each goes on where it was stopped. The tables of docs/results.md are
the `report.md` that this leaves in OUT/validation.
"""

import argparse
from pathlib import Path

from steps import crane, done, import_corpus

SPLITS = "validation=0.25,test=0.75"


LEARNING = ("--documents", 6, "--max-tokens", 80)


def main() -> None:
    """Run all steps that are not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--xquad", type=Path, required=True)
    parser.add_argument("--ntrex", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/methods"))
    parser.add_argument("--paragraphs", type=int, default=120, help="XQuAD paragraphs per language")
    parser.add_argument("--sentences", type=int, default=32, help="NTREX sentences per language and split")
    parser.add_argument("--max-tokens", type=int, default=128, help="where paragraphs are cut")
    parser.add_argument("--steps", type=int, default=60, help="steps of learning per language")
    parser.add_argument("--seeds", type=int, default=2, help="draws of random controls")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--until", choices=("relevance", "refine", "learn", "validate"), default="validate")
    run(parser.parse_args())


def run(options: argparse.Namespace) -> None:
    """Each step leaves a file behind by which it is known to be done."""
    out = options.out
    xquad, ntrex, scores = out / "xquad", out / "ntrex", out / "scores.safetensors"
    common = ("--dtype", options.dtype)
    texts = ("--corpus", xquad, "--limit", options.paragraphs)
    if not xquad.exists():
        pattern = options.xquad / "xquad.{lang}.json"
        import_corpus("--squad", pattern, "--splits", "relevance=1", "--out", xquad)
    if not ntrex.exists():
        lines = ("--lines", options.ntrex / "{lang}.txt", "--document-ids", options.ntrex / "document_ids.txt")
        import_corpus(*lines, "--by", "line", "--splits", SPLITS, "--out", ntrex)
    if not scores.exists():
        how = ("--max-tokens", options.max_tokens, "--methods", "all", "--halves")
        crane("relevance", options.model, *texts, *common, *how, "--out", scores)
    if options.until == "relevance":
        return
    if not done(scores, "ablation-refined"):
        crane("refine", options.model, scores, *texts, *common)
    if options.until == "refine":
        return
    if not done(scores, "learned"):
        crane("learn", options.model, scores, *texts, *common, "--steps", options.steps, *LEARNING)
    if options.until == "learn":
        return
    halves = ",".join(str(scores.with_name(f"scores-{half}.safetensors")) for half in ("first", "second"))
    controls = ("--seeds", options.seeds, "--like", "learned", "--halves", halves)
    limits = ("--limit", options.sentences)
    crane(
        "validate", options.model, scores, "--corpus", ntrex, *common, *limits, *controls, "--out", out / "validation"
    )


if __name__ == "__main__":
    main()
