"""What each check expects. Pure functions of answers: no engine, no files, no clock."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations
from statistics import mean, median

from crane_serve.engine.offline import Answer

ENGINES = "the engines start, answer and stop"
LAYERS = "masks take effect in every layer"
NEIGHBOURS = "unmasked requests are untouched by masked neighbours"
MIXED = "a mixed batch equals uniform batches"
IDLE = "an idle plugin equals vLLM without it"
CACHE = "no prefix-cache leak"
DECODING = "generated tokens score alike when read back"
REFERENCE = "log-probabilities agree with transformers"
THROUGHPUT = "throughput"
ALL = (ENGINES, LAYERS, NEIGHBOURS, MIXED, IDLE, CACHE, DECODING, REFERENCE, THROUGHPUT)

FLOAT32_LIMIT = 1e-3  # nats per token
LOW_PRECISION_LIMIT = 0.05  # nats per token, bfloat16 and float16
UNMASKED_FACTOR = 3  # a masked model in low precision may be further off than the unmasked one, by this factor
ROUNDING_FACTOR = 2  # over what transformers itself loses to the low precision under the same mask
EFFECT_FACTOR = 10  # a mask's effect must exceed the differences by this factor, or the check shows nothing
NOISE_FACTOR = 4  # over the largest difference of two equal runs, where an engine does not repeat its bits
SLOWEST = 0.8
SLOWEST_TWICE = 0.3  # where masked tokens are computed twice
STEADY = 1.5  # the fastest of equal runs may be faster than the slowest by this factor

Logprobs = Sequence[float]  # nats, one per token
Batch = Sequence[Answer]


class Status(StrEnum):
    """How a check went."""

    PASS = "PASS"
    FAIL = "FAIL"
    SKIPPED = "SKIPPED"


@dataclass(frozen=True)
class Check:
    """A check's verdict, what was measured and what is allowed. problem: expected and got, or why it was skipped."""

    name: str
    status: Status
    measured: str = ""
    limit: str = ""
    problem: str = ""


def failed(name: str, problem: str) -> Check:
    """A check that could not be made, which is a failure."""
    return Check(name, Status.FAIL, problem=problem)


def skipped(name: str, reason: str) -> Check:
    """A check that was not asked for, or cannot exist on this engine."""
    return Check(name, Status.SKIPPED, problem=reason)


def engines_lived(problems: Mapping[str, str | None]) -> Check:
    """Per engine, what went wrong with its process, if anything."""
    dead = [f"{engine}: {problem}" for engine, problem in problems.items() if problem is not None]
    return _verdict(ENGINES, dead, f"{len(problems) - len(dead)} of {len(problems)}", "all")


def _verdict(name: str, problems: Sequence[str], measured: str, limit: str) -> Check:
    summary = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
    return Check(name, Status.FAIL if problems else Status.PASS, measured, limit, summary)


def largest_difference(left: Logprobs, right: Logprobs) -> float:
    """Largest absolute difference of log-probabilities of the same tokens; infinite if they cannot be compared."""
    if len(left) != len(right) or not all(map(math.isfinite, (*left, *right))):
        return math.inf
    return max((abs(a - b) for a, b in zip(left, right, strict=True)), default=0.0)


def mean_difference(left: Logprobs, right: Logprobs) -> float:
    """Mean absolute difference of log-probabilities of the same tokens; infinite if they cannot be compared."""
    if largest_difference(left, right) == math.inf or not left:
        return math.inf
    return mean(abs(a - b) for a, b in zip(left, right, strict=True))


@dataclass(frozen=True)
class Repeat:
    """How well an engine repeats itself: the control of every comparison that expects equal bits.

    Where two equal runs differ, only the log-probabilities of prompts can be compared, within a multiple of that.
    """

    bitwise: bool
    limit: float  # nats

    @classmethod
    def of(cls, first: Batch, again: Batch) -> "Repeat":
        """From the answers of two runs of equal requests."""
        if list(first) == list(again):
            return cls(True, 0.0)
        noise = max(largest_difference(a.prompt_logprobs, b.prompt_logprobs) for a, b in zip(first, again, strict=True))
        # Noise that rounding cannot explain is a defect, and must not hide other defects.
        return cls(False, NOISE_FACTOR * noise if noise <= LOW_PRECISION_LIMIT else 0.0)

    def apart(self, left: Answer, right: Answer) -> float:
        """Largest difference in nats; infinite for different tokens."""
        scored = largest_difference(left.prompt_logprobs, right.prompt_logprobs)
        if not self.bitwise:
            return scored
        if left.tokens != right.tokens:
            return math.inf
        return max(scored, largest_difference(left.logprobs, right.logprobs))

    def __str__(self) -> str:
        if self.bitwise:
            return "bit-identical"
        return f"{self.limit:.2g} nats for prompts, since equal requests are not bit-identical here"


def _nats(difference: float) -> str:
    return "other tokens or no finite log-probabilities" if difference == math.inf else f"{difference:.3g} nats"


def _not_finite(answers: Iterable[tuple[str, Logprobs]]) -> list[str]:
    return [
        f"{what}: expected finite log-probabilities, got {[x for x in logprobs if not math.isfinite(x)][:1] or 'none'}"
        for what, logprobs in answers
        if not logprobs or not all(map(math.isfinite, logprobs))
    ]


def masks_take_effect(
    unmasked: Logprobs, again: Logprobs, layers: Mapping[int, Logprobs], masks: Mapping[str, Logprobs]
) -> Check:
    """One text, run alone under each mask: all differ from the unmasked run, and the layers from each other.

    unmasked, again: two equal runs without a mask; layers: per layer, with all its neurons switched off;
    masks: per name of another mask. The text must be the same token for token, so that lengths agree.
    """
    named = {f"layer {layer} switched off": answer for layer, answer in layers.items()}
    named |= {f"mask {name!r}": answer for name, answer in masks.items()}
    problems = _not_finite([("unmasked", unmasked), *named.items()])
    noise = largest_difference(unmasked, again)
    if noise > LOW_PRECISION_LIMIT:
        problems.append(f"expected two equal runs without a mask to agree, they are {_nats(noise)} apart")
    limit = NOISE_FACTOR * noise
    changes = {what: largest_difference(unmasked, answer) for what, answer in named.items()}
    for what, change in changes.items():
        if not change > limit:
            problems.append(f"{what}: expected other log-probabilities than unmasked, got a change of {_nats(change)}")
    for (one, left), (other, right) in combinations(layers.items(), 2):
        if min(changes[f"layer {layer} switched off"] for layer in (one, other)) > limit:
            apart = largest_difference(left, right)
            if not apart > limit:
                problems.append(f"layers {one} and {other}: expected different results, they are {_nats(apart)} apart")
    if not layers:
        problems.append("expected a mask per layer, got none")
    effective = sum(change > limit for change in changes.values())
    return _verdict(
        LAYERS,
        problems,
        f"{effective} of {len(changes)} ({len(layers)} layers, {len(masks)} other masks), "
        f"smallest change {_nats(min(changes.values(), default=0.0))}",
        f"all, by more than {limit:.2g} nats",
    )


def neighbours_untouched(alone: Batch, mixed: Batch, masked: Sequence[bool], repeat: Repeat) -> Check:
    """The same batch once without masks, and once with masks on the requests in `masked`."""
    problems, worst = [], 0.0
    for index, (before, after, is_masked) in enumerate(zip(alone, mixed, masked, strict=True)):
        apart = repeat.apart(before, after)
        if not is_masked:
            worst = max(worst, apart)
            if apart > repeat.limit:
                problems.append(
                    f"request {index} is unmasked: expected the answer of the unmasked batch ({repeat}), "
                    f"got a difference of {_nats(apart)}"
                )
    changed = [
        repeat.apart(before, after) > repeat.limit
        for before, after, is_masked in zip(alone, mixed, masked, strict=True)
        if is_masked
    ]
    if not any(changed):
        problems.append("expected the masked neighbours to change, got no change: the check shows nothing")
    problems += _not_finite((f"request {index}", answer.logprobs) for index, answer in enumerate(mixed))
    measured = f"largest difference {_nats(worst)}, {masked.count(True)} of {len(masked)} requests masked"
    return _verdict(NEIGHBOURS, problems, measured, str(repeat))


def mixed_equals_uniform(
    uniform: Mapping[str | None, Batch], mixed: Batch, masks: Sequence[str | None], repeat: Repeat
) -> Check:
    """The same batch entirely under each mask, and once with `masks` [requests]."""
    problems, worst = [], 0.0
    for index, (mask, answer) in enumerate(zip(masks, mixed, strict=True)):
        apart = repeat.apart(uniform[mask][index], answer)
        worst = max(worst, apart)
        if apart > repeat.limit:
            meant = [
                f"; it is the answer under mask {other!r}"
                for other, batch in uniform.items()
                if other != mask and repeat.apart(batch[index], answer) <= repeat.limit
            ]
            problems.append(
                f"request {index} under mask {mask!r}: expected the answer of that mask's own batch ({repeat}), "
                f"got a difference of {_nats(apart)}{''.join(meant[:1])}"
            )
    for one, other in combinations(uniform, 2):
        pairs = zip(uniform[one], uniform[other], strict=True)
        if all(repeat.apart(left, right) <= repeat.limit for left, right in pairs):
            problems.append(
                f"expected masks {one!r} and {other!r} to differ, got equal batches: the check shows nothing"
            )
    for name, batch in uniform.items():
        problems += _not_finite((f"request {i} of the batch under {name!r}", a.logprobs) for i, a in enumerate(batch))
    measured = f"largest difference {_nats(worst)}, {len(masks)} requests, {len(set(masks) - {None})} masks and none"
    return _verdict(MIXED, problems, measured, str(repeat))


def idle_equals_plain(plain: Batch, again: Batch, idle: Batch) -> Check:
    """The same unmasked batch without the plugin, twice, and with it."""
    repeat = Repeat.of(plain, again)
    problems, worst = [], 0.0
    for index, (expected, answer) in enumerate(zip(plain, idle, strict=True)):
        apart = repeat.apart(expected, answer)
        worst = max(worst, apart)
        if apart > repeat.limit:
            problems.append(
                f"request {index}: expected the answer of vLLM without the plugin ({repeat}), "
                f"got a difference of {_nats(apart)}"
            )
    tokens = sum(len(answer.tokens) for answer in idle)
    return _verdict(IDLE, problems, f"largest difference {_nats(worst)}, {tokens} generated tokens", str(repeat))


@dataclass(frozen=True)
class Visit:
    """The answer to a prompt under a mask, without a salt of the client."""

    mask: str | None
    answer: Answer


def prefix_cache_kept_apart(
    visits: Sequence[Visit],
    cold: Mapping[str | None, Answer],
    warm: Mapping[str | None, Answer],
    again: Answer,
    *,
    exact: bool,
) -> Check:
    """One long prompt under several masks in turn, against runs that cannot share blocks with any other mask.

    cold, warm: per mask, the prompt run twice under a salt of its own; again: `cold[None]` under yet another salt.
    exact: whether the engine computes in float32.
    """
    repeat = Repeat.of([cold[None]], [again])
    problems: list[str] = []
    earlier: set[str | None] = set()
    worst = 0.0
    reference_drift = _drift(cold[None], warm[None])
    for number, visit in enumerate(visits):
        what = f"run {number} (mask {visit.mask!r}, {'again' if visit.mask in earlier else 'first'})"
        cached = visit.answer.cached
        alike = warm[visit.mask] if visit.mask in earlier else cold[visit.mask]
        if visit.mask in earlier:
            if cached == 0:
                problems.append(f"{what}: expected cached tokens of its own, got none")
        elif cached > 0:
            problems.append(f"{what}: expected no cached tokens, got {cached} that another mask computed")
        if repeat.bitwise and visit.answer.cached == alike.cached:
            apart, limit = repeat.apart(alike, visit.answer), 0.0
        else:
            apart, limit = _drift(cold[visit.mask], visit.answer), _limit(exact, reference_drift)
        worst = max(worst, apart)
        if apart > limit:
            problems.append(
                f"{what}: expected the answer of a run of its own within {limit:.2g} nats, got {_nats(apart)}"
            )
        earlier.add(visit.mask)
    for mask, answer in cold.items():
        if answer.cached:
            problems.append(f"a cold run under mask {mask!r}: expected no cached tokens, got {answer.cached}")
        drift, limit = _drift(answer, warm[mask]), _limit(exact, 0.0 if mask is None else reference_drift)
        if drift > limit:
            problems.append(
                f"mask {mask!r}: expected cached and computed prompts to agree within {limit:.2g} nats per token, "
                f"got {_nats(drift)}"
            )
    for one, other in combinations(cold, 2):
        if cold[one].tokens == cold[other].tokens and cold[one].logprobs == cold[other].logprobs:
            problems.append(
                f"expected masks {one!r} and {other!r} to differ, got equal answers: the check shows nothing"
            )
    problems += _not_finite((f"run {number}", visit.answer.logprobs) for number, visit in enumerate(visits))
    counts = ", ".join(str(visit.answer.cached) for visit in visits)
    allowed = "bit-identical" if repeat.bitwise else f"{_limit(exact, reference_drift):.2g} nats"
    measured = f"cached tokens {counts}; largest difference {_nats(worst)}"
    return _verdict(CACHE, problems, measured, f"0 cached the first time under each mask; {allowed}")


def _drift(left: Answer, right: Answer) -> float:
    """The mean difference up to the first token that differs; at that token it is small if only rounding makes the two
    differ."""
    same = next(
        (i for i, pair in enumerate(zip(left.tokens, right.tokens, strict=True)) if pair[0] != pair[1]),
        len(left.tokens) - 1,
    )
    return mean_difference(left.logprobs[: same + 1], right.logprobs[: same + 1])


def _limit(exact: bool, unmasked: float, rounding: float | None = None) -> float:
    if exact:
        return FLOAT32_LIMIT
    return max(LOW_PRECISION_LIMIT, UNMASKED_FACTOR * unmasked if rounding is None else ROUNDING_FACTOR * rounding)


def reads_back(
    generated: Mapping[str | None, Logprobs],
    scored: Mapping[str | None, Logprobs],
    unmasked: Mapping[str | None, Logprobs],
    *,
    exact: bool,
) -> Check:
    """Per mask: tokens generated one by one, and the same tokens scored as part of a prompt, with the mask and without.

    Generating and scoring run different graphs, so one of them may fail alone. exact: whether the engine computes in
    float32.
    """
    differences = {mask: mean_difference(generated[mask], scored[mask]) for mask in generated}
    effects = {mask: mean_difference(generated[mask], unmasked[mask]) for mask in generated if mask is not None}
    return _agreement(DECODING, "scoring", differences, effects, exact=exact)


def agrees_with_reference(
    ours: Mapping[str | None, Logprobs],
    theirs: Mapping[str | None, Logprobs],
    *,
    exact: bool,
    strong: Iterable[str],
    rounded: Mapping[str | None, Logprobs] | None = None,
) -> Check:
    """Per mask, log-probabilities of the same texts from the engine and from transformers.

    exact: whether both compute in float32; strong: the masks whose effect must be much larger than the differences;
    rounded: log-probabilities of transformers in low precision, if `theirs` are in float32. A model with neurons
    switched off can be far more sensitive to rounding. So the rounding error of transformers is the measure of the
    error that the engine may have.
    """
    differences = {mask: mean_difference(ours[mask], theirs[mask]) for mask in theirs}
    effects = {mask: mean_difference(theirs[None], theirs[mask]) for mask in strong}
    rounding = {mask: mean_difference(rounded[mask], theirs[mask]) for mask in theirs} if rounded else {}
    return _agreement(REFERENCE, "transformers", differences, effects, exact=exact, rounding=rounding)


def _agreement(
    name: str,
    other: str,
    differences: Mapping[str | None, float],
    effects: Mapping[str | None, float] | Mapping[str, float],
    *,
    exact: bool,
    rounding: Mapping[str | None, float] | None = None,
) -> Check:
    limits = {
        mask: _limit(exact, 0.0 if mask is None else differences[None], (rounding or {}).get(mask))
        for mask in differences
    }
    problems = [
        f"mask {mask!r}: expected {other} within {limits[mask]:.2g} nats per token, got {_nats(difference)}"
        for mask, difference in differences.items()
        if difference > limits[mask]
    ]
    for mask, effect in effects.items():
        floor = EFFECT_FACTOR * differences[mask]
        if not floor < effect < math.inf:
            problems.append(
                f"mask {mask!r}: expected an effect above {_nats(floor)} per token, {EFFECT_FACTOR} times the "
                f"difference, got {_nats(effect)}"
            )
    if not effects:
        problems.append("expected masks, got none: the check shows nothing")
    masked = max((value for mask, value in differences.items() if mask is not None), default=math.inf)
    weakest = min(effects.values(), default=0.0)
    return _verdict(
        name,
        problems,
        f"{differences[None]:.2g} nats/token unmasked, {masked:.2g} masked, effect of the masks {weakest:.2g} or more",
        f"{limits[None]:.2g} unmasked, {max(limits.values()):.2g} masked, effect {EFFECT_FACTOR} times the difference",
    )


def throughput(
    plain: Logprobs | None,
    idle: Sequence[float],
    one: Sequence[float],
    mixed: Sequence[float],
    batch: str,
    *,
    twice: bool = False,
) -> Check:
    """Tokens per second of repeated runs: without the plugin (None if that did not run), and with it.

    idle, one, mixed: [repetitions], run in turn, and compared run by run; plain: from another process. If equal runs
    differ too much, the check is skipped. twice: whether masked tokens are computed twice, as in experts on a CPU.
    """
    masked_limit = SLOWEST_TWICE if twice else SLOWEST
    ratios = {
        "one mask / idle": median(masked / rate for masked, rate in zip(one, idle, strict=True)),
        "mixed masks / idle": median(masked / rate for masked, rate in zip(mixed, idle, strict=True)),
    }
    if plain is not None:
        # The best of each: disturbances differ between two processes that run one after the other.
        ratios = {"idle / no plugin (another process, not interleaved)": max(idle) / max(plain), **ratios}
    limits = {what: SLOWEST if "no plugin" in what else masked_limit for what in ratios}
    problems = [
        f"{what}: expected a ratio of {limits[what]} or more, got {ratio:.3f}"
        for what, ratio in ratios.items()
        if not ratio >= limits[what]
    ]
    summary = ", ".join(f"{what} {ratio:.3f}" for what, ratio in ratios.items())
    limit = f"{SLOWEST}, masked {masked_limit}" if twice else f"{SLOWEST}"
    spread = max(max(rates) / min(rates) for rates in (plain or idle, idle, one, mixed))
    if problems and spread > STEADY:
        return skipped(THROUGHPUT, f"the machine is busy: equal runs differ by a factor of {spread:.1f}; {summary}")
    return _verdict(THROUGHPUT, problems, f"{batch}: {median(idle):.0f} tokens/s idle; {summary}", limit)
