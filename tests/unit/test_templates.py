"""Templates of plans: what they make, and that none runs for long or takes much memory. Bounds are of the kernel."""

import json
import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from clients import bounded
from clients.bounded import BoundedError, _Asker
from clients.bounded_process import CPU_S
from clients.errors import EvaluationError
from clients.judge import Judge
from clients.plan import Plan
from clients.templates import Template

TIME, MEMORY, LENGTH = (
    "it takes more than 2 s of processor time",
    "it needs more than 512 MiB",
    "it makes more than 4,194,304",
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ a }}-{{ n }}\n", "xy-3\n"),
        ("{{ a|regex_replace('x(.)', '<\\\\1>') }}", "<y>"),
        ("{% for c in l %}{{ loop.index }}{{ c }} {% endfor %}", "1p 2q "),
        ("{{ '长城' ~ a }}", "长城xy"),
        ("{{ '\ud800' }}", "\ud800"),
    ],
)
def test_what_a_template_makes(text: str, expected: str) -> None:
    assert Template(text).render({"a": "xy", "n": 3, "l": ["p", "q"]}) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ l }}", ["p", "q"]),
        (" {{- l|map('upper') -}} ", ["P", "Q"]),
        ("{{ n / 2 }}", 1.5),
        ("{{ n > 2 }}", True),
        ("{{ {'a': none} }}", {"a": None}),
        ("{{ n }} of", "3 of"),
        ("{{ n }}{{ n }}", "33"),
    ],
)
def test_what_an_expression_is_worth(text: str, expected: object) -> None:
    value = Template(text).value({"n": 3, "l": ["p", "q"]})
    assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{{ a", "unexpected end of template"),
        ("{{ a|nosuch }}", r"No filter named 'nosuch'\."),
        ("{{ a is nosuch }}", r"No test named 'nosuch'\."),
        ("{% for a in b %}{{ a|nosuch }}{% endfor %}", r"No filter named 'nosuch'\."),
        ("{{ " + "(" * 5000, "recursion|nested|parentheses"),
    ],
)
def test_what_is_no_template_is_refused_when_the_plan_is_read(text: str, problem: str) -> None:
    with pytest.raises(EvaluationError, match=problem):
        Template(text)


def test_a_template_runs_nothing_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jinja2 would make constant parts while it compiles."""
    monkeypatch.setattr(bounded, "_answer", lambda question: pytest.fail("asked"))
    Template("{{ 'a'|center(10 ** 10) }}{{ 'a' * 10 ** 10 }}{{ 9 ** 9 ** 9 }}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{{ missing }}", "'missing' is undefined; the row has a"),
        ("{{ a.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% include 'x' %}", "no loader"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_an_error_names_the_template_and_the_row(text: str, problem: str) -> None:
    with pytest.raises(EvaluationError, match=f"^template .*{problem}"):
        Template(text).render({"a": "x"})


BOMBS = {
    "a regular expression": ("{{ ('a' * 40 ~ '!')|regex_replace('^(a+)+$', '') }}", TIME),
    "nested loops": (
        "{% for a in range(90000) %}{% for b in range(90000) %}{% set c = b %}{% endfor %}{% endfor %}",
        TIME,
    ),
    "calls that double": (
        "{% macro m(n) %}{% if n %}{% set x = m(n - 1) %}{% set x = m(n - 1) %}{% endif %}{% endmacro %}{{ m(60) }}",
        TIME,
    ),
    "a sum of a product": ("{% for a in range(90000) %}{% set b = range(90000)|sum %}{% endfor %}", TIME),
    "a power": ("{{ 9 ** (9 ** 9) }}", TIME),
    "a repeated text": ("{{ 'a' * 4000000000 }}", MEMORY),
    "a repeated list": ("{{ [1] * 4000000000 }}", MEMORY),
    "a wide text": ("{{ 'a'|center(4000000000) }}", MEMORY),
    "a wide format": ("{{ '%4000000000d' % 1 }}", MEMORY),
    "a wide format filter": ("{{ '%4000000000d'|format(1) }}", MEMORY),
    "a wide str.format": ("{{ '{:>4000000000}'.format(1) }}", MEMORY),
    "a method of str": ("{{ a.ljust(4000000000) }}", MEMORY),
    "an indent": ("{{ ('a\n' * 100000)|indent(100000) }}", MEMORY),
    "a replacement": ("{{ ('a' * 100000)|replace('a', 'b' * 100000) }}", MEMORY),
    "nested joins": ("{{ ([('a' * 60000)] * 60000)|join }}", MEMORY),
    "doubling": ("{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}", MEMORY),
    "lorem ipsum": ("{{ lipsum(90000) }}", f"{TIME}|{MEMORY}|{LENGTH}"),
    "a long text": ("{{ 'a' * 5000000 }}", LENGTH),
    "a long list": ("{{ [1] * 5000000 }}", f"{LENGTH}|{TIME}|{MEMORY}"),
    "a long range": ("{{ range(1000000000) }}", "Range too big"),
}


def beyond(work: Callable[[Template, dict[str, Any]], object], name: str) -> None:
    text, bound = BOMBS[name]
    template = Template(text)
    with pytest.raises(EvaluationError, match=f"^template .*({bound})"):
        work(template, {"a": "x"})
    assert Template("{{ a }}").render({"a": name}) == name  # and the next is rendered as ever


@pytest.mark.parametrize("name", BOMBS)
def test_no_template_runs_for_long_or_takes_much(name: str) -> None:
    beyond(Template.render, name)


@pytest.mark.parametrize("name", ["a regular expression", "a repeated text", "a long list"])
def test_no_expression_does(name: str) -> None:
    beyond(Template.value, name)


def test_no_error_is_long() -> None:
    with pytest.raises(EvaluationError) as raised:
        Template("{{ {}['a' * 3000000] }}").render({})
    assert len(str(raised.value)) < 2000


def test_bounds_hold_for_each_call_alone() -> None:
    template, asker = Template("{% for b in range(60) %}{% set c = range(90000)|sum %}{% endfor %}{{ a }}"), _Asker()
    question = json.dumps(["render", [str(template), {"a": 1}]]).encode() + b"\n"
    assert asker.ask(question) == b'["1", null]\n'
    process = asker._process
    assert process is not None
    while psutil.Process(process.pid).cpu_times().user < CPU_S + 2:
        assert asker.ask(question) == b'["1", null]\n'
    assert asker._process is process
    asker._end()


def test_an_interrupted_call_leaves_no_answer_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    asker, asked = _Asker(), _Asker._asked

    def interrupted(self: _Asker, question: bytes) -> bytes:
        asked(self, question.replace(b"1", b"2"))
        assert self._process is not None
        self._process.stdin.write(question)  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]
        raise KeyboardInterrupt

    monkeypatch.setattr(_Asker, "_asked", interrupted)
    with pytest.raises(KeyboardInterrupt):
        asker.ask(b'["render", ["{{ a }}", {"a": 1}]]\n')
    monkeypatch.undo()
    assert asker.ask(b'["render", ["{{ a }}", {"a": 3}]]\n') == b'["3", null]\n'
    asker._end()


def test_a_process_that_dies_is_said_so_and_replaced() -> None:
    asker = _Asker()
    with pytest.raises(BoundedError, match="the process that ran it died with exit code 1"):
        asker.ask(b"no JSON\n")
    assert asker.ask(b'["render", ["{{ a }}", {"a": 3}]]\n') == b'["3", null]\n'
    asker._end()


def test_threads_get_their_own_answers() -> None:
    template, wrong = Template("{{ a }}"), []

    def work(name: str) -> None:
        wrong.extend(number for number in range(200) if template.render({"a": f"{name}{number}"}) != f"{name}{number}")

    threads = [threading.Thread(target=work, args=(name,)) for name in "pqrs"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def _rendered(names: list[str]) -> list[str]:
    return [Template("{{ a }}").render({"a": name}) for name in names]


def test_forked_processes_get_their_own_answers() -> None:
    Template("{{ a }}").render({"a": "before"})
    names = [[f"{number}-{part}" for number in range(100)] for part in range(2)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_rendered, names) == names


def test_a_judges_pattern_has_the_same_bounds() -> None:
    judge = Judge.model_validate({"base_url": "https://judge.example", "model": "m", "pattern": "^(a+)+$"})
    with pytest.raises(EvaluationError, match=rf"judge m: pattern '\^\(a\+\)\+\$': {TIME}"):
        judge.score("a" * 40 + "!")


TENFOLD = "\n".join(  # less than 1 KB that stands for 10 to the power of 10 words
    [
        'a0: &a0 ["x","x","x","x","x","x","x","x","x","x"]',
        *(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)),
    ]
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"{TENFOLD}\nlanguages: [en]\n", "more than 100,000 entries"),
        ("languages: &a [*a]\n", "more than 100,000 entries"),
        ("[" * 5000, "nested too deeply"),
    ],
    ids=["tenfold", "itself", "deep"],
)
def test_a_plan_of_endless_references_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=f"{path} is not a plan: .*{problem}"):
        Plan.read(path)
