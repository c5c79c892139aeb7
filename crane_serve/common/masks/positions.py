"""Positions: which tokens of a request its mask applies to."""

import re
from dataclasses import dataclass
from typing import ClassVar

Window = tuple[int, int | None]
"""Start and stop of a half-open window, as in a slice; None for no stop."""

EVERYTHING: Window = (0, None)
NEVER = 2**62
"""An index behind every token."""
_MOST_IDS = 32
_SHOWN = 80  # characters of a text that errors show

_NUMBER = "[0-9]{1,9}"
_PROMPT = rf"prompt(\[(-?{_NUMBER})?:(-?{_NUMBER})?\])?"
_GENERATED = rf"generated(\[({_NUMBER})?:({_NUMBER})?\])?"
_UNTIL = rf"until=({_NUMBER}(,{_NUMBER}){{0,{_MOST_IDS - 1}}})"
PATTERN = rf"^(all|{_PROMPT}|{_GENERATED}|{_PROMPT}[+ ]{_GENERATED})([+ ]{_UNTIL})?$"
"""Of all texts that `Positions.parse` reads, for JSON schemas, too."""
EXPECTED = (
    "expected 'all', 'prompt', 'generated', a window as in 'prompt[-4:]' or 'generated[:16]', or "
    f"'prompt[a:b]+generated[c:d]', maybe with '+until=ID,ID' at the end (at most {_MOST_IDS} token ids); numbers have "
    "at most 9 digits, and only those of the prompt may be negative"
)


@dataclass(frozen=True)
class Positions:
    """The tokens in whose forward pass the mask is applied. A token's forward pass predicts the token after it.

    With `GENERATED` the last token of the prompt is unmasked, and so is the choice of the first generated token. With
    `PROMPT` that choice is masked. All later choices are unmasked, but they attend to a prompt that was masked.

    prompt: the window of the prompt's tokens, where numbers below 0 count from its end; generated: the window of the
    generated tokens; None for none of them. until: token ids, ascending; the first masked token with one of them is the
    last masked token of the request, in its prompt too. Empty for no such end.
    """

    ALL: ClassVar["Positions"]
    PROMPT: ClassVar["Positions"]
    GENERATED: ClassVar["Positions"]

    prompt: Window | None = EVERYTHING
    generated: Window | None = EVERYTHING
    until: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: object) -> "Positions":
        """The positions that a text names, in any of the forms of `PATTERN`.

        A space stands for a plus, which is what becomes of one in a query that is not escaped. Raises ValueError for
        anything else.
        """
        if not isinstance(text, str) or re.fullmatch(PATTERN, text) is None:
            shown = repr(text[:_SHOWN] if isinstance(text, str) else text)[:_SHOWN]
            raise ValueError(f"{shown}: {EXPECTED}")
        windows: dict[str, Window] = {}
        until: tuple[int, ...] = ()
        for part in re.split("[+ ]", text):
            name, _, rest = part.partition("[")
            if name == "all":
                windows = {"prompt": EVERYTHING, "generated": EVERYTHING}
            elif name in ("prompt", "generated"):
                start, _, stop = rest.rstrip("]").partition(":")
                windows[name] = (int(start or 0), int(stop) if stop else None)
            else:
                until = tuple(sorted({int(token_id) for token_id in part.removeprefix("until=").split(",")}))
        return cls(windows.get("prompt"), windows.get("generated"), until)

    def __str__(self) -> str:
        """The canonical form: equal positions have equal ones, and `parse` reads them."""
        parts = [_written("prompt", self.prompt), _written("generated", self.generated)]
        windows = "+".join(part for part in parts if part)
        if windows == "prompt+generated":
            windows = "all"
        return f"{windows}+until={','.join(map(str, self.until))}" if self.until else windows

    def windows(self, prompt_tokens: int) -> tuple[range, range]:
        """The masked tokens of a request, by index: those of its prompt of so many tokens, and those behind it.

        Windows reach as far as the prompt does, as slices do. `until` is left out of account. A range that ends at
        `NEVER` or behind has no end.
        """
        prompt, generated = range(prompt_tokens), range(prompt_tokens, prompt_tokens + NEVER)
        return _part(prompt, self.prompt), _part(generated, self.generated)


Positions.ALL = Positions()
Positions.PROMPT = Positions(generated=None)
Positions.GENERATED = Positions(prompt=None)


def _written(name: str, window: Window | None) -> str:
    if window is None:
        return ""
    start, stop = window
    if window == EVERYTHING:
        return name
    return f"{name}[{start or ''}:{'' if stop is None else stop}]"


def _part(tokens: range, window: Window | None) -> range:
    start, stop = (0, 0) if window is None else window
    part = tokens[slice(start, stop)]
    return range(part.start, max(part.start, part.stop))
