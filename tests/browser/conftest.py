"""A browser, servers for it, and visits to the page, each of which fails if the page asks anyone but its server."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect

from benchmarks.browser import NoBrowser, launched
from tests.api.serve_fake import FakeServer
from tests.evaluations import evaluation_of, made_answers, planned_masks

USER_KEY = "a-user-key-of-some-length"
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
_PATIENCE_MS = 30_000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="module")  # a running Playwright leaves its event loop in the thread
def browser() -> Iterator[Browser]:
    """CRANE_REQUIRE_BROWSER=1 makes it an error that there is none."""
    try:
        with launched() as browser:
            expect.set_options(timeout=_PATIENCE_MS)
            yield browser
    except NoBrowser as error:
        if os.environ.get("CRANE_REQUIRE_BROWSER") == "1":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")  # a running Playwright leaves its event loop in the thread
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an evaluation."""
    directory = tmp_path_factory.mktemp("evaluation")
    masks = planned_masks()
    evaluation_of(made_answers(masks), masks).write(directory)
    return directory


@pytest.fixture(scope="module")  # a running Playwright leaves its event loop in the thread
def server(browser: Browser, tmp_path_factory: pytest.TempPathFactory, evaluation: Path) -> Iterator[FakeServer]:
    """Whose engine talks, without keys, with an evaluation."""
    server = FakeServer(tmp_path_factory.mktemp("open"), talks=True, playground=True, evaluation=evaluation)
    yield server
    server.kill()


@pytest.fixture(scope="module")  # a running Playwright leaves its event loop in the thread
def closed_server(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    """Which asks for keys, and has no evaluation."""
    server = FakeServer(
        tmp_path_factory.mktemp("closed"), talks=True, playground=True, user_key=USER_KEY, log_level="debug"
    )
    yield server
    server.kill()


@dataclass
class Visit:
    """One person's look at the page. asked: addresses of all requests; errors: what the browser complained about."""

    page: Page
    url: str
    asked: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def hear(self, line: ConsoleMessage) -> None:
        """Note an error that the browser prints, unless it is an answer of the API, which the page shows."""
        is_answer = line.text.startswith("Failed to load resource") and "/playground/" not in line.location["url"]
        if line.type == "error" and not is_answer:
            self.errors.append(line.text)

    def open(self) -> "Visit":
        """Load the page and wait until it has found out what there is."""
        self.page.goto(self.url)
        expect(self.status("connection")).not_to_have_text("Connecting ...")
        return self

    def status(self, name: str) -> Locator:
        """The line of this element."""
        return self.page.locator(f"#{name} .status")

    def choose(self, *masks: str) -> "Visit":
        """Have these masks compared, and no others."""
        field = self.page.locator("#masks-input")
        field.click()
        while self.page.locator("#masks .token").count():
            field.press("Backspace")
        for mask in masks:
            field.fill(mask)
            field.press("Enter")
        field.press("Escape")
        expect(self.page.locator("#masks .token")).to_have_count(len(masks))
        return self

    def tab(self, name: str) -> "Visit":
        """Open a tab."""
        self.page.get_by_role("tab", name=name).click()
        return self

    def generate(self, prompt: str) -> "Visit":
        """Ask for completions, and wait until they have ended."""
        self.page.get_by_label("Prompt", exact=True).fill(prompt)
        self.page.get_by_role("button", name="Generate", exact=True).click()
        expect(self.status("generated")).to_contain_text("mask")
        expect(self.status("generated")).not_to_contain_text("Generating")
        return self

    def card(self, mask: str) -> Locator:
        """The completion under a mask."""
        return self.page.locator(f'.card[data-mask="{mask}"]')

    def foreign(self) -> list[str]:
        """Addresses of other origins that the page has asked."""
        own = urlsplit(self.url).netloc
        return [
            url for url in self.asked if urlsplit(url).netloc != own and urlsplit(url).scheme not in ("data", "blob")
        ]


@contextmanager
def visiting(browser: Browser, server: FakeServer | str, **options: object) -> Iterator[Visit]:
    """A visit to a server, or to an address. options: of the browser's context."""
    url = server if isinstance(server, str) else f"http://127.0.0.1:{server.port}/"
    with browser.new_context(**{"viewport": WIDE, **options}) as context:
        page = context.new_page()
        page.set_default_timeout(_PATIENCE_MS)
        visit = Visit(page, url)
        context.on("request", lambda request: visit.asked.append(request.url))
        page.on("pageerror", lambda error: visit.errors.append(str(error)))
        page.on("console", visit.hear)
        yield visit
        assert visit.foreign() == []
        assert visit.errors == []


@pytest.fixture
def visit(browser: Browser, server: FakeServer) -> Iterator[Visit]:
    """A visit to a server without keys."""
    with visiting(browser, server) as visit:
        yield visit


@pytest.fixture
def narrow_visit(browser: Browser, server: FakeServer) -> Iterator[Visit]:
    """A visit with a telephone."""
    with visiting(browser, server, viewport=NARROW, has_touch=True, is_mobile=True) as visit:
        yield visit


@pytest.fixture
def stranger(browser: Browser, closed_server: FakeServer) -> Iterator[Visit]:
    """A visit to a server that asks for keys."""
    with visiting(browser, closed_server) as visit:
        yield visit
