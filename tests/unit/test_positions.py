"""Positions: the forms that are read, their canonical form, and what windows mean."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crane_serve.common.masks import Positions
from crane_serve.common.masks.positions import NEVER, PATTERN

ENDS = st.none() | st.integers(0, 12)
PROMPTS = st.none() | st.tuples(st.integers(-9, 9), st.none() | st.integers(-9, 9))
GENERATED = st.none() | st.tuples(st.integers(0, 9), ENDS)
ANY = st.builds(
    lambda prompt, generated, until: Positions(prompt, generated, tuple(sorted(until))),
    PROMPTS,
    GENERATED,
    st.sets(st.integers(0, 10**9 - 1), max_size=32),
).filter(lambda positions: positions.prompt is not None or positions.generated is not None)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("all", "all"),
        ("prompt", "prompt"),
        ("generated", "generated"),
        ("prompt+generated", "all"),
        ("prompt[:]+generated[0:]", "all"),
        ("prompt[0:]", "prompt"),
        ("generated[:]", "generated"),
        ("prompt[-4:]", "prompt[-4:]"),
        ("prompt[002:-1]", "prompt[2:-1]"),
        ("prompt[:0]", "prompt[:0]"),
        ("generated[0:16]", "generated[:16]"),
        ("prompt[-4:]+generated[:16]", "prompt[-4:]+generated[:16]"),
        ("prompt[-4:] generated[:16] until=9,2,9", "prompt[-4:]+generated[:16]+until=2,9"),
        ("all+until=107,106", "all+until=106,107"),
        ("prompt+generated+until=1", "all+until=1"),
        ("generated[999999999:]+until=999999999", "generated[999999999:]+until=999999999"),
    ],
)
def test_every_form_has_a_canonical_one(text: str, canonical: str) -> None:
    assert str(Positions.parse(text)) == canonical
    assert Positions.parse(canonical) == Positions.parse(text)


def test_the_three_words_are_what_they_were() -> None:
    words = {"all": Positions.ALL, "prompt": Positions.PROMPT, "generated": Positions.GENERATED}
    assert {text: Positions.parse(text) for text in words} == words
    assert [str(positions) for positions in words.values()] == list(words)


@pytest.mark.parametrize(
    "text",
    [
        *("", "first", "ALL", " all", "all ", "all\n", "all[:3]"),
        *("prompt[3]", "prompt[a:b]", "prompt[1:2:3]", "prompt[1:2"),
        *("generated+prompt", "all+prompt", "prompt+prompt", "prompt,generated", "prompt++generated"),
        *("generated[-4:]", "generated[:-1]", "prompt[--1:]", "prompt[+1:]", "prompt[1.0:]", "prompt[٣:]"),
        *("prompt[1000000000:]", "until=3", "all+until=", "all+until=-1", "all+until=1,,2", "all+until=1000000000"),
        *("all+until=1+until=2", "until=1+all", "all;until=1", "all+until=" + ",".join(map(str, range(33)))),
    ],
)
def test_what_is_no_form_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"^.*: expected 'all', 'prompt', 'generated', a window as in") as refusal:
        Positions.parse(text)
    assert repr(text)[:40] in str(refusal.value)
    assert re.search(PATTERN, text.rstrip("\n") + "\0") is None


@pytest.mark.parametrize("value", [None, 3, True, ["all"], b"all"])
def test_what_is_no_text_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="expected 'all'"):
        Positions.parse(value)


def test_an_error_shows_no_more_than_the_beginning() -> None:
    with pytest.raises(ValueError, match="aaa") as refusal:
        Positions.parse("a" * 10**6)
    assert len(str(refusal.value)) < 400


@given(ANY)
def test_the_canonical_form_reads_as_the_same(positions: Positions) -> None:
    assert Positions.parse(str(positions)) == positions
    assert re.search(PATTERN, str(positions)) is not None


@given(ANY, ANY)
def test_different_positions_have_different_forms(one: Positions, other: Positions) -> None:
    assert (str(one) == str(other)) == (one == other)


@given(ANY, st.integers(0, 12), st.integers(0, 12))
def test_windows_are_slices_of_the_prompt_and_of_what_is_generated(
    positions: Positions, prompt_tokens: int, generated_tokens: int
) -> None:
    sequence = list(range(prompt_tokens + generated_tokens))
    prompt, generated = sequence[:prompt_tokens], sequence[prompt_tokens:]
    masked = [] if positions.prompt is None else prompt[slice(*positions.prompt)]
    masked += [] if positions.generated is None else generated[slice(*positions.generated)]
    first, second = positions.windows(prompt_tokens)
    assert [token for token in sequence if token in first or token in second] == masked
    assert 0 <= first.start <= first.stop <= prompt_tokens <= second.start <= second.stop
    is_open = positions.generated is not None and positions.generated[1] is None
    assert (second.stop >= NEVER) == is_open
