"""Run EleutherAI's harness, unchanged, several times: `python run_lm_eval.py JOBS TASKS OUT`.

JOBS: JSON list of [arguments of the model local-completions, names of tasks]; TASKS: directory of task files; OUT: per
job, the samples of each task, as JSON.
"""

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

if __name__ == "__main__":
    jobs, tasks, out = sys.argv[1:]
    manager = TaskManager(include_path=tasks, include_defaults=False)
    samples = []
    for model_args, names in json.loads(jobs):
        results = lm_eval.simple_evaluate(
            model="local-completions", model_args=model_args, tasks=names, task_manager=manager, log_samples=True
        )
        samples.append(results["samples"])
    Path(out).write_text(json.dumps(samples, default=str))
