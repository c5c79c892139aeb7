"""Masks that come and go: what a library keeps, and how changes and forgetting reach core and workers."""

import gc
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from crane_serve.common.masks import (
    Composition,
    Fingerprint,
    FingerprintError,
    MaskInfo,
    MaskLibrary,
    MaskTableFull,
    Member,
    NeuronMask,
    ResolvedMask,
    StoredMask,
    UnknownMask,
    encode_mask,
)
from crane_serve.engine import live_masks
from crane_serve.engine.admission import require_row


def stored(name: str, neuron: int, fingerprint: Fingerprint) -> StoredMask:
    mask = NeuronMask.switching_off([[neuron], []], fingerprint.intermediate_sizes)
    return StoredMask(name, mask, MaskInfo(language="xx", method="test", fingerprint=fingerprint))


@pytest.fixture
def library(fingerprint: Fingerprint) -> MaskLibrary:
    return MaskLibrary(fingerprint, {name: stored(name, number, fingerprint) for number, name in enumerate("abc")})


def test_a_replaced_mask_goes_on_for_those_who_have_it(library: MaskLibrary, fingerprint: Fingerprint) -> None:
    old = library.resolve("a")
    library.put(stored("a", 4, fingerprint))
    new = library.resolve("a")
    assert old.mask.digest != new.mask.digest
    assert library.retired == {old.mask.digest}
    assert library.mask_of(old.wire).members == old.mask.members
    assert library.forget(library.retired) == []
    digest = old.mask.digest
    del old
    assert library.forget(library.retired) == [digest]
    assert digest not in library
    with pytest.raises(UnknownMask):
        library.mask_of(digest)


def test_a_retired_mask_is_not_there_for_new_requests_even_by_digest(library: MaskLibrary) -> None:
    kept = library.resolve("a,b@0.5")
    library.discard("b")
    digest = next(iter(library.retired))
    for name in ("b", digest, f"{digest}@0.5"):
        with pytest.raises(UnknownMask):
            library.resolve(name)
    # A request on its way to the engine still gets there.
    assert library.resolve(kept.wire, retired=True).mask.members == kept.mask.members


@pytest.mark.parametrize("expression", ["a,b", "b@0.5", "a@2,b@3"])
def test_what_a_joined_mask_is_made_of_stays_as_long_as_it_is_used(library: MaskLibrary, expression: str) -> None:
    """Also where a worker multiplies it into a row: it is told to forget only when no core needs it."""
    used = library.resolve(expression)
    digest = library.masks["b"].mask.digest
    before = used.mask.whole().digest
    library.discard("b")
    assert library.forget(library.retired) == []
    assert library.mask_of(used.wire).whole().digest == before
    wire = used.wire
    del used
    assert library.forget(library.retired) == [digest]
    with pytest.raises(UnknownMask):
        library.mask_of(wire)


def test_content_with_two_names_stays_until_both_are_gone(library: MaskLibrary, fingerprint: Fingerprint) -> None:
    library.put(stored("same", 0, fingerprint))
    library.discard("a")
    assert library.retired == frozenset()
    assert library.resolve("same").name == "same"
    assert library.get(library.masks["same"].mask.digest).name == "same"
    library.discard("same")
    assert len(library.retired) == 1


def test_content_that_comes_back_is_no_longer_retired(library: MaskLibrary, fingerprint: Fingerprint) -> None:
    library.discard("a")
    (digest,) = library.retired
    library.put(stored("again", 0, fingerprint))
    assert library.retired == frozenset()
    assert library.forget([digest]) == []
    assert library.resolve(digest).name == "again"


def test_the_end_of_the_last_use_is_reported_once_and_only_for_what_is_retired(library: MaskLibrary) -> None:
    reports: list[frozenset[str]] = []
    library.on_unused = lambda: reports.append(library.retired)
    one, two, other = library.resolve("a"), library.resolve("a,b"), library.resolve("c")
    del other
    library.discard("a")
    del one
    assert reports == []
    del two
    assert reports == [library.retired]


def test_a_request_of_another_model_is_never_put(library: MaskLibrary, fingerprint: Fingerprint) -> None:
    foreign = fingerprint.model_copy(update={"weights_digest": "d" * 64})
    with pytest.raises(FingerprintError, match="mask 'a' was made for another model"):
        library.put(stored("a", 1, foreign))
    assert library.retired == frozenset()


def test_requests_and_changes_from_several_threads_never_meet_a_half_change(
    library: MaskLibrary, fingerprint: Fingerprint
) -> None:
    contents = [stored("a", number, fingerprint) for number in range(5)]
    digests = {content.mask.digest for content in contents}
    stop, problems = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            try:
                resolved = library.resolve("a")
                assert resolved.mask.digest in digests
                assert library.mask_of(resolved.wire).digest == resolved.mask.digest
            except Exception as error:
                problems.append(error)
                return

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(400):
        library.put(contents[number % 5])
        library.forget(library.retired)
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
    gc.collect()
    library.forget(library.retired)
    assert library.retired <= {stored("c", 2, fingerprint).mask.digest}


class Engine:
    """A core with two workers, each with a library of its own, as in processes of their own."""

    def __init__(self, library: MaskLibrary) -> None:
        self.libraries = [MaskLibrary(library.fingerprint, library.masks) for _ in range(3)]
        self.core, *self.workers = map(self._process, self.libraries)
        self.core.collective_rpc = self._all_workers
        self.told: list[str] = []

    @staticmethod
    def _process(library: MaskLibrary) -> SimpleNamespace:
        from crane_serve.engine.config import MaskConfig

        class Config(MaskConfig):
            def __init__(self) -> None:
                dict.__init__(self)

            def library(self) -> MaskLibrary:
                return library

        config = SimpleNamespace(additional_config={"crane": Config()})
        runner = SimpleNamespace(vllm_config=config)
        return SimpleNamespace(vllm_config=config, worker=SimpleNamespace(model_runner=runner))

    def _all_workers(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        self.told.append(method)
        run = {"crane_change_mask": live_masks.change_in_worker, "crane_forget_masks": live_masks.forget_in_worker}[
            method
        ]
        return [run(worker, *args) for worker in self.workers]


@pytest.fixture
def engine(library: MaskLibrary) -> Engine:
    return Engine(library)


def test_a_change_reaches_core_and_workers(engine: Engine, fingerprint: Fingerprint) -> None:
    new = stored("new", 5, fingerprint)
    assert live_masks.change_in_core(engine.core, "new", encode_mask("new", new.mask, new.info)) == 2
    assert all(library.resolve("new").mask.digest == new.mask.digest for library in engine.libraries)
    live_masks.change_in_core(engine.core, "new", None)
    for library in engine.libraries:
        with pytest.raises(UnknownMask):
            library.resolve("new")
        assert new.mask.digest in library  # until told to forget it


def test_workers_keep_what_a_request_of_the_core_still_needs(engine: Engine) -> None:
    request = engine.libraries[0].resolve("a")
    digest = request.mask.digest
    live_masks.change_in_core(engine.core, "a", None)
    live_masks.forget_in_core(engine.core, [digest])
    assert all(digest in library for library in engine.libraries)
    assert engine.told == ["crane_change_mask"]
    del request
    live_masks.forget_pending(engine.core)
    assert all(digest not in library for library in engine.libraries)
    live_masks.forget_pending(engine.core)
    assert engine.told == ["crane_change_mask", "crane_forget_masks"]


def test_what_comes_back_before_it_is_forgotten_stays(engine: Engine, fingerprint: Fingerprint) -> None:
    request = engine.libraries[0].resolve("a")
    live_masks.change_in_core(engine.core, "a", None)
    live_masks.forget_in_core(engine.core, [request.mask.digest])
    again = stored("again", 0, fingerprint)
    live_masks.change_in_core(engine.core, "again", encode_mask("again", again.mask, again.info))
    del request
    live_masks.forget_pending(engine.core)
    assert all(library.resolve("again").mask.digest == again.mask.digest for library in engine.libraries)


@pytest.mark.parametrize(
    ("rows", "running", "in_use", "full"),
    [(2, 8, {"x", "y"}, True), (2, 8, {"x"}, False), (2, 2, {"x", "y"}, False), (2, 8, {"x", "SELF"}, False)],
)
def test_a_mask_without_a_row_is_refused_only_where_rows_can_run_out(
    fingerprint: Fingerprint, rows: int, running: int, in_use: set[str], full: bool
) -> None:
    from pathlib import Path

    from crane_serve.engine.config import MaskConfig

    mask = ResolvedMask("a", Composition([Member(stored("a", 0, fingerprint).mask)]))
    in_use = {mask.mask.digest if digest == "SELF" else digest for digest in in_use}
    config = SimpleNamespace(
        additional_config={"crane": MaskConfig(rows, False, False, "model", Path("masks"), "attnlrp", "0")},
        scheduler_config=SimpleNamespace(max_num_seqs=running),
    )
    if full:
        with pytest.raises(MaskTableFull, match="mask a: 2 other masks are in use"):
            require_row(config, mask, in_use)
    else:
        require_row(config, mask, in_use)


@pytest.mark.parametrize("own_process", [True, False])
def test_the_engine_core_too_refuses_a_mask_without_a_row(fingerprint: Fingerprint, own_process: bool) -> None:
    """Its second line: a batch with more masks than rows would end the worker."""
    from pathlib import Path

    from crane_serve.engine.config import MaskConfig
    from crane_serve.engine.plugin import _LEASE, _add_request

    def request(name: str, neuron: int) -> SimpleNamespace:
        lease = ResolvedMask(name, Composition([Member(stored(name, neuron, fingerprint).mask)]))
        return SimpleNamespace(request_id=name, client_index=0, **{_LEASE: lease})

    added: list[str] = []
    refused: list[str] = []
    config = MaskConfig(2, False, False, "model", Path("masks"), "attnlrp", "0")
    core = SimpleNamespace(
        vllm_config=SimpleNamespace(
            additional_config={"crane": config}, scheduler_config=SimpleNamespace(max_num_seqs=8)
        ),
        scheduler=SimpleNamespace(requests={name: request(name, number) for number, name in enumerate("ab")}),
    )
    if own_process:
        core._send_finish_outputs_to_client = lambda ids, *how: refused.extend(ids)

    def add(one: SimpleNamespace) -> None:
        _add_request(lambda core, request: added.append(request.request_id), core, one)

    add(request("same content as a", 0))
    add(SimpleNamespace(request_id="unmasked", client_index=0))
    if own_process:
        add(request("c", 2))
    else:
        with pytest.raises(MaskTableFull):
            add(request("c", 2))
    assert added == ["same content as a", "unmasked"]
    assert refused == (["c"] if own_process else [])
