"""A verification: its processes, one after the other, and the report."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from crane_serve.common.masks import Fingerprint
from crane_serve.common.models.load import load_config, require_weights_of
from crane_serve.common.models.resolve import resolve_checkpoint
from crane_serve.verify import checks
from crane_serve.verify.checks import Check
from crane_serve.verify.generated import write_trial_masks
from crane_serve.verify.plan import Outcome, ProcessPlan
from crane_serve.verify.report import Report

WORKER, REFERENCE = "crane_serve.verify.worker", "crane_serve.verify.reference"
_TIMEOUT_S = 1800
_MAX_MODEL_TOKENS = 2048

Launch = Callable[[str, Path, Mapping[str, str], Path], str | None]


@dataclass(frozen=True)
class VerifyOptions:
    """The options of a verification. flags: vLLM's own engine flags; revision: of a hub id."""

    model: str
    masks: Path | None = None
    reference: bool = True
    throughput: bool = True
    flags: tuple[str, ...] = ()
    revision: str | None = None


def run(options: VerifyOptions, progress: Callable[[str], None], launch: Launch | None = None) -> Report:
    """Start the processes in turn, each with the whole machine to itself, and gather their checks.

    Raises ValueError for a model without fingerprint or with missing weights, and for masks that cannot be tried.
    launch: runs a module with a plan, an environment and a log, and returns what went wrong, if anything.
    """
    checkpoint = resolve_checkpoint(options.model, options.revision)
    fingerprint = Fingerprint.of(checkpoint)
    require_weights_of(checkpoint)
    scratch = Path(tempfile.mkdtemp(prefix="crane-verify-"))
    try:
        report = _run(options, checkpoint, fingerprint, scratch, progress, launch or run_process)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(scratch / "masks" if not report.passed else scratch, ignore_errors=True)
    if not report.passed:
        progress(f"logs are in {scratch}")
    return report


def _run(
    options: VerifyOptions,
    checkpoint: Path,
    fingerprint: Fingerprint,
    scratch: Path,
    progress: Callable[[str], None],
    launch: Launch,
) -> Report:
    started = time.monotonic()
    reference_flags = _reference_flags(options.flags)
    masks = write_trial_masks(scratch / "masks", fingerprint, options.masks)
    plain, reference = scratch / "plain.jsonl", scratch / "reference.jsonl"
    plan = ProcessPlan(
        model=checkpoint,
        flags=(*_default_flags(checkpoint, options.flags, fingerprint), *options.flags),
        fingerprint=fingerprint,
        outcome=scratch / "masked.jsonl",
        throughput=options.throughput,
        float32=reference_flags.float32,
        trust_remote_code=reference_flags.trust_remote_code,
        directory=scratch / "masks",
        masks=masks,
        plain=plain,
        reference=reference,
    )
    # These engines must not see the shell's own CRANE_* variables.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CRANE_")}

    def process(what: str, module: str, plan: ProcessPlan, **extra: str) -> str | None:
        progress(f"{what} ...")
        plan_file, log = plan.outcome.with_suffix(".plan.json"), plan.outcome.with_suffix(".log")
        plan.save(plan_file)
        return launch(module, plan_file, {**environment, **extra}, log)

    results: dict[str, Check] = {}
    if not options.reference:
        results[checks.REFERENCE] = checks.skipped(checks.REFERENCE, "--no-reference")
    elif problem := process("transformers", REFERENCE, plan.model_copy(update={"outcome": reference})):
        problem = f"{problem} (--no-reference skips this check)"
        results[checks.REFERENCE] = checks.failed(checks.REFERENCE, problem)
    if not options.throughput:
        results[checks.THROUGHPUT] = checks.skipped(checks.THROUGHPUT, "--no-throughput")

    plain_plan = plan.model_copy(update={"outcome": plain, "masks": None})
    allowed = {"CRANE_ALLOW_UNTESTED_VLLM": "1"}  # verifying an untested vLLM is what this command is for
    lives = {
        "vLLM without the plugin": process("vLLM without the plugin", WORKER, plain_plan, VLLM_PLUGINS=""),
        "vLLM with masks": process("vLLM with masks", WORKER, plan, CRANE_MASKS=str(plan.directory), **allowed),
    }
    outcome = Outcome(plan.outcome)
    results |= {check.name: check for check in (checks.engines_lived(lives), *outcome.checks)}
    missing = "expected an answer, but an engine gave none"
    return Report(
        model=checkpoint.name if Path(options.model).is_dir() else options.model,
        fingerprint=fingerprint,
        masks=f"{len(masks.from_user)} of {options.masks} and generated ones" if options.masks else "generated",
        flags=plan.flags,
        facts=outcome.facts or Outcome(plain).facts,
        checks=tuple(results.get(name) or checks.failed(name, missing) for name in checks.ALL),
        seconds=time.monotonic() - started,
    )


def run_process(module: str, plan: Path, environment: Mapping[str, str], log: Path) -> str | None:
    """Run a module in a process group of its own, which is gone afterwards; returns what went wrong, if anything."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(plan)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code == 0:
        return None
    error = Outcome(ProcessPlan.load(plan).outcome).error
    if error is not None:
        return error
    ended = f"gave no answer for {_TIMEOUT_S} s" if code is None else f"died with exit code {code}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"the process {ended}; its last line: {lines[-1].strip() if lines else 'none'}"


@dataclass(frozen=True)
class _ReferenceFlags:
    float32: bool
    trust_remote_code: bool


def _reference_flags(flags: tuple[str, ...]) -> _ReferenceFlags:
    """The engine flags that the reference by transformers needs, too."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--trust-remote-code", "--trust_remote_code", action="store_true")
    known, _ = parser.parse_known_args(list(flags))
    return _ReferenceFlags(known.dtype in ("float32", "float"), known.trust_remote_code)


def _default_flags(checkpoint: Path, flags: tuple[str, ...], fingerprint: Fingerprint) -> tuple[str, ...]:
    """Flags for small batches, which start quickly and are cut into chunks, and those that an engine with masks has
    anyway: for experts on a GPU, and for a model that reads images. Flags that the user gives are not overridden."""
    import torch

    config = load_config(checkpoint)
    text = config.get_text_config()
    longest = min(_MAX_MODEL_TOKENS, int(getattr(text, "max_position_embeddings", None) or _MAX_MODEL_TOKENS))
    defaults: dict[str, object] = {
        "--max-model-len": longest,
        "--max-num-seqs": 32,
        "--max-num-batched-tokens": 512,
    }
    if fingerprint.experts is not None and torch.cuda.is_available():
        defaults["--moe-backend"] = "triton"
    names = {flag.partition("=")[0].replace("_", "-") for flag in flags}
    with_values = [part for name, value in defaults.items() if name not in names for part in (name, str(value))]
    return (*with_values, *(["--language-model-only"] if text is not config else []))
