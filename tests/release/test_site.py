"""The documentation site: it builds without warnings, its links lead somewhere, and reading it takes no network."""

import os
import re
import subprocess
import sys
import typing
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer

from crane_serve.cli import app
from crane_serve.service.api.openai import ROUTES
from crane_serve.verify import checks

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LOADED = {"script", "img", "iframe", "source", "video"}  # and links, but those of pages elsewhere
MARKDOWN_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass
class Page(HTMLParser):
    """What a page of the site refers to, and what in it can be referred to."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(given["href"])
        if tag in LOADED and "src" in given:
            self.loads.append(given["src"])


class Site(typing.NamedTuple):
    directory: Path
    log: str
    pages: dict[Path, Page]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    directory = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    log = built.stdout + built.stderr
    assert built.returncode == 0, log
    pages = {}
    for path in sorted(directory.rglob("*.html")):
        pages[path] = Page()
        pages[path].feed(path.read_text())
    return Site(directory, log, pages)


def is_elsewhere(link: str) -> bool:
    return bool(urlsplit(link).scheme or urlsplit(link).netloc)


def problem(site: Site, page: Path, link: str) -> str | None:
    """What is wrong with an internal link of a page."""
    parts = urlsplit(link)
    base = site.directory if parts.path.startswith("/") else page.parent
    target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else page
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return f"{page.name}: {link} leads nowhere"
    fragment = unquote(parts.fragment)
    if fragment and target in site.pages and fragment not in site.pages[target].anchors:
        return f"{page.name}: {link} has no such place"
    return None


def test_it_builds_without_a_warning(site: Site) -> None:
    assert "WARNING" not in site.log
    assert "ERROR" not in site.log


def test_every_document_is_a_page(site: Site) -> None:
    documents = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")}
    assert documents <= {path.relative_to(site.directory) for path in site.pages}


def test_links_lead_somewhere(site: Site) -> None:
    found = [
        problem(site, page, link)
        for page, content in site.pages.items()
        for link in (*content.links, *content.loads)
        if not is_elsewhere(link)
    ]
    assert len(found) > 1000
    assert [wrong for wrong in found if wrong is not None] == []


def test_links_to_elsewhere_are_secure(site: Site) -> None:
    """They are not fetched; `make docs` lists them. The reader's own server is no elsewhere."""
    found = {urlsplit(link) for page in site.pages.values() for link in page.links if is_elsewhere(link)}
    assert {link.scheme for link in found if link.hostname != "127.0.0.1"} == {"https"}


def test_nothing_is_loaded_from_elsewhere(site: Site) -> None:
    assert [link for page in site.pages.values() for link in page.loads if is_elsewhere(link)] == []
    sheets = "".join(path.read_text() for path in site.directory.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"']+", sheets) == []


def test_the_readme_leads_into_the_documents(site: Site) -> None:
    found = [link for link in MARKDOWN_LINK.findall((ROOT / "README.md").read_text()) if not is_elsewhere(link)]
    assert any(link.startswith("docs/") for link in found)
    for link in found:
        parts = urlsplit(link)
        assert (ROOT / parts.path).exists(), link
        if parts.fragment:
            page = site.directory / Path(parts.path).relative_to("docs").with_suffix(".html")
            assert parts.fragment in site.pages[page].anchors, link


def test_every_command_and_route_has_its_place(site: Site) -> None:
    commands = (site.directory / "reference" / "cli.html").read_text()
    group = typer.main.get_command(app)
    names = [
        f"crane {name} {below}".strip()
        for name, command in group.commands.items()  # type: ignore[attr-defined]
        if not command.hidden
        for below in getattr(command, "commands", [""])
    ]
    assert len(names) > 10
    assert [name for name in names if f"<code>{name}</code>" not in commands] == []
    routes = (site.directory / "reference" / "rest.html").read_text()
    own = ("POST /generate", "PUT /masks/{name}", "GET /metrics")
    assert [
        name for name in (*own, *(f"{method} {path}" for path, method in ROUTES.items())) if name not in routes
    ] == []


def test_the_gpu_page_names_every_check_of_verify() -> None:
    page = (DOCS / "gpu-status.md").read_text()
    assert [name for name in checks.ALL if f"| {name} |" not in page] == []


def test_the_built_site_is_not_kept() -> None:
    assert "/site/" in (ROOT / ".gitignore").read_text().splitlines()
