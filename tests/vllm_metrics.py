"""A process that writes the metrics that an engine of vLLM has from its start: `vllm_metrics.py CHECKPOINT FILE`."""

import sys
from pathlib import Path

from prometheus_client import REGISTRY, generate_latest


def main() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    config = EngineArgs(model=sys.argv[1], dtype="float32", max_model_len=512).create_engine_config()
    PrometheusStatLogger(config, [0])
    Path(sys.argv[2]).write_bytes(generate_latest(REGISTRY))


if __name__ == "__main__":
    main()
