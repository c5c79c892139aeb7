"""Trial: one engine, put through every check."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import cycle, islice
from typing import Protocol

import torch

from crane_serve.engine.offline import Answer, EngineFacts, Request
from crane_serve.verify import checks, probes
from crane_serve.verify.checks import Batch, Check, Logprobs, Repeat, Visit
from crane_serve.verify.generated import TrialMasks
from crane_serve.verify.plan import Plain, Reference, describe

_USER_MASKS_IN_BATCHES = 3  # of the user's masks; every one of them is in the first check
_REPETITIONS = 3
_GENERATED_TOKENS = 64
_GENERATED_TOKENS_CPU = 24
_READ_BACK_TOKENS = 16
_CACHE_TOKENS = 8


class Engine(Protocol):
    """What a trial needs of an engine."""

    facts: EngineFacts

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text."""

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """Run a batch, all of it queued before the first step."""


def measure_plain(engine: Engine, *, rates: bool) -> Plain:
    """Run the batch for the comparison with an idle plugin, on an engine without the plugin."""
    requests = probes.batch(engine.encode, engine.facts.max_model_tokens)
    unmasked = [None] * len(requests)
    batch, again = (tuple(engine.run(probes.masked(requests, unmasked, run))) for run in ("plain", "plain-again"))
    speed = _Speed(engine)
    return Plain(batch, again, tuple(speed.rate([None]) for _ in range(_REPETITIONS)) if rates else ())


class Trial:
    """An engine with the masks of a trial directory. `checks` makes all checks, in order."""

    def __init__(
        self,
        engine: Engine,
        masks: TrialMasks,
        *,
        plain: Plain | None,
        reference: Reference | None,
        rates: bool,
        mixture: bool = False,
    ) -> None:
        """plain, reference: None leaves out the checks against them; rates: whether to measure throughput; mixture:
        whether the model has experts."""
        self._engine = engine
        self._masks = masks
        self._plain = plain
        self._reference = reference
        self._rates = rates
        self._mixture = mixture
        self._of_mask: dict[str | None, Batch] = {}
        self._requests = probes.batch(engine.encode, engine.facts.max_model_tokens)
        self._exact = engine.facts.dtype == "float32"

    def checks(self) -> Iterator[Check]:
        """Make the checks one by one. After a check that raises, the engine may be broken: the remaining checks fail
        without being run."""
        steps: dict[str, Callable[[], Check]] = {
            checks.LAYERS: self.layers,
            checks.NEIGHBOURS: self.neighbours,
            checks.MIXED: self.mixed,
            checks.CACHE: self.cache,
            checks.DECODING: self.decoding,
        }
        if self._plain is not None:
            steps[checks.IDLE] = self.idle
        if self._reference is not None:
            steps[checks.REFERENCE] = self.reference
        if self._rates:
            steps[checks.THROUGHPUT] = self.throughput
        broken = None
        for name, step in steps.items():
            if broken is not None:
                yield checks.failed(name, f"not made, since the engine failed in {broken!r}")
                continue
            try:
                yield step()
            except Exception as error:  # whatever a dying engine raises
                broken = name
                yield checks.failed(name, f"expected answers, got {describe(error)}")

    def layers(self) -> Check:
        """Requests one at a time, so that all have the same shapes, and rounding cannot look like an effect."""
        prompt = self._engine.encode(" ".join(probes.TEXTS[::2]))[: self._engine.facts.max_model_tokens - 1]

        def score(mask: str | None) -> Logprobs:
            return self._engine.run([Request(prompt, mask=mask, salt="verify-layers", score=True)])[0].prompt_logprobs

        others = (*self._masks.slices, *self._masks.random, *self._masks.from_user)
        check = checks.masks_take_effect(
            score(None),
            score(None),
            {index: score(name) for index, name in enumerate(self._masks.layers)},
            {name: score(name) for name in others},
        )
        if self._masks.unusable:
            problem = "; ".join(filter(None, (check.problem, *self._masks.unusable)))
            check = replace(check, status=checks.Status.FAIL, problem=problem)
        return check

    def neighbours(self) -> Check:
        """The same batch twice: unmasked, and with every other request masked."""
        masks = [mask if index % 2 else None for index, mask in enumerate(self._assigned(*self._masks.random))]
        mixed, masked = self._run(masks, "neighbours"), [mask is not None for mask in masks]
        return checks.neighbours_untouched(self._unmasked, mixed, masked, self._repeat)

    def mixed(self) -> Check:
        """Batches under one mask each, and the same requests with all masks mixed."""
        assigned = self._assigned(None, *self._masks.random, *self._masks.from_user[:_USER_MASKS_IN_BATCHES])
        uniform = {mask: self._uniform(mask) for mask in dict.fromkeys(assigned)}
        return checks.mixed_equals_uniform(uniform, self._run(assigned, "mixed"), assigned, self._repeat)

    def idle(self) -> Check:
        """The unmasked batch, beside that of vLLM without the plugin."""
        assert self._plain is not None
        return checks.idle_equals_plain(self._plain.batch, self._plain.again, self._unmasked)

    def cache(self) -> Check:
        """One prompt under several masks in turn, with its prefix cached under the others, then cold and warm."""
        facts = self._engine.facts
        if not facts.prefix_caching:
            return checks.skipped(checks.CACHE, "the engine caches no prefixes")
        wanted = 3 * facts.block_tokens + facts.block_tokens // 2
        tokens = min(wanted, facts.max_model_tokens - _CACHE_TOKENS - 1)
        if tokens <= facts.block_tokens:
            return checks.skipped(
                checks.CACHE, f"blocks of {facts.block_tokens} tokens, sequences of {facts.max_model_tokens}"
            )
        request = Request(probes.long_prompt(self._engine.encode, tokens), _CACHE_TOKENS)

        def ask(mask: str | None, salt: str | None = None) -> Answer:
            return self._engine.run([replace(request, mask=mask, salt=salt)])[0]

        one, other = self._masks.random[:2]
        visits = [Visit(mask, ask(mask)) for mask in (one, None, other, None, one, other)]
        cold = {mask: ask(mask, f"verify-cache-{mask}") for mask in (None, one, other)}
        warm = {mask: ask(mask, f"verify-cache-{mask}") for mask in (None, one, other)}
        again = ask(None, "verify-cache-again")
        return checks.prefix_cache_kept_apart(visits, cold, warm, again, exact=self._exact)

    def decoding(self) -> Check:
        """What each mask generates, read back as a prompt: its log-probabilities must be those of the generation."""
        masks: list[str | None] = [None, *self._masks.random]
        room = self._engine.facts.max_model_tokens - _READ_BACK_TOKENS - 1
        prompts = [self._engine.encode(text)[:room] for text in probes.TEXTS]
        requests = [Request(prompt, _READ_BACK_TOKENS, mask) for mask in masks for prompt in prompts]
        owners = [request.mask for request in requests]
        generated = self._engine.run(probes.masked(requests, owners, "generated"))
        texts = [
            Request(request.prompt + answer.tokens, score=True)
            for request, answer in zip(requests, generated, strict=True)
        ]
        scored = self._engine.run(probes.masked(texts, owners, "scored"))
        unmasked = self._engine.run(probes.masked(texts, [None] * len(texts), "unmasked"))

        def per_mask(rows: Sequence[Logprobs]) -> dict[str | None, Logprobs]:
            pairs = list(zip(owners, rows, strict=True))
            return {mask: [x for owner, row in pairs if owner == mask for x in row] for mask in masks}

        return checks.reads_back(
            per_mask([answer.logprobs for answer in generated]),
            per_mask([answer.prompt_logprobs[-_READ_BACK_TOKENS:] for answer in scored]),
            per_mask([answer.prompt_logprobs[-_READ_BACK_TOKENS:] for answer in unmasked]),
            exact=self._exact,
        )

    def reference(self) -> Check:
        """All texts under all masks in one batch, so that mixed batches are compared with transformers, too."""
        assert self._reference is not None
        theirs = _by_mask(self._reference.masks, self._reference.logprobs)
        rounded = self._reference.rounded and _by_mask(self._reference.masks, self._reference.rounded)
        requests = [Request(text, mask=mask, score=True) for mask in theirs for text in self._reference.texts]
        owners = [request.mask for request in requests]
        answers = self._engine.run(probes.masked(requests, owners, "reference"))
        pairs = list(zip(owners, answers, strict=True))
        ours = {
            mask: [x for owner, answer in pairs if owner == mask for x in answer.prompt_logprobs] for mask in theirs
        }
        return checks.agrees_with_reference(
            ours,
            theirs,
            exact=self._exact and self._reference.dtype == "float32",
            strong=self._masks.random,
            rounded=rounded or None,
        )

    def throughput(self) -> Check:
        """The speed without masks, with one, and with several, in turns, so that a slow moment affects all equally."""
        speed = _Speed(self._engine)
        ways: dict[str, list[str | None]] = {
            "idle": [None],
            "one": [self._masks.random[0]],
            "mixed": [None, *self._masks.random],
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(_REPETITIONS):
            for name, masks in ways.items():
                rates[name].append(speed.rate(masks))
        plain = self._plain.rates if self._plain is not None and self._plain.rates else None
        # On a CPU, experts compute masked tokens again behind vLLM's kernel.
        twice = self._mixture and not torch.cuda.is_available()
        return checks.throughput(plain, rates["idle"], rates["one"], rates["mixed"], str(speed), twice=twice)

    def _run(self, masks: Sequence[str | None], run: str) -> list[Answer]:
        return self._engine.run(probes.masked(self._requests, masks, run))

    def _assigned(self, *masks: str | None) -> list[str | None]:
        """Masks in turn for the requests of the batch."""
        return list(islice(cycle(masks), len(self._requests)))

    def _uniform(self, mask: str | None) -> Batch:
        """The whole batch under one mask."""
        if mask not in self._of_mask:
            self._of_mask[mask] = self._run([mask] * len(self._requests), f"uniform-{mask}")
        return self._of_mask[mask]

    @property
    def _unmasked(self) -> Batch:
        return self._uniform(None)

    @cached_property
    def _repeat(self) -> Repeat:
        """How well the engine repeats itself: the unmasked batch twice.

        In a mixture masked requests in a batch of one mask and one by one: a mask changes where tokens are sent, and
        with that how many tokens of the batch an expert multiplies at a time, which rounds otherwise.
        """
        if not self._mixture:
            return Repeat.of(self._unmasked, self._run([None] * len(self._requests), "unmasked-again"))
        assigned = self._assigned(*self._masks.random)
        batch = [self._uniform(mask)[index] for index, mask in enumerate(assigned)]
        alone = zip(self._requests, assigned, strict=True)
        runs = (self._engine.run(probes.masked([request], [mask], "alone")) for request, mask in alone)
        return Repeat.of(batch, [answer for answers in runs for answer in answers])


def _by_mask(masks: Sequence[str | None], scores: Sequence[Sequence[Sequence[float]]]) -> dict[str | None, list[float]]:
    """The log-probabilities [masks][texts][tokens] of all texts in one list, by mask."""
    return {mask: [x for row in rows for x in row] for mask, rows in zip(masks, scores, strict=True)}


class _Speed:
    """Decoding of one batch, timed; the first run is for warming up."""

    def __init__(self, engine: Engine) -> None:
        generated = _GENERATED_TOKENS_CPU if engine.facts.device.startswith("cpu") else _GENERATED_TOKENS
        self._engine = engine
        self._requests = probes.throughput_batch(engine.encode, generated)
        self._runs = 0
        self.rate([None])

    def rate(self, masks: Sequence[str | None]) -> float:
        """Generated tokens per second, with `masks` in turn."""
        self._runs += 1
        assigned = list(islice(cycle(masks), len(self._requests)))
        requests = probes.masked(self._requests, assigned, f"speed-{self._runs}")
        start = time.perf_counter()
        answers = self._engine.run(requests)
        return sum(len(answer.tokens) for answer in answers) / (time.perf_counter() - start)

    def __str__(self) -> str:
        return f"{len(self._requests)} requests of {self._requests[0].max_tokens} tokens"
