"""A crane server that makes its answers up from the request and the mask, and counts what it is asked."""

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

LANGUAGES = ("en", "vi", "zh")
DAMAGE = 2.0  # nats per token a mask adds to its own language


def fraction(*parts: str) -> float:
    """A number in [0, 1) that depends on nothing but `parts`."""
    return int(hashlib.sha256("|".join(parts).encode()).hexdigest()[:8], 16) / 2**32


class FakeServer:
    """Masks attnlrp-* cost the language that a text begins with; random-* nearly nothing."""

    def __init__(self) -> None:
        self.model = "fake"
        self.fingerprint: dict[str, Any] = {"architecture": "Fake", "layers": 2}
        self.starts: dict[str, Any] = {}  # what it says of start tokens and of its cache
        self.digests = {f"{method}-{language}": f"digest-{method}-{language}"
                        for method in ("attnlrp", "random") for language in LANGUAGES}  # fmt: skip
        self.budgets: dict[str, float] = {}
        self.invalid = [{"name": "broken", "reason": "it is corrupt"}]
        self.default_method: str | None = "attnlrp"
        self.delay_s = 0.0
        self.asked: list[tuple[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.refuse: Callable[[str, str], int | None] = lambda mask, text: None
        self.down = 0
        self.port = 0
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def settle(self) -> None:
        """Wait until nothing has been asked for a while."""
        seen = -1
        while seen != len(self.asked):
            seen = len(self.asked)
            time.sleep(0.3)

    def summary(self, name: str) -> dict[str, Any]:
        method, language = name.split("-")[:2]
        return {"name": name, "digest": self.digests[name], "neurons": 7, "language": language, "method": method,
                "budget": self.budgets.get(name, 0.01)}  # fmt: skip

    def details(self, name: str) -> dict[str, Any]:
        return {**self.summary(name), "neurons_per_layer": [3, 4], "parameters": {"seed": 0}}

    def digest(self, mask: str) -> str:
        """Of a mask or of an expression."""
        return self.digests.get(mask) or f"composed-{mask}"

    def score(self, mask: str, text: str) -> dict[str, Any]:
        language = text.split()[0]
        tokens = 5 + int(20 * fraction(text))
        nll = tokens * (3 + fraction("base", text))
        method, _, target = mask.partition("-")
        if method == "attnlrp":
            nll += tokens * (DAMAGE if target == language else 0.1) * (0.5 + fraction(mask, text))
        elif method == "random":
            nll += tokens * 0.02 * (fraction(mask, text) - 0.5)
        return {"logprob": -nll, "tokens": tokens, "bytes": len(text.encode())}

    def text(self, mask: str, prompt: str) -> str:
        return f" {'masked' if mask != 'none' and fraction(mask, prompt) < 0.5 else 'plain'} answer"

    def _admit(self, mask: str, text: str, body: dict[str, Any]) -> int | None:
        time.sleep(self.delay_s)
        with self._lock:
            self.asked.append((mask, text))
            self.bodies.append(body)
            return self.refuse(mask, text)

    def _used(self, mask: str) -> dict[str, Any] | None:
        return None if mask == "none" else {"name": mask, "digest": self.digest(mask), "neurons": 7}

    def app(self) -> FastAPI:
        app = FastAPI()

        def error(status: int, code: str) -> JSONResponse:
            return JSONResponse({"error": {"code": code, "message": f"fake {code}", "param": None}}, status)

        @app.get("/ready")
        def ready() -> Response:
            if self.down > 0:
                self.down -= 1
                return error(503, "loading")
            said = {"status": "ready", "model": self.model, "fingerprint": self.fingerprint, "version": "0.0.1"}
            return JSONResponse(said | self.starts)

        @app.get("/masks")
        def masks() -> dict[str, Any]:
            listed = [self.summary(name) for name in sorted(self.digests)]
            return {"masks": listed, "invalid": self.invalid, "default_method": self.default_method}

        @app.get("/masks/{name}")
        def mask(name: str) -> Response:
            for candidate in (name, f"{self.default_method}-{name}"):
                if candidate in self.digests:
                    return JSONResponse(self.details(candidate))
            return error(404, "unknown_mask")

        @app.post("/score")
        def score(request: Request, body: dict[str, Any], mask: str = "none") -> Response:
            for part in mask.split(","):
                name = part.partition("@")[0]
                if mask != "none" and name not in self.digests and f"{self.default_method}-{name}" not in self.digests:
                    return error(404, "unknown_mask")
            context = body.get("context", "")
            texts = body.get("text") or [context + continuation for continuation in body["continuations"]]
            status = self._admit(mask, body["text"][0] if "text" in body else context, body)
            if status is not None:
                return error(status, "refused")
            scores = [{**self.score(mask, text), "is_greedy": False} for text in texts]
            used = sum(score["tokens"] for score in scores)
            usage = {"prompt_tokens": used, "completion_tokens": 0, "total_tokens": used}
            if "kv_cache_tokens" in self.starts:
                usage |= {"computed_tokens": used, "cached_tokens": 0}
            prompts = {"prompts": [[*text.encode()] for text in texts]} if body.get("return_prompts") else {}
            return JSONResponse({**prompts, "mask": self._used(mask), "scores": scores, "usage": usage})

        @app.post("/generate")
        def generate(request: Request, body: dict[str, Any], mask: str = "none") -> Response:
            status = self._admit(mask, body["prompt"], body)
            if status is not None:
                return error(status, "refused")
            output = {"index": 0, "text": self.text(mask, body["prompt"]), "finish_reason": "stop",
                      "prompt_tokens": 4, "completion_tokens": 3}  # fmt: skip
            usage = {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
            return JSONResponse({"model": "fake", "mask": self._used(mask), "outputs": [output], "usage": usage})

        return app


@contextmanager
def serving() -> Iterator[FakeServer]:
    """A fake server that answers on a port of its own."""
    fake = FakeServer()
    listener = socket.create_server(("127.0.0.1", 0))
    fake.port = listener.getsockname()[1]
    runner = uvicorn.Server(uvicorn.Config(fake.app(), log_level="warning"))
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield fake
    finally:
        runner.should_exit = True
        thread.join()
        listener.close()
