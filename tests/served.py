"""Which architectures vLLM serves under masks as transformers computes them: `python -m tests.served [NAME ...]`.

Makes a tiny random checkpoint of each, generates and scores under random masks with vLLM, and compares the
log-probabilities with transformers, the same neurons scaled. Prints a table; --json keeps the figures. --way says how
vLLM runs: eager (V1), compiled (V1), v2 (eager, through Triton's interpreter); several run beside each other and give
a column each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from crane_serve.common.masks import Fingerprint, MaskLibrary
from crane_serve.common.models.families import available
from relevance.model import load_model
from tests.architectures import ARCHITECTURES, model_class, tiny_checkpoint
from tests.engines import Oracle, random_masks
from tests.runners import environment

EXACT_NATS = 1e-4
MATTERS_NATS = 1e-2
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_AOT_COMPILE": "0",
}
_FAMILIES = Path(__file__).parent / "engine" / "families.py"
WAYS = ("eager", "compiled", "v2")


@dataclass(frozen=True)
class Row:
    """An architecture in the table. Differences from transformers are means per token, the worst of all answers.

    unmasked, masked: nats, None if there are no answers; effect: what the weakest mask changes; problem: why there are
    none, or why they are not exact. All of them are of the first way; others: of each further one masked, or problem.
    relevance: how deep it goes, or why it does not.
    """

    architecture: str
    by_transformers: bool = False
    unmasked: float | None = None
    masked: float | None = None
    effect: float | None = None
    problem: str | None = None
    others: Mapping[str, float | str] = field(default_factory=dict)
    relevance: str = ""

    @property
    def exact(self) -> bool:
        """Whether answers under masks are those of transformers."""
        return self.problem is None and self.masked is not None and self.masked < EXACT_NATS


def rows(
    architectures: Sequence[str], directory: Path, say: Callable[[str], None], ways: Sequence[str] = WAYS[:1]
) -> list[Row]:
    """Make, serve and compare."""
    made: dict[str, str | None] = {}
    for architecture in architectures:
        try:
            random_masks(
                tiny_checkpoint(architecture, directory / architecture),
                _masks(directory, architecture),
                share=0.3,
                offsets=True,
            )
            made[architecture] = None
        except Exception as error:
            made[architecture] = f"no checkpoint: {type(error).__name__}: {error}"
    served = [architecture for architecture, problem in made.items() if problem is None]
    say(f"made {len(served)} checkpoints")
    with ThreadPoolExecutor(len(ways)) as beside:
        by_way = dict(zip(ways, beside.map(lambda way: _answers(served, directory, way), ways), strict=True))
    say(f"served {', '.join(ways)}")
    found = []
    for architecture, problem in made.items():
        if problem is not None:
            found.append(Row(architecture, problem=problem))
            continue
        first, *others = (_row(architecture, directory, answers[architecture]) for answers in by_way.values())
        of_others = {way: other.problem or other.masked for way, other in zip(ways[1:], others, strict=True)}
        found.append(replace(first, others=of_others, relevance=_relevance(architecture, directory / architecture)))
    return found


def _answers(served: Sequence[str], directory: Path, way: str) -> dict[str, list[dict] | str]:
    """What vLLM answers, or why it does not, by architecture."""
    answers: dict[str, list[dict] | str] = {}
    out, log = directory / f"answers-{way}.json", directory / f"vllm-{way}.log"
    added = {**_ENVIRONMENT, **(environment("v2", asynchronous=False) if way == "v2" else {})}
    command = [sys.executable, str(_FAMILIES), str(directory), str(out), *([way] if way == "compiled" else [])]
    while set(served) - answers.keys():
        with log.open("ab") as output:
            subprocess.run(command, stdout=output, stderr=output, env={**os.environ, **added}, check=False)
        if not out.exists():
            raise RuntimeError(log.read_text()[-4000:])
        answers = json.loads(out.read_text())
    return answers


def _row(architecture: str, directory: Path, answer: list[dict] | str) -> Row:
    return Row(architecture, problem=answer) if isinstance(answer, str) else _compared(architecture, directory, answer)


def _relevance(architecture: str, checkpoint: Path) -> str:
    """How deep relevance goes; the proof at load has been passed."""
    try:
        load_model(checkpoint, torch.float32, torch.device("cpu"))
    except ValueError as error:
        return f"no: {error}"
    return "rules" if architecture in available() else "gradients"


def _masks(directory: Path, architecture: str) -> Path:
    return directory / f"{architecture}-masks"


def _compared(architecture: str, directory: Path, answers: list[dict]) -> Row:
    oracle = Oracle(directory / architecture, model_class(architecture))
    library = MaskLibrary.load(_masks(directory, architecture), Fingerprint.of(directory / architecture), "attnlrp")
    apart: dict[bool, list[float]] = {True: [], False: []}
    effects = []
    for answer in answers:
        resolved = library.resolve(answer["mask"])
        token_ids = answer["prompt"] + answer["tokens"]
        expected = oracle.logprobs(token_ids, None if resolved is None else resolved.mask)
        apart[resolved is None].append(_mean_apart(answer["prompt_logprobs"] + answer["logprobs"], expected))
        if resolved is not None:
            effects.append(_mean_apart(expected, oracle.logprobs(token_ids, None)))
    row = Row(architecture, answers[0]["by_transformers"], max(apart[True]), max(apart[False]), min(effects))
    if min(effects) < MATTERS_NATS:
        return replace(row, problem="the masks of the test change too little to tell")
    if max(apart[True]) > EXACT_NATS:
        return replace(row, problem="vLLM and transformers differ without masks")
    if max(apart[False]) > EXACT_NATS:
        return replace(row, problem="masked answers differ from transformers")
    return row


def _mean_apart(some: Sequence[float], others: Sequence[float]) -> float:
    return sum(abs(one - other) for one, other in zip(some, others, strict=True)) / len(others)


def table(found: Sequence[Row]) -> str:
    """The rows in Markdown."""
    ways = [way for row in found[:1] for way in row.others]
    head = ["architecture", "vLLM's code", "exact", "unmasked", "masked", *ways, "relevance", "why not"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in sorted(found, key=lambda row: (not row.exact, row.architecture)):
        figures = ["" if value is None else f"{value:.1e}" for value in (row.unmasked, row.masked)]
        of_ways = {way: row.others.get(way, "") for way in ways}
        code = "Transformers backend" if row.by_transformers else "its own" if row.masked is not None else ""
        depth, _, reason = row.relevance.partition(": ")
        problems = [_line(row.problem), f"relevance: {_line(reason)}" if reason else ""]
        if row.exact:
            problems += [f"{way}: {_line(of)}" for way, of in of_ways.items() if isinstance(of, str) and of]
        cells = (
            row.architecture,
            code,
            "yes" if row.exact else "no",
            *figures,
            *("no" if isinstance(of, str) else f"{of:.1e}" for of in of_ways.values()),
            depth,
            "; ".join(filter(None, problems)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _line(text: str | None) -> str:
    return " ".join((text or "").split())[:160].replace("|", "/")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", metavar="NAME", help="all that are known, if none is named")
    parser.add_argument("--way", choices=WAYS, action="append", help="how vLLM runs; default: eager")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--keep", type=Path, help="directory for checkpoints and the log of vLLM; else a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.keep or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        found = rows(
            options.architectures or ARCHITECTURES,
            directory,
            lambda line: print(line, file=sys.stderr),
            options.way or WAYS[:1],
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=1))
    print(table(found))
    print(f"\n{sum(row.exact for row in found)} of {len(found)} are exact")


if __name__ == "__main__":
    main()
