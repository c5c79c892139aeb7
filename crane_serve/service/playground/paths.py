"""Which requests are the playground's: the few of Gradio's routes that the page needs, and no others."""

import re

JOIN, STREAM = "/gradio_api/queue/join", "/gradio_api/queue/data"
ROUTE = "playground"
"""What logs and metrics call all of the page's requests."""

_FILE = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"  # begins with no dot, so that no part of a path is `..`
_READ = re.compile(rf"/|/theme\.css|/favicon\.ico|/manifest\.json|/assets/{_FILE}|/static(?:/{_FILE}){{1,3}}|{STREAM}")


def is_of_page(method: str, path: str) -> bool:
    """Whether the playground answers a request."""
    if method == "POST":
        return path == JOIN
    return method in ("GET", "HEAD") and _READ.fullmatch(path) is not None
