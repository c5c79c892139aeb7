"""What an evaluation must compute: under each mask, every distinct prefix of the scored prompts once."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint32]  # [tokens]


@dataclass(frozen=True)
class Computed:
    """tokens: that the server computed; floor: how many it had to compute, with a cache that forgets nothing."""

    tokens: int
    floor: int

    def __str__(self) -> str:
        return f"scores took {self.tokens:,} computed tokens, {self.tokens / max(self.floor, 1):.2f}x of the floor"


class Floor:
    """Counts computed tokens, and the fewest that would have done. Prompts are given once for each item."""

    def __init__(self) -> None:
        self._prompts: dict[Hashable, list[Tokens]] = {}
        self._computed: dict[str, dict[Hashable, int]] = defaultdict(dict)

    def add(self, mask: str, item: Hashable, computed: int | None, prompts: Iterable[Sequence[int]] | None) -> None:
        """Add an answer. computed: None from a server that does not count; prompts: None if they are known already."""
        if computed is not None:
            self._computed[mask][item] = computed
        if prompts is not None:
            self._prompts[item] = [np.array(prompt, np.uint32) for prompt in prompts]

    def computed(self) -> Computed | None:
        """Of all answers whose prompts are known; None if there are none."""
        by_items: dict[frozenset[Hashable], int] = {}
        tokens = floor = 0
        for computed in self._computed.values():
            items = frozenset(computed.keys() & self._prompts.keys())
            if items not in by_items:
                by_items[items] = distinct_prefixes(prompt for item in items for prompt in self._prompts[item])
            tokens += sum(computed[item] for item in items)
            floor += by_items[items]
        return Computed(tokens, floor) if floor else None


def distinct_prefixes(prompts: Iterable[Tokens]) -> int:
    """How many different prefixes the prompts have, the empty one left out: nodes of their tree."""
    before: Tokens = np.empty(0, np.uint32)
    count = 0
    for prompt in sorted(prompts, key=lambda tokens: tokens.astype(">u4").tobytes()):
        count += len(prompt) - _shared(before, prompt)
        before = prompt
    return count


def _shared(one: Tokens, other: Tokens) -> int:
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
