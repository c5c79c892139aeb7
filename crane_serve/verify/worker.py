"""The process of one engine: `python -m crane_serve.verify.worker PLAN`; VLLM_PLUGINS decides about the plugin."""

import sys
import traceback
from pathlib import Path

from crane_serve.engine.offline import OfflineEngine
from crane_serve.verify.plan import Outcome, ProcessPlan, describe
from crane_serve.verify.trial import Engine, Trial, measure_plain


def work(plan: ProcessPlan, engine: Engine) -> None:
    """Run the plan on a started engine, and record each result at once."""
    outcome = Outcome(plan.outcome)
    outcome.record(facts=engine.facts)
    if plan.masks is None:
        outcome.record(plain=measure_plain(engine, rates=plan.throughput))
        return
    plain = Outcome(plan.plain).plain
    reference = Outcome(plan.reference).reference
    mixture = plan.fingerprint.experts is not None
    trial = Trial(engine, plan.masks, plain=plain, reference=reference, rates=plan.throughput, mixture=mixture)
    for check in trial.checks():
        outcome.record(check=check)


def main(plan_file: str) -> int:
    """Start the engine, work, stop it; returns the exit code."""
    plan = ProcessPlan.load(Path(plan_file))
    try:
        engine = OfflineEngine.start(plan.model, plan.flags)
        try:
            work(plan, engine)
        finally:
            engine.stop()
    except Exception as error:  # whatever vLLM raises at start: the report says it in a line, the log in full
        Outcome(plan.outcome).record(error=describe(error))
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
