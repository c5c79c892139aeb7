"""How long a person waits for the playground: until it is painted, until it can be used, and for a completion.

Each repetition is a new browser profile. Times are in milliseconds:

- `first paint`, `first contentful paint`: PerformancePaintTiming, from the start of the navigation;
- `connected`: until the page has asked for the masks and shown them;
- `first text`: from a click on Generate to the first words of any completion;
- `round trip`: from that click to the end of all completions.

    python benchmarks/page.py http://127.0.0.1:8000 --mask none --mask attnlrp-zh --repetitions 10
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from browser import launched
from playwright.sync_api import Browser

from crane_serve.common.atomic import write_atomically

_PAINTS = """() => Object.fromEntries(performance.getEntriesByType("paint").map((one) => [one.name, one.startTime]))"""
_CHOOSE = "#masks-input"
_PAINT_NAMES = {"first-paint": "first paint", "first-contentful-paint": "first contentful paint"}


def main() -> None:
    """Measure, print medians with the middle half of the values, and write all values if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--mask", action="append", dest="masks", help="to compare; again for more; default: the page's")
    parser.add_argument("--prompt", default="In the morning the old fisherman went down to the")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--out", type=Path, help="JSON file for all values")
    options = parser.parse_args()
    with launched() as browser:
        measured(browser, options.url, options.masks, options.prompt)  # caches of the server and of the system fill
        runs = [
            measured(browser, options.url, options.masks, options.prompt) for _ in range(max(2, options.repetitions))
        ]
    for name in runs[0]:
        values = [run[name] for run in runs]
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{name:>24} {middle:8.0f} ms  [{low:.0f}, {high:.0f}]  of {len(values)}")
    if options.out is not None:
        write_atomically(options.out, json.dumps(runs, indent=1).encode() + b"\n")


def measured(browser: Browser, url: str, masks: list[str] | None, prompt: str) -> dict[str, float]:
    """The times of one visit, in milliseconds."""
    with browser.new_context() as context, context.new_page() as page:
        began = time.perf_counter()
        page.goto(url)
        page.locator("#connection", has_text="Connected to").wait_for()
        found = {"connected": _ms(began)}
        found |= {_PAINT_NAMES[name]: at for name, at in page.evaluate(_PAINTS).items()}
        if masks is not None:
            page.locator(_CHOOSE).click()
            while page.locator("#masks .token").count():
                page.locator(_CHOOSE).press("Backspace")
            for mask in masks:
                page.locator(_CHOOSE).fill(mask)
                page.locator(_CHOOSE).press("Enter")
            page.keyboard.press("Escape")
        page.locator("#prompt").fill(prompt)
        began = time.perf_counter()
        page.locator("button#generate").click()
        page.locator("#completions .completion:not(:empty)").first.wait_for()
        found["first text"] = _ms(began)
        page.locator("#generated", has_text="Done under").wait_for(timeout=300_000)
        found["round trip"] = _ms(began)
        return found


def _ms(began: float) -> float:
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
