"""`crane verify` against engines that get something wrong: a check that cannot fail is worth nothing."""

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import pytest
import typer
from typer.testing import CliRunner

from crane_serve.common.masks import Fingerprint, MaskFileError, MaskInfo, NeuronMask, write_mask
from crane_serve.engine.offline import Answer, EngineFacts, Request
from crane_serve.verify import checks, command, probes, session
from crane_serve.verify.checks import Check, Status
from crane_serve.verify.generated import TrialMasks, write_trial_masks
from crane_serve.verify.plan import Outcome, ProcessPlan, Reference
from crane_serve.verify.trial import Trial, measure_plain
from crane_serve.verify.worker import work
from tests.architectures import tiny_checkpoint
from tests.tiny import LAYERS, tiny_model

FACTS = EngineFacts("0.32.0", "cpu (fake)", "V1", "float32", False, 1, True, 16, 512)
MASKS = TrialMasks(
    layers=tuple(f"layer-{layer}" for layer in range(LAYERS)),
    slices=("slice-0", "slice-1"),
    random=("random-0", "random-1", "random-2"),
)
Mask = str | None


def chance(*what: object) -> float:
    """A number from 0 to 1 that depends on nothing but `what`."""
    return crc32(repr(what).encode()) / 2**32


class FakeEngine:
    """An engine whose masks are exact. A token's log-probability depends on the three before it and on the mask.

    Its methods are what faulty engines override.
    """

    facts = FACTS

    def __init__(self) -> None:
        self.blocks: dict[object, set[tuple[int, ...]]] = {}
        self.runs = 0

    def encode(self, text: str) -> tuple[int, ...]:
        return (256, *text.encode())

    def strength(self, mask: Mask, layer: int) -> float:
        if mask is None:
            return 0.0
        if "layer-" in mask:
            return float(mask.endswith(f"layer-{layer}"))
        return 0.1 + chance("strength", mask, layer)

    def effective(self, requests: Sequence[Request]) -> list[Mask]:
        """The mask that each request of a batch runs with."""
        return [request.mask for request in requests]

    def decoding(self, mask: Mask) -> Mask:
        """The mask that generated tokens run with."""
        return mask

    def cache(self, request: Request) -> object:
        """What two requests must have in common to share blocks."""
        return request.mask, request.salt

    def noise(self) -> float:
        return 0.0

    def logprob(self, context: tuple[int, ...], token: int, mask: Mask) -> float:
        seen = context[-3:], token
        effect = sum(self.strength(mask, layer) * chance(layer, seen) for layer in range(LAYERS))
        return -0.5 - chance(seen) - effect + self.noise()

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        self.runs += 1
        return [self.answer(request, mask) for request, mask in zip(requests, self.effective(requests), strict=True)]

    def answer(self, request: Request, mask: Mask) -> Answer:
        blocks = self.blocks.setdefault(self.cache(request), set())
        size = self.facts.block_tokens
        cuts = [request.prompt[:end] for end in range(size, len(request.prompt), size)]
        cached = 0 if request.score else max((len(cut) for cut in cuts if cut in blocks), default=0)
        blocks.update(cuts)
        text, scored = request.prompt, ()
        if request.score:
            scored = tuple(self.logprob(text[:i], text[i], mask) for i in range(1, len(text)))
        logprobs = []
        for _ in range(request.max_tokens):
            token = int(256 * chance("next", text[-3:], self.decoding(mask)))
            logprobs.append(self.logprob(text, token, self.decoding(mask)))
            text = (*text, token)
        return Answer(text[len(request.prompt) :], tuple(logprobs), scored, cached)


class IgnoresMasks(FakeEngine):
    def effective(self, requests):
        return [None] * len(requests)


class MissesLayer(FakeEngine):
    def strength(self, mask, layer):
        return 0.0 if layer == 1 else super().strength(mask, layer)


class TwoLayersShareATable(FakeEngine):
    def strength(self, mask, layer):
        return super().strength(mask.replace("layer-2", "layer-0") if mask else None, layer)


class MasksANeighbour(FakeEngine):
    """One unmasked request gets the mask of the one before it."""

    def effective(self, requests):
        masks = super().effective(requests)
        for index in range(2, len(masks)):
            if masks[index] is None and masks[index - 1] is not None:
                masks[index] = masks[index - 1]
                break
        return masks


class MixesUpTheBatch(FakeEngine):
    """The batch is reordered after the masks were laid out."""

    def effective(self, requests):
        masks = super().effective(requests)
        return masks[1:] + masks[:1]


class LeaksCache(FakeEngine):
    """The prefix cache does not know of masks; what is cached carries the mask that it was computed under."""

    def __init__(self) -> None:
        super().__init__()
        self.owners: dict[object, Mask] = {}

    def cache(self, request):
        return request.salt

    def answer(self, request, mask):
        owner = mask if request.score else self.owners.setdefault((request.salt, request.prompt), mask)
        return super().answer(request, owner)


class CountsLeakedTokens(FakeEngine):
    """Right answers, but blocks of another mask's."""

    def cache(self, request):
        return request.salt


class CachesNothingUnderMasks(FakeEngine):
    def cache(self, request):
        return object() if request.mask else request.salt


class DecodesUnmasked(FakeEngine):
    def decoding(self, mask):
        return None


class NotANumber(FakeEngine):
    def logprob(self, context, token, mask):
        return math.nan if mask == "random-1" else super().logprob(context, token, mask)


class HalfStrength(FakeEngine):
    """Masks that switch off too little: consistent, and wrong."""

    def strength(self, mask, layer):
        return 0.5 * super().strength(mask, layer)


class Dies(FakeEngine):
    def run(self, requests):
        if self.runs >= 11:
            raise RuntimeError("EngineCore encountered an issue.\nsee the stack trace")
        return super().run(requests)


class Noisy(FakeEngine):
    """Its sums are not in the same order twice."""

    facts = replace(FACTS, dtype="bfloat16")

    def __init__(self) -> None:
        super().__init__()
        self.draw = random.Random(0)

    def noise(self):
        return self.draw.uniform(-1e-4, 1e-4)


class NoisyAndMasksANeighbour(Noisy, MasksANeighbour):
    pass


class VeryNoisy(Noisy):
    def noise(self):
        return self.draw.uniform(-1.0, 1.0)


class Mixture(FakeEngine):
    """How it rounds is a matter of where the tokens of the whole batch are sent."""

    def effective(self, requests):
        self.sent = tuple(request.mask for request in requests)
        return super().effective(requests)

    def noise(self):
        return 1e-6 * chance("rounding", self.sent)


class MixtureThatMasksANeighbour(Mixture, MasksANeighbour):
    pass


class SlightlyOff(FakeEngine):
    def noise(self):
        return 1e-6


def reference_of(engine: FakeEngine, masks: Sequence[Mask] = (None, *MASKS.random)) -> Reference:
    texts = tuple(engine.encode(text) for text in probes.TEXTS)
    scores = [engine.run([Request(text, mask=mask, score=True) for text in texts]) for mask in masks]
    return Reference(
        "float32", texts, tuple(masks), tuple(tuple(answer.prompt_logprobs for answer in row) for row in scores)
    )


def verify(
    engine: FakeEngine, plain: FakeEngine | None = None, masks: TrialMasks = MASKS, *, mixture: bool = False
) -> dict[str, Check]:
    """All checks of an engine, against exact ones."""
    trial = Trial(
        engine,
        masks,
        plain=measure_plain(plain or FakeEngine(), rates=True),
        reference=reference_of(FakeEngine()),
        rates=False,
        mixture=mixture,
    )
    return {check.name: check for check in trial.checks()}


def fails(results: dict[str, Check]) -> set[str]:
    return {name for name, check in results.items() if check.status is Status.FAIL}


MADE = set(checks.ALL) - {checks.ENGINES, checks.THROUGHPUT}


def test_an_exact_engine_passes_every_check() -> None:
    results = verify(FakeEngine())
    assert {name: check.status for name, check in results.items()} == dict.fromkeys(MADE, Status.PASS)
    assert not any(check.problem for check in results.values())
    assert all(check.measured and check.limit for check in results.values())


@pytest.mark.parametrize(
    ("faulty", "name", "message"),
    [
        (IgnoresMasks, checks.LAYERS, "layer 0 switched off: expected other log-probabilities than unmasked, got a"),
        (IgnoresMasks, checks.NEIGHBOURS, "expected the masked neighbours to change, got no change"),
        (IgnoresMasks, checks.MIXED, "expected masks None and 'random-0' to differ, got equal batches"),
        (IgnoresMasks, checks.CACHE, "expected masks None and 'random-0' to differ, got equal answers"),
        (IgnoresMasks, checks.DECODING, "mask 'random-0': expected an effect above 0 nats per token"),
        (IgnoresMasks, checks.REFERENCE, "mask 'random-0': expected transformers within 0.001 nats per token"),
        (MissesLayer, checks.LAYERS, "layer 1 switched off: expected other log-probabilities than unmasked"),
        (MissesLayer, checks.REFERENCE, "expected transformers within 0.001 nats per token, got"),
        (TwoLayersShareATable, checks.LAYERS, "layers 0 and 2: expected different results, they are 0 nats apart"),
        (MasksANeighbour, checks.NEIGHBOURS, "request 2 is unmasked: expected the answer of the unmasked batch"),
        (MasksANeighbour, checks.MIXED, "request 4 under mask None: expected the answer of that mask's own batch"),
        (MixesUpTheBatch, checks.MIXED, "it is the answer under mask 'random-0'"),
        (LeaksCache, checks.CACHE, "run 1 (mask None, first): expected no cached tokens, got 48"),
        (LeaksCache, checks.CACHE, "run 1 (mask None, first): expected the answer of a run of its own within"),
        (CountsLeakedTokens, checks.CACHE, "run 1 (mask None, first): expected no cached tokens, got 48"),
        (CachesNothingUnderMasks, checks.CACHE, "run 4 (mask 'random-0', again): expected cached tokens of its own"),
        (DecodesUnmasked, checks.DECODING, "mask 'random-0': expected scoring within 0.001 nats per token, got"),
        (NotANumber, checks.LAYERS, "mask 'random-1': expected finite log-probabilities, got [nan]"),
        (NotANumber, checks.REFERENCE, "mask 'random-1': expected transformers within"),
        (HalfStrength, checks.REFERENCE, "mask 'random-2': expected transformers within"),
        (SlightlyOff, checks.IDLE, "request 0: expected the answer of vLLM without the plugin (bit-identical), got"),
        (NoisyAndMasksANeighbour, checks.NEIGHBOURS, "request 2 is unmasked"),
        (VeryNoisy, checks.LAYERS, "expected two equal runs without a mask to agree"),
        (VeryNoisy, checks.NEIGHBOURS, "request 0 is unmasked"),
    ],
)
def test_a_fault_fails_the_check_that_looks_for_it(faulty: type[FakeEngine], name: str, message: str) -> None:
    check = verify(faulty())[name]
    assert check.status is Status.FAIL
    assert message in check.problem


@pytest.mark.parametrize(
    ("faulty", "expected"),
    [
        (MasksANeighbour, {checks.NEIGHBOURS, checks.MIXED, checks.REFERENCE, checks.DECODING}),
        (LeaksCache, {checks.CACHE}),
        (DecodesUnmasked, {checks.DECODING, checks.CACHE}),
        (HalfStrength, {checks.REFERENCE}),
        (MissesLayer, {checks.LAYERS, checks.REFERENCE}),
    ],
)
def test_a_fault_fails_no_other_check(faulty: type[FakeEngine], expected: set[str]) -> None:
    assert fails(verify(faulty())) <= expected


def test_a_mixture_is_held_to_how_it_rounds_alone() -> None:
    assert checks.MIXED in fails(verify(Mixture(), plain=Mixture()))
    assert not fails(verify(Mixture(), plain=Mixture(), mixture=True))
    results = verify(MixtureThatMasksANeighbour(), plain=Mixture(), mixture=True)
    assert {checks.NEIGHBOURS, checks.MIXED} <= fails(results)


def test_an_engine_that_does_not_repeat_its_bits_is_held_to_its_own_noise() -> None:
    results = verify(Noisy(), plain=Noisy())
    assert not fails(results)
    assert "equal requests are not bit-identical here" in results[checks.NEIGHBOURS].limit


def test_an_engine_without_prefix_cache_skips_that_check() -> None:
    engine = FakeEngine()
    engine.facts = replace(FACTS, prefix_caching=False)
    assert verify(engine)[checks.CACHE] == checks.skipped(checks.CACHE, "the engine caches no prefixes")


def test_every_mask_of_the_user_must_do_something() -> None:
    class OneDoesNothing(FakeEngine):
        def strength(self, mask, layer):
            return 0.0 if mask == "zh" else super().strength(mask, layer)

    check = verify(OneDoesNothing(), masks=replace(MASKS, from_user=("en", "zh")))[checks.LAYERS]
    assert check.status is Status.FAIL
    assert check.problem.startswith("mask 'zh': expected other log-probabilities than unmasked")


def test_a_mask_file_of_the_user_that_cannot_be_used_is_a_failure() -> None:
    check = verify(FakeEngine(), masks=replace(MASKS, unusable=("zh was made for another model",)))[checks.LAYERS]
    assert (check.status, check.problem) == (Status.FAIL, "zh was made for another model")


def test_after_an_engine_died_the_other_checks_fail_unmade() -> None:
    results = verify(Dies())
    assert fails(results) == MADE - {checks.LAYERS}
    assert results[checks.NEIGHBOURS].problem == "expected answers, got RuntimeError: EngineCore encountered an issue."
    assert results[checks.MIXED].problem == f"not made, since the engine failed in {checks.NEIGHBOURS!r}"


@pytest.mark.parametrize(
    ("plain", "one", "status"), [([100, 100, 100], 95, Status.PASS), (None, 95, Status.PASS), (None, 70, Status.FAIL)]
)
def test_throughput_fails_only_when_masks_are_dear(plain: list[float] | None, one: float, status: Status) -> None:
    check = checks.throughput(plain, [99, 100, 101], [one] * 3, [98] * 3, "32 requests")
    assert check.status is status
    assert ("no plugin" in check.measured) == (plain is not None)


def test_throughput_fails_when_the_idle_plugin_is_dear() -> None:
    check = checks.throughput([100, 100, 130], [99, 98, 97], [98] * 3, [98] * 3, "32 requests")
    assert check.problem == "idle / no plugin (another process, not interleaved): expected a ratio of 0.8 or more, " + (
        "got 0.762"
    )


def test_masked_throughput_may_be_lower_where_tokens_are_computed_twice() -> None:
    rates = ([100] * 3, [99, 100, 101], [47] * 3, [45] * 3, "32 requests")
    assert checks.throughput(*rates).status is Status.FAIL
    assert checks.throughput(*rates, twice=True).status is Status.PASS
    slow = checks.throughput([100] * 3, [99, 100, 101], [29] * 3, [45] * 3, "32 requests", twice=True)
    assert slow.problem == "one mask / idle: expected a ratio of 0.3 or more, got 0.290"
    dear = checks.throughput([130] * 3, [99, 100, 101], [47] * 3, [45] * 3, "32 requests", twice=True)
    assert dear.problem.startswith("idle / no plugin (another process, not interleaved): expected a ratio of 0.8")


@pytest.mark.parametrize(("mixture", "gpu"), [(True, False), (True, True), (False, False)])
def test_experts_compute_masked_tokens_twice_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, mixture: bool, gpu: bool
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(checks, "throughput", lambda *_, twice: seen.append(twice))
    Trial(FakeEngine(), MASKS, plain=None, reference=None, rates=True, mixture=mixture).throughput()
    assert seen == [mixture and not gpu]


def test_throughput_is_not_judged_on_a_busy_machine() -> None:
    check = checks.throughput([100] * 3, [100, 20, 90], [60, 60, 60], [98] * 3, "32 requests")
    assert check.status is Status.SKIPPED
    assert check.problem.startswith("the machine is busy: equal runs differ by a factor of 5.0; idle / no plugin")


def test_low_precision_is_allowed_three_times_the_unmasked_difference_and_no_more() -> None:
    theirs = {None: [-1.0, -2.0], "m": [-3.0, -4.0]}

    def masked_off_by(difference: float) -> Check:
        ours = {None: [-1.02, -2.02], "m": [-3.0 - difference, -4.0 - difference]}
        return checks.agrees_with_reference(ours, theirs, exact=False, strong=["m"])

    assert masked_off_by(0.059).status is Status.PASS
    assert masked_off_by(0.061).status is Status.FAIL


def test_what_transformers_loses_to_low_precision_under_a_mask_is_the_measure_of_what_the_engine_may() -> None:
    """Masks that damage a model make it sensitive to rounding: the engine may be twice as far off as transformers."""
    theirs = {None: [-1.0, -2.0], "m": [-3.0, -4.0]}
    rounded = {None: [-1.01, -2.01], "m": [-3.1, -4.1]}

    def masked_off_by(difference: float) -> Check:
        ours = {None: [-1.02, -2.02], "m": [-3.0 - difference, -4.0 - difference]}
        return checks.agrees_with_reference(ours, theirs, exact=False, strong=["m"], rounded=rounded)

    assert masked_off_by(0.19).status is Status.PASS
    assert masked_off_by(0.21).status is Status.FAIL


# The command, with processes replaced by fake engines.


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("verify") / "tiny")


def processes(masked: Callable[[], FakeEngine], calls: list[dict[str, object]] | None = None):
    """What stands in for `run_process`: the worker's own code, on fake engines."""

    def launch(module: str, plan_file: Path, environment: Mapping[str, str], log: Path) -> str | None:
        plan = ProcessPlan.load(plan_file)
        if calls is not None:
            calls.append({"module": module, "flags": plan.flags, **environment})
        if module == session.REFERENCE:
            assert plan.masks is not None
            reference = reference_of(FakeEngine(), (None, *plan.masks.random, *plan.masks.from_user))
            Outcome(plan.outcome).record(reference=reference)
            return None
        if plan.masks is not None and masked is Dies:
            work(plan, Dies())
            return "the process died with exit code -9; its last line: Killed"
        work(plan, FakeEngine() if plan.masks is None else masked())
        return None

    return launch


def invoke(monkeypatch: pytest.MonkeyPatch, launch, *arguments: object):
    monkeypatch.setattr(session, "run_process", launch)
    app = typer.Typer()
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(command.verify)
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_the_command_reports_and_exits_with_0(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, object]] = []
    monkeypatch.setenv("CRANE_DISABLE", "1")
    report = tmp_path / "report.json"
    flags = ("--max_model_len=512", "--dtype", "float32", "--enforce-eager")
    arguments = (checkpoint, "--no-throughput", "--report", report, *flags)
    result = invoke(monkeypatch, processes(FakeEngine, calls), *arguments)
    assert result.exit_code == 0, result.output
    assert "model runner V1, float32, eager, TP 1" in result.stdout
    assert f"SKIPPED(--no-throughput) {checks.THROUGHPUT}" in result.stdout
    assert "PASS: 8 passed, 0 failed, 1 skipped in" in result.stdout
    written = json.loads(report.read_text())
    assert [check["name"] for check in written["checks"]] == list(checks.ALL)
    assert written["passed"]
    assert written["fingerprint"]["layers"] == LAYERS

    assert [call["module"] for call in calls] == [session.REFERENCE, session.WORKER, session.WORKER]
    plain, masked = calls[1:]
    assert plain["VLLM_PLUGINS"] == ""
    assert "CRANE_MASKS" not in plain
    assert masked["CRANE_ALLOW_UNTESTED_VLLM"] == "1"
    assert "CRANE_DISABLE" not in masked
    assert not Path(str(masked["CRANE_MASKS"])).exists()
    assert masked["flags"] == ("--max-num-seqs", "32", "--max-num-batched-tokens", "512", *flags)


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (IgnoresMasks, "layer 0 switched off: expected other log-probabilities"),
        (MissesLayer, "layer 1 switched off: expected other log-probabilities"),
        (MasksANeighbour, "request 2 is unmasked: expected"),
        (LeaksCache, "run 1 (mask None, first): expected no cached tokens, got 48"),
        (Dies, "vLLM with masks: the process died with exit code -9; its last line: Killed"),
    ],
)
def test_the_command_exits_with_1_and_says_what_failed(
    faulty: type[FakeEngine], message: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = invoke(monkeypatch, processes(faulty), checkpoint, "--no-throughput", "--no-reference")
    assert result.exit_code == 1
    assert "FAIL: " in result.stdout
    assert message in result.stdout
    assert "Traceback" not in result.output


def test_of_a_model_that_reads_images_both_engines_run_the_language_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[ProcessPlan] = []

    def launch(_module: str, plan_file: Path, *_: object) -> str:
        plans.append(ProcessPlan.load(plan_file))
        return "not started"

    checkpoint = tiny_checkpoint("Gemma3ForConditionalGeneration", tmp_path / "tiny")
    invoke(monkeypatch, launch, checkpoint, "--no-reference")
    assert [plan.masks is None for plan in plans] == [True, False]
    assert all("--language-model-only" in plan.flags for plan in plans)


def test_processes_that_all_die_are_a_report_too(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke(monkeypatch, lambda *_: "ValueError: no memory for the KV cache", checkpoint)
    assert result.exit_code == 1
    assert "no engine started" in result.stdout
    assert "vLLM without the plugin: ValueError: no memory for the KV cache" in result.stdout
    assert "ValueError: no memory for the KV cache (--no-reference skips this check)" in result.stdout
    assert "0 passed, 9 failed, 0 skipped" in result.stdout


def test_a_process_that_dies_leaves_its_last_words(checkpoint: Path, tmp_path: Path) -> None:
    plan = tmp_path / "no.plan.json"
    fingerprint = Fingerprint.of(checkpoint)
    outcome, masks = tmp_path / "no.jsonl", tmp_path / "masks"
    ProcessPlan(
        model=checkpoint, flags=(), fingerprint=fingerprint, outcome=outcome, throughput=False, float32=True,
        trust_remote_code=False, directory=masks, masks=None, plain=outcome, reference=outcome,
    ).save(plan)  # fmt: skip
    problem = session.run_process("crane_serve.verify.no_such_module", plan, {}, tmp_path / "log")
    assert problem is not None
    assert problem.startswith("the process died with exit code 1; its last line: ")
    assert "No module named" in problem


# The masks and the reference.


def test_trial_masks_are_the_generated_ones_and_the_users(checkpoint: Path, tmp_path: Path) -> None:
    fingerprint = Fingerprint.of(checkpoint)
    sizes, info = fingerprint.intermediate_sizes, MaskInfo(language="zh", method="lape", fingerprint=fingerprint)
    given = tmp_path / "given"
    write_mask(given, "lape-zh", NeuronMask.switching_off([[1, 2]] * len(sizes), sizes), info)
    write_mask(given, "does-nothing", NeuronMask.switching_off([[]] * len(sizes), sizes), info)
    (given / "broken.safetensors").write_bytes(b"")
    trial = write_trial_masks(tmp_path / "trial", fingerprint, given)
    assert (len(trial.layers), len(trial.random), trial.from_user) == (LAYERS, 3, ("lape-zh",))
    assert len(trial.unusable) == 1
    assert "broken.safetensors" in trial.unusable[0]


def test_a_mask_of_the_user_may_not_have_a_generated_name(checkpoint: Path, tmp_path: Path) -> None:
    given = tmp_path / "given"
    fingerprint = Fingerprint.of(checkpoint)
    write_trial_masks(given, fingerprint, None)
    with pytest.raises(MaskFileError, match="rename it"):
        write_trial_masks(tmp_path / "trial", fingerprint, given)
