"""Web pages that have a visitor's browser ask a server without keys, and servers without keys that others reach."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.api.serve_fake import FakeServer
from tests.hostile.case import Case, Outcome

_PROMPT = b'{"prompt": "a", "max_tokens": 1}'
_NAMED = "attnlrp-zh"


@contextmanager
def _server() -> Iterator[httpx.Client]:
    with tempfile.TemporaryDirectory() as directory:
        server = FakeServer(Path(directory))
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as client:
                yield client
        finally:
            server.kill()


def _outcome(statuses: dict[str, int], masks: httpx.Response) -> Outcome:
    is_there = _NAMED in [mask["name"] for mask in masks.json()["masks"]]
    found = ", ".join(f"{what}: {status}" for what, status in statuses.items())
    kept = "the mask is still there" if is_there else "the mask is gone"
    return Outcome(f"{found}; {kept}", is_there and all(400 <= status < 500 for status in statuses.values()))


def _rebinding() -> Outcome:
    with _server() as client:
        evil = f"evil.example:{client.base_url.port}"
        own = {"host": evil, "origin": f"http://{evil}", "sec-fetch-site": "same-origin"}
        statuses = {
            "GET /masks": client.get("/masks", headers=own).status_code,
            "POST /generate": client.post("/generate", json={"prompt": "a"}, headers=own).status_code,
            "DELETE": client.delete(f"/masks/{_NAMED}", headers=own).status_code,
        }
        return _outcome(statuses, client.get("/masks"))


def _cross_origin() -> Outcome:
    with _server() as client:
        simple = {"content-type": "application/json"}  # so that both trees would read the body
        statuses = {}
        for who, page in (
            ("other page", {"origin": "http://evil.example", "sec-fetch-site": "cross-site"}),
            ("null", {"origin": "null"}),
            ("cross-site", {"sec-fetch-site": "cross-site"}),
            ("another port", {"origin": "http://127.0.0.1:1"}),
        ):
            answer = client.post("/generate", content=_PROMPT, headers={**simple, **page})
            statuses[f"{who}, POST"] = answer.status_code
        plain = {"origin": "http://evil.example", "content-type": "text/plain"}
        statuses["POST as text/plain"] = client.post("/generate", content=_PROMPT, headers=plain).status_code
        foreign = {"origin": "http://evil.example"}
        statuses["other page, DELETE"] = client.delete(f"/masks/{_NAMED}", headers=foreign).status_code
        return _outcome(statuses, client.get("/masks"))


def _public() -> Outcome:
    found = []
    with tempfile.TemporaryDirectory() as directory:
        for host in ("0.0.0.0", "::"):
            command = [sys.executable, "-P", "-m", "crane_serve", "serve", f"{directory}/no-model"]
            command += ["--masks", directory, "--host", host]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            found.append((host, run.returncode, "no API keys" in run.stderr))
    holds = all(code != 0 and says for _, code, says in found)
    said = "; ".join(
        f"--host {host}: {'refused for want of keys' if says else 'nothing said of keys'}" for host, _, says in found
    )
    return Outcome(said, holds)


CASES = {
    "foreign-host": Case(
        9, "DNS rebinding: a page's own name leads here", "each 4xx, the mask still there", _rebinding
    ),
    "foreign-origin": Case(
        9, "a page of another origin posts and deletes", "each 4xx, the mask still there", _cross_origin
    ),
    "public-without-keys": Case(
        9, "a server without keys on all addresses", "does not start without --insecure", _public
    ),
}
