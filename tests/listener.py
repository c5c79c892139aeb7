"""A made-up judge that keeps what it is sent."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Listener:
    """keys: of the requests, None for one without; bodies: of the requests; redirect: where to send them on."""

    def __init__(self) -> None:
        self.host = ""
        self.keys: list[str | None] = []
        self.bodies: list[str] = []
        self.redirect: str | None = None

    @property
    def address(self) -> str:
        return f"http://{self.host}/v1"


@contextmanager
def listening() -> Iterator[Listener]:
    state = Listener()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.bodies.append(self.rfile.read(int(self.headers["content-length"])).decode())
            state.keys.append(self.headers.get("authorization"))
            content = json.dumps({"choices": [{"message": {"content": "Rating: [[7]]"}}]}).encode()
            self.send_response(200 if state.redirect is None else 307)
            if state.redirect is not None:
                self.send_header("location", state.redirect)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.host = f"127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            http.shutdown()
            thread.join()
