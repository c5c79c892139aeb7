"""How much an evaluation must compute: distinct prefixes, by hand and by brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.prefixes import Floor, distinct_prefixes


def arrays(*prompts):
    return [np.array(prompt, np.uint32) for prompt in prompts]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([], 0),
        ([[]], 0),
        ([[1, 2, 3]], 3),
        ([[1, 2, 3], [1, 2, 3]], 3),
        ([[1, 2, 3], [1, 2]], 3),
        ([[1, 2, 3], [1, 2, 4], [1, 5]], 5),
        ([[1], [256], [65_536], [2**31]], 4),
        ([[2, 1], [1, 2], [1, 1]], 5),
    ],
)
def test_prefixes_by_hand(prompts, expected):
    assert distinct_prefixes(arrays(*prompts)) == expected


@given(st.lists(st.lists(st.sampled_from([0, 1, 255, 256, 70_000]), max_size=6), max_size=12))
def test_prefixes_by_brute_force(prompts):
    prefixes = {tuple(prompt[:length]) for prompt in prompts for length in range(1, len(prompt) + 1)}
    assert distinct_prefixes(arrays(*prompts)) == len(prefixes)


def test_the_floor_is_counted_for_each_mask():
    floor = Floor()
    floor.add("none", "a", 6, [[1, 2, 3], [1, 2, 4]])
    floor.add("none", "b", 3, [[1, 2, 5]])
    floor.add("zh", "a", 7, None)
    floor.add("zh", "b", 0, None)
    floor.add("vi", "b", 3, None)
    computed = floor.computed()
    assert computed is not None
    assert (computed.tokens, computed.floor) == (19, 5 + 5 + 3)
    assert str(computed) == "scores took 19 computed tokens, 1.46x of the floor"


def test_answers_whose_prompts_are_not_known_are_left_out():
    floor = Floor()
    assert floor.computed() is None
    floor.add("none", "a", 6, None)
    assert floor.computed() is None
    floor.add("none", "b", 3, [[1, 2]])
    floor.add("zh", "b", None, None)  # by a server that does not count
    computed = floor.computed()
    assert computed is not None
    assert (computed.tokens, computed.floor) == (3, 2)
