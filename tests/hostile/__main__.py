"""Prints the table; each case runs in a process of its own, over the packages of the tree that is asked for."""

import argparse
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import tests.hostile
from tests.hostile.case import Case, Outcome

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("crane_serve", "relevance", "clients")
CASE_S = 300


def cases() -> dict[str, Case]:
    """By name: all CASES of the modules beside this one."""
    found: dict[str, Case] = {}
    for module in pkgutil.iter_modules(tests.hostile.__path__):
        if module.name not in ("__main__", "case", "siege"):
            found |= getattr(importlib.import_module(f"tests.hostile.{module.name}"), "CASES", {})
    return dict(sorted(found.items(), key=lambda item: item[1].number))


def measured(name: str, path: str) -> Outcome:
    """The outcome of a case in a process with `path` as its PYTHONPATH."""
    command = [sys.executable, "-P", "-m", "tests.hostile", "--alone", name]
    environment = {**os.environ, "PYTHONPATH": path}
    try:
        run = subprocess.run(
            command, env=environment, cwd="/", capture_output=True, text=True, timeout=CASE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(f"not over after {CASE_S} s", False)
    if run.returncode:
        return Outcome((run.stderr.strip().splitlines() or ["died in silence"])[-1], False)
    return Outcome(**json.loads(run.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=tests.hostile.__doc__)
    parser.add_argument("names", nargs="*", metavar="CASE")
    parser.add_argument("--tree", type=Path, default=ROOT)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    known = cases()
    if arguments.alone is not None:
        print(json.dumps(asdict(known[arguments.alone].measure())))
        return 0
    unknown = set(arguments.names) - known.keys()
    if unknown:
        parser.error(f"unknown cases {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    all_hold = True
    print("| item | case | tried | promised | measured | holds |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "tests").symlink_to(ROOT / "tests")
        for package in PACKAGES:
            (Path(directory) / package).symlink_to((arguments.tree / package).absolute())
        for name in arguments.names or known:
            case, outcome = known[name], measured(name, directory)
            all_hold = all_hold and outcome.holds
            row = (case.number, name, case.tried, case.promised, outcome.measured, "yes" if outcome.holds else "NO")
            print("|", " | ".join(str(cell).replace("|", "/") for cell in row), "|", flush=True)
    return not all_hold


if __name__ == "__main__":
    sys.exit(main())
