"""A browser for tests and measurements: the system's, or Playwright's own."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class NoBrowser(RuntimeError):
    """There is no browser here."""


@contextmanager
def launched() -> Iterator[Browser]:
    """A headless browser. Raises NoBrowser."""
    with sync_playwright() as playwright:
        found = [path for name in NAMES if (path := shutil.which(name)) is not None]
        own = playwright.chromium.executable_path
        if not found and not Path(own).exists():
            raise NoBrowser(f"none of {', '.join(NAMES)} is in PATH, and Playwright has installed none")
        browser = playwright.chromium.launch(executable_path=found[0] if found else own, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()
