"""Pages of HTML and Markdown. Markup and control characters in texts have no effect."""

import re
import unicodedata
from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from crane_serve.common.reports.content import Section

if TYPE_CHECKING:
    from jinja2 import Environment

_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # they reorder the text around them
_CONTROL_PICTURES = 0x2400  # Unicode has a sign for each of the first 32 characters
_MARKUP = re.compile(r"[\\`*<|&~$]|\](?=[(\[:])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_DELETE, _DELETE_PICTURE = "\x7f", "\u2421"


def html_page(title: str, sections: Sequence[Section], *, filtered: bool = False) -> str:
    """One HTML file that contains its pictures and needs no other file.

    filtered: add a search box that hides the table rows without its words, if the browser runs scripts.
    """
    template = _templates().get_template("page.html.jinja")
    return template.render(title=title, sections=sections, filtered=filtered)


def markdown_page(title: str, sections: Sequence[Section]) -> str:
    """Markdown with tables as GitHub has them; pictures are linked by the names of their files."""
    return _templates().get_template("page.md.jinja").render(title=title, sections=sections)


def visible(text: str) -> str:
    """The text with control characters, and those that change the direction of writing, as visible signs."""
    return text if text.isprintable() else "".join(map(_visible_character, text))


def cut(text: str, length: int) -> str:
    """At most `length` characters of a text, and how many more it has."""
    return text if len(text) <= length else f"{text[:length]} [... {len(text) - length:,} more characters]"


def _visible_character(character: str) -> str:
    if character in "\n\t":
        return character
    if character < " ":
        return chr(_CONTROL_PICTURES + ord(character))
    if character == _DELETE:
        return _DELETE_PICTURE
    return "\ufffd" if unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTIONS else character


def _shown(value: object) -> object:
    """The text that templates insert for a value."""
    return visible(value) if type(value) is str else value


@cache
def _templates() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("crane_serve.common.reports"),
        autoescape=select_autoescape(enabled_extensions=("html.jinja",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_shown,
    )
    environment.filters["markdown"] = _markdown
    environment.filters["data_uri"] = _data_uri
    return environment


def _markdown(text: str) -> str:
    """A text on one line, with Markdown's markup escaped."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"
