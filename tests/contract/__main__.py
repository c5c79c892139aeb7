"""python -m tests.contract [VERSION...]: whether vLLM's source has what the engine needs; of all supported versions, if
none is named.

Exits with 1 if something is broken, or if a version that is named cannot be had. Without a name such a version is left
out, unless CRANE_REQUIRE_CONTRACT=1. `--record`: take the versions' bodies as read.
"""

import json
import os
import sys

from crane_serve.engine.versions import READ_VERSIONS, TESTED_VERSIONS
from tests.contract.check import BODIES, body_digests, check
from tests.contract.source import Source
from tests.contract.wheel import NoWheel, source_of


def main(arguments: list[str]) -> int:
    named = [argument for argument in arguments if argument != "--record"]
    must_have = bool(named) or os.environ.get("CRANE_REQUIRE_CONTRACT", "0") == "1"
    failed = False
    for version in named or (*TESTED_VERSIONS, *READ_VERSIONS):
        try:
            source = Source(source_of(version))
        except NoWheel as error:
            print(f"vLLM {version}: NOT CHECKED, {error}")
            failed |= must_have
            continue
        if "--record" in arguments:
            recorded = json.loads(BODIES.read_text()) | {version: body_digests(source)}
            BODIES.write_text(json.dumps(recorded, indent=2, sort_keys=True) + "\n")
        report = check(source, version)
        print(report)
        failed |= bool(report.breaches)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
