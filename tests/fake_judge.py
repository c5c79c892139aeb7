"""A made-up judge that keeps what it is asked."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(text: str | None) -> dict[str, Any]:
    return {"id": "1", "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}], "usage": {}}


@dataclass
class FakeJudge:
    """A server that gives `answers` one after another, the last one again and again.

    asked: path, headers in lower case, and body of each request; redirect: where to send them on.
    """

    host: str
    answers: list[tuple[int, Any]] = field(default_factory=lambda: [(200, completion("Rating: [[7]]"))])
    asked: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    redirect: str | None = None

    @property
    def base_url(self) -> str:
        return f"http://{self.host}/v1"

    @property
    def keys(self) -> list[str | None]:
        """Of the requests, None for one without."""
        return [headers.get("authorization") for _, headers, _ in self.asked]


@contextmanager
def judging() -> Iterator[FakeJudge]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            judge.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            status, answer = judge.answers.pop(0) if len(judge.answers) > 1 else judge.answers[0]
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status if judge.redirect is None else 307)
            if judge.redirect is not None:
                self.send_header("location", judge.redirect)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        judge = FakeJudge(f"127.0.0.1:{http.server_port}")
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield judge
        finally:
            http.shutdown()
            thread.join()
