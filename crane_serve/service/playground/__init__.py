"""The playground: a static page at / whose scripts call the service's own routes from the browser."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

ROUTE = "playground"
"""What logs and metrics call the requests for the page's files."""

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of every answer with a file of the page: no code but its own, nothing from elsewhere, no frame around it."""

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


@dataclass(frozen=True)
class PageFile:
    """A file of the page."""

    content: bytes
    media_type: str


def is_of_page(method: str, path: str) -> bool:
    """Whether a request is for one of the page's files, which anybody may have."""
    return method in ("GET", "HEAD") and path in FILES


def _files() -> dict[str, PageFile]:
    static = files(__package__).joinpath("static")
    found = sorted(static.iterdir(), key=lambda file: file.name)
    return {
        "/" if file.name == "index.html" else f"/playground/{file.name}": PageFile(
            file.read_bytes(), _TYPES[file.name.rpartition(".")[2]]
        )
        for file in found
    }


FILES: Mapping[str, PageFile] = _files()
"""The page's files by their paths."""
