"""A template of a plan that runs without end, or takes all memory."""

import resource
import subprocess
import sys

from tests.hostile.case import Case, Outcome

_KILLED_S = 10  # of processor time, for a tree without bounds of its own
_MIB = 2**20
_ALLOWED_MIB = 512
RENDER = """
import sys
from clients.errors import EvaluationError
from clients.templates import Template
try:
    print(len(Template(sys.argv[1]).render({})), "characters")
except EvaluationError as error:
    print("refused:", error)
"""
READ = """
import sys
from pathlib import Path
from clients.errors import EvaluationError
from clients.plan import Plan
path = Path(sys.argv[2])
path.write_text(sys.argv[1])
try:
    Plan.read(path)
except EvaluationError as error:
    print("refused:", error)
"""
REFERENCES = "\n".join(
    [
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]",
        *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)),
        "languages: [en]",
        "tasks: [{kind: perplexity, source: {corpus: embedded}, words: {en: {word: *a9}}}]",
    ]
)


def _bounded() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_KILLED_S, _KILLED_S))
    resource.setrlimit(resource.RLIMIT_AS, (8192 * _MIB, 8192 * _MIB))


def _ran(program: str, *arguments: str) -> Outcome:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        [sys.executable, "-P", "-c", program, *arguments],
        preexec_fn=_bounded,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak_mib = after.ru_maxrss / 1024
    said = run.stdout.strip() or (f"killed after {_KILLED_S} s" if run.returncode < 0 else run.stderr.strip()[-60:])
    bounded = cpu_s < _KILLED_S and peak_mib < _ALLOWED_MIB
    refused = said.startswith("refused:")
    return Outcome(f"{cpu_s:.0f} s of CPU, {peak_mib:.0f} MiB; {'refused' if refused else said}", bounded and refused)


def _plan() -> Outcome:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        return _ran(READ, REFERENCES, f"{directory}/plan.yaml")


CASES = {
    "template-regex": Case(
        14,
        "`regex_replace` with a catastrophic pattern",
        f"an error within {_KILLED_S} s",
        lambda: _ran(RENDER, "{{ ('a' * 40 ~ '!')|regex_replace('^(a+)+$', '') }}"),
    ),
    "template-repeat": Case(
        14,
        "`'a' * 1000000000`",
        f"an error within {_ALLOWED_MIB} MiB",
        lambda: _ran(RENDER, "{{ 'a' * 1000000000 }}"),
    ),
    "template-width": Case(
        14,
        "`'a'|center(1000000000)`",
        f"an error within {_ALLOWED_MIB} MiB",
        lambda: _ran(RENDER, "{{ 'a'|center(1000000000) }}"),
    ),
    "template-loops": Case(
        14,
        "loops of 90,000 in 90,000",
        f"an error within {_KILLED_S} s",
        lambda: _ran(RENDER, "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"),
    ),
    "plan-references": Case(
        14, "a plan of 700 bytes whose YAML references stand for 10^10 words", f"an error within {_KILLED_S} s", _plan
    ),
}
