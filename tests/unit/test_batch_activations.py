"""Which tokens are stored, collected, replaced and reduced, with buffers that are filled by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crane_serve.common.masks import Fingerprint, Positions
from crane_serve.engine.activations import (
    MAX_ACTIVATIONS,
    MAX_REQUESTS,
    ActivationRequest,
    ActivationsError,
    BatchActivations,
    CaptureBuffers,
    Reduction,
    TooManyActivations,
    asked_for,
    joined,
)
from crane_serve.engine.admission import MaskRequest
from crane_serve.engine.batch_masks import BatchMasks
from crane_serve.engine.routing import MaskedTokens

SIZES = (6, 4)
MOST_TOKENS = 16
FINGERPRINT = Fingerprint(
    architecture="TinyForCausalLM",
    layers=2,
    hidden_size=4,
    intermediate_sizes=SIZES,
    config_digest="a" * 64,
    weights_digest="b" * 64,
)


def value(layer: int, neuron: int, key: str, position: int, run: int = 0) -> float:
    return 1000 * layer + 100 * neuron + position + 0.25 * run - (5000 if key == "b" else 0)


def gate_value(neuron: int, position: int) -> float:
    return (position + neuron) % 3 - 1.0


def up_value(neuron: int, position: int) -> float:
    return (neuron + 1) * (2.5 - position)


class Rank:
    """One rank's buffers, filled as its MLPs would: [layer -> first neuron, neurons]."""

    def __init__(self, layers: dict[int, tuple[int, int]]) -> None:
        self.layers = layers
        self.buffers = CaptureBuffers(gates=True)
        slots = torch.zeros(MOST_TOKENS, dtype=torch.int64)
        for layer, (start, neurons) in layers.items():
            self.buffers.add(layer, neurons, start, slots, like=torch.zeros(1))
            both = torch.zeros(MOST_TOKENS + 1, 2 * neurons)
            self.buffers.add_gates(layer, both[:, :neurons], both[:, neurons:])
        self.activations = BatchActivations(self.buffers)

    def step(self, batch: list[tuple[str, ActivationRequest | None, int, int]], prompt: int = 4, run: int = 0) -> None:
        """A batch of (key, what it asks for, tokens computed before, tokens)."""
        requests = [None if request is None else (key, request) for key, request, *_ in batch]
        computed, tokens = [each[2] for each in batch], [each[3] for each in batch]
        self.activations.fill(requests, tokens, computed, [prompt] * len(batch))
        places = [(key, start + index) for key, _, start, count in batch for index in range(count)]
        for row, (key, position) in zip(self.buffers.slots.tolist(), places, strict=False):
            for layer, (start, neurons) in self.layers.items():
                buffers = self.buffers.of(layer)
                values = [value(layer, start + neuron, key, position, run) for neuron in range(neurons)]
                buffers.neurons[row] = torch.tensor(values)
                for buffer, of in ((buffers.gate, gate_value), (buffers.up, up_value)):
                    buffer[row] = torch.tensor([of(start + neuron, position) for neuron in range(neurons)])


def whole() -> Rank:
    return Rank({0: (0, 6), 1: (0, 4)})


def rows(request: ActivationRequest, key: str, positions: range, run: int = 0) -> dict[int, np.ndarray]:
    return {
        layer: np.array(
            [
                [value(layer, n, key, at, run) for n in (range(SIZES[layer]) if neurons is None else neurons)]
                for at in positions
            ]
        )
        for layer, neurons in request.neurons.items()
    }


def taken(request: ActivationRequest, end: int, *ranks: Rank, key: str = "a"):
    return joined(request, SIZES, [rank.activations.take(key, end) for rank in ranks])


def test_tokens_that_nobody_wants_go_to_row_0_and_others_to_rows_of_their_own() -> None:
    rank, request = whole(), ActivationRequest({0: None}, first=1, end=3)
    rank.step([("x", None, 0, 2), ("a", request, 0, 4), ("b", ActivationRequest({1: (2,)}), 0, 2)])
    assert rank.buffers.slots.tolist() == [0, 0, 0, 1, 2, 0, 3, 4] + [0] * 8
    rank.step([("x", None, 2, 1)])
    assert not rank.buffers.slots.any()


def test_an_unmasked_batch_behind_a_masked_one_has_its_rows() -> None:
    rank, slots = whole(), torch.zeros(MOST_TOKENS, dtype=torch.int64)
    library, table = SimpleNamespace(mask_of=str), SimpleNamespace(assign=lambda masks: [1] * len(masks))
    masks = BatchMasks(library, table, slots, rank.activations)
    ids = (list, lambda index: [])  # of the batch, and before it: for masks that end with a token
    masks.fill([MaskedTokens(MaskRequest("zh", Positions.ALL), 2)], [2], [0], *ids)
    assert slots[:3].tolist() == [1, 1, 0]
    rank.activations.fill([("a", ActivationRequest({0: None}))], [3], [0], [3])
    masks.fill([None], [3], [0], *ids)
    assert not slots.any()
    assert rank.buffers.slots[:4].tolist() == [1, 2, 3, 0]
    masks.clear()
    assert not rank.buffers.slots.any()


def test_chunks_and_decoded_tokens_in_changing_order() -> None:
    rank, of_a, of_b = whole(), ActivationRequest({1: (3, 0), 0: None}), ActivationRequest({1: (2,)})
    rank.step([("a", of_a, 0, 3), ("b", of_b, 0, 4)])
    rank.step([("b", of_b, 4, 1), ("x", None, 0, 5), ("a", of_a, 3, 1)])
    rank.step([("a", of_a, 4, 1), ("b", of_b, 5, 1)])
    for key, request, end in (("a", of_a, 5), ("b", of_b, 6)):
        seen = taken(request, end, rank, key=key)
        assert (seen.first, seen.tokens) == (0, end)
        for layer, wanted in rows(request, key, range(end)).items():
            assert np.array_equal(seen.values[layer]["values"], wanted)
        assert rank.activations.take(key, end) is None


@pytest.mark.parametrize("reductions", [(), tuple(Reduction)])
def test_halves_and_stages_are_joined(reductions: tuple[Reduction, ...]) -> None:
    request = ActivationRequest({0: (5, 0, 3), 1: None}, reductions)
    ranks = [Rank({0: (0, 3)}), Rank({0: (3, 3)}), Rank({1: (0, 2)}), Rank({1: (2, 2)})]
    for rank in ranks:
        rank.step([("a", request, 0, 4)])
    seen = taken(request, 4, *ranks)
    for layer, wanted in rows(request, "a", range(4)).items():
        if reductions:
            assert seen.values[layer]["mean"] == pytest.approx(wanted.mean(0))
            assert seen.values[layer]["mean_abs"] == pytest.approx(np.abs(wanted).mean(0))
            assert seen.values[layer]["max"] == pytest.approx(wanted.max(0))
            assert seen.values[layer]["positive"] == pytest.approx((wanted > 0).mean(0))
            neurons = range(SIZES[layer]) if request.neurons[layer] is None else request.neurons[layer]
            gate, up = (np.array([[of(n, at) for n in neurons] for at in range(4)]) for of in (gate_value, up_value))
            assert seen.values[layer]["act_positive"] == pytest.approx((gate > 0).mean(0))
            assert seen.values[layer]["up_mean_abs"] == pytest.approx(np.abs(up).mean(0))
            assert 0 < seen.values[layer]["act_positive"].min() < seen.values[layer]["act_positive"].max() < 1
        else:
            assert np.array_equal(seen.values[layer]["values"], wanted)


def test_what_a_step_in_inference_mode_has_left_is_reduced_outside_of_it() -> None:
    rank, request = whole(), ActivationRequest({0: None}, (Reduction.MEAN, Reduction.MAX))
    with torch.inference_mode():
        rank.step([("a", request, 0, 3)])
        rank.step([("a", request, 3, 1)])
    seen, wanted = taken(request, 4, rank), rows(request, "a", range(4))[0]
    assert seen.values[0]["mean"] == pytest.approx(wanted.mean(0))
    assert seen.values[0]["max"] == pytest.approx(wanted.max(0))


def test_a_part_that_a_rank_does_not_return_is_an_error() -> None:
    request, first, second = ActivationRequest({0: None}), Rank({0: (0, 3)}), Rank({0: (3, 3)})
    for rank in (first, second):
        rank.step([("a", request, 0, 4)])
    with pytest.raises(ActivationsError, match="layer 0: an activation is not finite, or its rank did not return it"):
        taken(request, 4, first)


@pytest.mark.parametrize("reductions", [(), (Reduction.MEAN,)])
@pytest.mark.parametrize("generated", [1, 20])
def test_a_preempted_request_has_each_token_once(reductions: tuple[Reduction, ...], generated: int) -> None:
    rank, request = whole(), ActivationRequest({0: (1,)}, reductions, first=1)
    rank.step([("a", request, 0, 4)])
    for token in range(generated):
        rank.step([("a", request, 4 + token, 1)])
    end = 4 + generated
    for start in range(0, end, 5):  # again, in chunks
        rank.step([("a", request, start, min(5, end - start))])
    rank.step([("a", request, end, 1)])
    seen = taken(request, end + 1, rank)
    wanted = rows(request, "a", range(1, end + 1))[0]
    assert seen.tokens == end
    assert seen.values[0]["mean" if reductions else "values"] == pytest.approx(wanted.mean(0) if reductions else wanted)


@pytest.mark.parametrize("reductions", [(), (Reduction.MEAN,)])
def test_a_token_that_is_computed_again_replaces_the_one_before(reductions: tuple[Reduction, ...]) -> None:
    rank, request = whole(), ActivationRequest({0: (1,)}, reductions)
    rank.step([("a", request, 0, 4)])
    rank.step([("a", request, 4, 1)])
    rank.step([("a", request, 0, 5)], run=1)
    seen = taken(request, 5, rank)
    before, after = (rows(request, "a", range(5), run)[0] for run in (0, 1))
    if reductions:  # the prompt is the same again, and has been reduced
        assert seen.values[0]["mean"] == pytest.approx(np.concatenate([before[:4], after[4:]]).mean(0))
    else:
        assert np.array_equal(seen.values[0]["values"], after)


@pytest.mark.parametrize("reductions", [(), (Reduction.MAX,)])
def test_tokens_that_were_run_behind_the_end_do_not_count(reductions: tuple[Reduction, ...]) -> None:
    rank, request = whole(), ActivationRequest({0: (1,)}, reductions)
    rank.step([("a", request, 0, 4)])
    for position in range(4, 15):
        rank.step([("a", request, position, 1)])
    seen = taken(request, 13, rank)
    wanted = rows(request, "a", range(13))[0]
    assert seen.values[0]["max" if reductions else "values"] == pytest.approx(wanted.max(0) if reductions else wanted)


@pytest.mark.parametrize("reductions", [(), *((reduction,) for reduction in Reduction)])
def test_a_token_that_no_mlp_has_stored_is_an_error(reductions: tuple[Reduction, ...]) -> None:
    rank, request = whole(), ActivationRequest({0: (1,)}, reductions)
    rank.step([("b", request, 0, 4)])  # whose values stand in the same rows
    rank.activations.fill([("a", request)], [4], [0], [4])
    with pytest.raises(ActivationsError, match="layer 0: an activation is not finite"):
        taken(request, 4, rank)


def test_a_token_that_is_missing_makes_no_answer() -> None:
    rank, request = whole(), ActivationRequest({0: (1,)})
    rank.step([("a", request, 0, 2)])
    rank.step([("a", request, 3, 1)])
    assert rank.activations.take("a", 4) is None
    rank.step([("b", request, 2, 2)])  # the first ones came from somewhere else
    assert rank.activations.take("b", 4) is None


def test_what_nobody_takes_is_dropped_when_there_are_too_many() -> None:
    rank, request = whole(), ActivationRequest({0: (1,)})
    for number in range(MAX_REQUESTS + 1):
        rank.step([(f"{number}", request, 0, 1)], prompt=1)
    assert rank.activations.take("0", 1) is None
    assert all(rank.activations.take(f"{number}", 1) for number in range(1, MAX_REQUESTS + 1))


def test_what_a_request_says_arrives() -> None:
    request = ActivationRequest({1: (3, 0), 0: None}, (Reduction.MAX, Reduction.MEAN), first=2, end=7)

    class Parameters:
        extra_args = request.argument("key")

    assert asked_for(Parameters()) == ("key", request)
    Parameters.extra_args = {"crane_activations": {"key": "key"}}
    with pytest.raises(ActivationsError, match="crane_activations: expected key, layers, reduce and span"):
        asked_for(Parameters())
    Parameters.extra_args = None
    assert asked_for(Parameters()) is None


def test_values_are_bounded_by_tokens_or_reductions() -> None:
    tokens = MAX_ACTIVATIONS // 10
    ActivationRequest({0: None, 1: None}).require(FINGERPRINT, 4, tokens)
    with pytest.raises(TooManyActivations, match=f"of 10 neurons are {(tokens + 1) * 10} values"):
        ActivationRequest({0: None, 1: None}).require(FINGERPRINT, 4, tokens + 1)
    ActivationRequest({0: None, 1: None}, first=1).require(FINGERPRINT, 4, tokens + 1)
    ActivationRequest({0: None, 1: None}, (Reduction.MEAN,)).require(FINGERPRINT, 4, 100 * tokens)
