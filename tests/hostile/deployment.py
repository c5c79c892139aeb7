"""What the files of a deployment leave open; read from the tree that is asked for."""

import re
from pathlib import Path

from tests.hostile.case import Case, Outcome


def _root() -> Path:
    import crane_serve

    return Path(crane_serve.__file__).resolve().parent.parent


def _hashes() -> Outcome:
    text = (_root() / "Dockerfile").read_text()
    stage = text[text.index(" AS cpu") : text.index(" AS gpu")]
    installs = re.findall(r"pip install ([^&|;]*)", stage)
    bare = [one for one in installs if "--require-hashes" not in one and "--no-index" not in one]
    return Outcome(f"{len(bare)} of {len(installs)} installations take what the index gives", not bare)


def _network() -> Outcome:
    texts = [path.read_text() for path in (_root() / "deploy" / "kubernetes").glob("*.yaml")]
    found = any("kind: NetworkPolicy" in text for text in texts)
    return Outcome("a NetworkPolicy" if found else "no NetworkPolicy", found)


def _grafana() -> Outcome:
    text = (_root() / "compose.yaml").read_text()
    service = text[text.index("\n  grafana:\n    profiles") : text.index("\nsecrets:")]
    holds = "read_only: true" in service
    return Outcome("read-only" if holds else "writable", holds)


CASES = {
    "image-hashes": Case(15, "another file under the same name and version", "the CPU image installs by hash", _hashes),
    "pod-network": Case(15, "pods that anything in the cluster reaches", "a NetworkPolicy", _network),
    "grafana-root": Case(15, "writing to Grafana's root", "read-only", _grafana),
}
