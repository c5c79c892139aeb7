"""From masks to table rows to tokens."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crane_serve.common.masks import Composition, Member, NeuronMask, Positions
from crane_serve.engine.admission import MaskRequest
from crane_serve.engine.batch_masks import BatchMasks
from crane_serve.engine.routing import MaskedTokens, fill_slots, row_per_token
from crane_serve.engine.table import UNMASKED_ROW, MaskTable, Part, new_table

LAYERS, NEURONS = 3, 8


def mask(neuron: int) -> Composition:
    """One mask per neuron: each layer scales another one, by an amount of its own."""
    scales = torch.ones(LAYERS, NEURONS)
    for layer in range(LAYERS):
        scales[layer, (neuron + layer) % NEURONS] = neuron / 64
    return Composition([Member(NeuronMask(scales, (NEURONS,) * LAYERS))])


def tables(rows: int, *, neurons: int = NEURONS, layers: tuple[int, ...] = (0, 1, 2)) -> dict[int, Tensor]:
    return {layer: torch.full((rows, neurons), 7.0) for layer in layers}


def table_of(rows: int) -> tuple[MaskTable, dict[int, Tensor]]:
    held = tables(rows)
    return MaskTable({layer: [Part(table, 0, NEURONS)] for layer, table in held.items()}), held


def assert_holds(held: dict[int, Tensor], row: int, mask: Composition) -> None:
    for layer, table in held.items():
        assert torch.equal(table[row], mask.intermediate(layer))


def test_a_new_table_is_unmasked() -> None:
    _, held = table_of(rows=4)
    assert all(bool((table == 1).all()) for table in held.values())


def test_each_mask_has_a_row_of_its_scales() -> None:
    table, held = table_of(rows=4)
    masks = [mask(1), mask(2), mask(1), mask(3)]
    rows = table.assign(masks)
    assert rows[0] == rows[2]
    assert len(set(rows)) == 3
    assert UNMASKED_ROW not in rows
    for row, wanted in zip(rows, masks, strict=True):
        assert_holds(held, row, wanted)
    assert all(bool((layer[UNMASKED_ROW] == 1).all()) for layer in held.values())


def test_equal_content_shares_a_row() -> None:
    table, _ = table_of(rows=4)
    assert table.assign([mask(1)]) == table.assign([mask(1)])


def test_only_the_owned_layers_and_shards_are_filled() -> None:
    held = tables(2, neurons=4, layers=(1, 2))
    table = MaskTable({1: [Part(held[1], 0, 4)], 2: [Part(held[2], 4, 8)]})
    wanted = mask(5)
    (row,) = table.assign([wanted])
    assert torch.equal(held[1][row], wanted.intermediate(1, 0, 4))
    assert torch.equal(held[2][row], wanted.intermediate(2, 4))


def test_rows_take_the_dtype_of_the_model() -> None:
    tensor = new_table(3, NEURONS, like=torch.zeros(1, dtype=torch.bfloat16))
    assert tensor.dtype == torch.bfloat16
    assert tensor.shape == (3, NEURONS)
    table = MaskTable({0: [Part(tensor, 0, NEURONS)]})
    (row,) = table.assign([mask(3)])
    assert torch.equal(tensor[row], mask(3).intermediate(0).bfloat16())


def test_the_least_recently_used_row_is_reused() -> None:
    table, held = table_of(rows=4)
    one, two, three = table.assign([mask(1), mask(2), mask(3)])
    table.assign([mask(1)])  # now 2 is the oldest
    assert table.assign([mask(4)]) == [two]
    assert_holds(held, two, mask(4))
    assert table.assign([mask(1), mask(3)]) == [one, three]


def test_a_full_table_never_evicts_what_the_batch_needs() -> None:
    table, held = table_of(rows=4)
    table.assign([mask(1), mask(2), mask(3)])
    batch = [mask(5), mask(1), mask(4)]  # 1 is the oldest, yet needed
    for row, wanted in zip(table.assign(batch), batch, strict=True):
        assert_holds(held, row, wanted)


def test_random_batches_always_find_their_scales() -> None:
    generator = random.Random(0)
    table, held = table_of(rows=5)
    for _ in range(300):
        batch = [mask(generator.randrange(1, 12)) for _ in range(generator.randrange(1, 5))]
        rows = table.assign(batch)
        for row, wanted in zip(rows, batch, strict=True):
            assert_holds(held, row, wanted)
    assert all(bool((layer[UNMASKED_ROW] == 1).all()) for layer in held.values())


def test_an_unmasked_batch_needs_no_row() -> None:
    table, _ = table_of(rows=1)
    assert table.assign([]) == []


def test_refuses_more_masks_than_rows() -> None:
    table, held = table_of(rows=3)
    rows = table.assign([mask(1), mask(2)])
    with pytest.raises(RuntimeError, match="3 distinct masks in one batch, the table holds 2"):
        table.assign([mask(1), mask(3), mask(4)])
    assert table.assign([mask(1), mask(2)]) == rows
    assert_holds(held, rows[0], mask(1))


def test_refuses_a_table_without_layers() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        MaskTable({})


def tokens_of(positions: str, prompt: int) -> MaskedTokens:
    return MaskedTokens(MaskRequest("zh", Positions.parse(positions)), prompt)


def row_of(row: int, positions: str, prompt: int, computed: int, ids: list[int]) -> list[int]:
    """The rows of a step of one request that begins with it, behind tokens 0, 1, 2, ..."""
    masked = tokens_of(positions, prompt)
    masked.restart(range(computed), computed)
    masked.read(ids)
    return row_per_token([row], [masked], [len(ids)], [computed]).tolist()


@pytest.mark.parametrize("tokens", [[3, 1, 2], np.array([3, 1, 2], dtype=np.int32)], ids=["list", "array"])
def test_each_token_reads_the_row_of_its_request(tokens: list[int]) -> None:
    masked = [tokens_of("all", 9), None, tokens_of("all", 1)]
    rows = row_per_token([2, 0, 5], masked, tokens, [0, 0, 0])
    assert rows.tolist() == [2, 2, 2, 0, 5, 5]
    assert rows.dtype == np.int64


def test_a_request_without_tokens_has_none() -> None:
    masked = [tokens_of("all", 4), tokens_of("prompt", 4)]
    assert row_per_token([2, 3], masked, [0, 1], [0, 0]).tolist() == [3]
    assert row_per_token([], [], [], []).tolist() == []


@pytest.mark.parametrize(
    ("computed", "prompt", "masked_prompt", "masked_generated"),
    [
        (0, 9, [7, 7, 7, 7], [0, 0, 0, 0]),  # a chunk within the prompt
        (5, 9, [7, 7, 7, 7], [0, 0, 0, 0]),  # its last chunk
        (9, 9, [0, 0, 0, 0], [7, 7, 7, 7]),  # behind it
        (7, 9, [7, 7, 0, 0], [0, 0, 7, 7]),  # across its end, as after a preemption
    ],
)
def test_positions_decide_token_by_token(
    computed: int, prompt: int, masked_prompt: list[int], masked_generated: list[int]
) -> None:
    masked = [tokens_of("all", prompt), tokens_of("prompt", prompt), tokens_of("generated", prompt), None]
    rows = row_per_token([3, 7, 7, 0], masked, [1, 4, 4, 2], [0, computed, computed, 0])
    assert rows.tolist() == [3, *masked_prompt, *masked_generated, 0, 0]


@pytest.mark.parametrize(
    ("positions", "computed", "expected"),
    [
        ("prompt[-2:]", 0, [0, 0, 0, 7, 7, 0, 0]),
        ("prompt[1:3]+generated[1:2]", 0, [0, 7, 7, 0, 0, 0, 7]),
        ("prompt[1:3]+generated[1:2]", 2, [7, 0, 0, 0, 7, 0, 0]),
        ("prompt[-2:]+generated[:1]", 0, [0, 0, 0, 7, 7, 7, 0]),
        ("all+until=102", 0, [7, 7, 7, 0, 0, 0, 0]),
        ("prompt[3:]+generated+until=102", 0, [0, 0, 0, 7, 7, 7, 7]),  # not masked, so it ends nothing
        ("generated+until=102,105", 0, [0, 0, 0, 0, 0, 7, 0]),
        ("all+until=1", 3, [0, 0, 0, 0, 0, 0, 0]),  # one of the tokens that were computed before
        ("generated+until=1,106", 3, [0, 0, 7, 7, 7, 7, 7]),
        ("generated[1:]+until=103", 3, [0, 0, 0, 7, 0, 0, 0]),
    ],
)
def test_windows_and_ends_decide_token_by_token(positions: str, computed: int, expected: list[int]) -> None:
    assert row_of(7, positions, 5, computed, list(range(100, 107))) == expected


def test_a_token_that_is_not_known_yet_stops_what_would_miss_it() -> None:
    masked = tokens_of("all+until=3", 4)
    with pytest.raises(RuntimeError, match="not known yet"):
        masked.read([5, -1])
    with pytest.raises(RuntimeError, match="3 token ids are known of 4"):
        masked.restart([5, 6, 7], 4)


def test_refuses_lists_of_different_length() -> None:
    with pytest.raises(ValueError, match="2 rows for 2, 1 and 2 requests"):
        row_per_token([1, 2], [None, None], [3], [0, 0])


class Batches:
    """BatchMasks of one table, whose masks are for neurons 1 to 9; it counts how often the ids of a batch are read."""

    def __init__(self) -> None:
        table, _ = table_of(rows=10)
        library: Any = SimpleNamespace(mask_of=lambda expression: mask(int(expression)))
        self.masks = BatchMasks(library, table, torch.zeros(64, dtype=torch.int64))
        self.rows = dict(zip(range(1, 8), table.assign([mask(neuron) for neuron in range(1, 8)]), strict=True))
        self.read = 0

    def fill(self, requests: "list[Request]", tokens: list[int]) -> list[int]:
        def ids() -> list[int]:
            self.read += 1
            steps = zip(requests, tokens, strict=True)
            return [token for each, count in steps for token in each.ids[each.computed : each.computed + count]]

        def before(index: int) -> list[int]:
            return requests[index].ids[: requests[index].computed]

        computed = [each.computed for each in requests]
        self.masks.fill([each.masked for each in requests], tokens, computed, ids, before)
        for each, count in zip(requests, tokens, strict=True):
            each.computed += count
        return self.masks.slots.tolist()


class Request:
    """A request of a worker: all ids that it will ever have, of which the first `prompt` are its prompt."""

    def __init__(self, neuron: int, positions: str | None, ids: list[int], prompt: int, computed: int = 0) -> None:
        self.neuron, self.ids, self.prompt, self.computed = neuron, ids, prompt, computed
        self.positions = None if positions is None else Positions.parse(positions)
        request = None if self.positions is None else MaskRequest(str(neuron), self.positions)
        self.masked = None if request is None else MaskedTokens(request, prompt)

    def row(self, index: int, rows: dict[int, int]) -> int:
        """Of the token at an index, from the definition."""
        if self.positions is None:
            return UNMASKED_ROW
        every = list(range(len(self.ids)))
        chosen = [] if self.positions.prompt is None else every[: self.prompt][slice(*self.positions.prompt)]
        chosen += [] if self.positions.generated is None else every[self.prompt :][slice(*self.positions.generated)]
        ends = [token for token in chosen if self.ids[token] in self.positions.until]
        return rows[self.neuron] if index in chosen and (not ends or index <= ends[0]) else UNMASKED_ROW


_ANY_POSITIONS = st.one_of(
    st.sampled_from([None, "all", "prompt", "generated", "prompt[2:]+generated[:3]", "prompt[-3:]", "generated[2:4]"]),
    st.builds(
        lambda windows, until: f"{windows}+until={until}",
        st.sampled_from(["all", "prompt", "generated", "generated[1:]", "prompt[-2:]+generated[:4]", "prompt[:3]"]),
        st.sampled_from(["0", "1,2", "3", "99"]),
    ),
)
_REQUESTS = st.tuples(st.integers(1, 7), _ANY_POSITIONS, st.integers(1, 9), st.integers(0, 5))


@settings(max_examples=400, deadline=None)
@given(kinds=st.lists(_REQUESTS, min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_any_chunks_give_each_token_the_row_that_the_definition_gives(
    kinds: list[tuple[int, str | None, int, int]], seed: int
) -> None:
    """Chunks of any size, requests that come and go or change places, prefixes from the cache, and preemptions."""
    batches, draw = Batches(), random.Random(seed)
    waiting = [
        Request(neuron, positions, [draw.randrange(7) for _ in range(14)], prompt, computed)
        for neuron, positions, prompt, computed in kinds
    ]
    running: list[Request] = []
    while waiting or running:
        if waiting and (not running or draw.random() < 0.5):
            running.append(waiting.pop())
        if draw.random() < 0.1:
            running.reverse()
        if draw.random() < 0.1:
            running[0].computed = draw.randint(0, running[0].computed)
        left = [len(each.ids) - each.computed for each in running]
        tokens = [1 if draw.random() < 0.6 else draw.randint(1, most) for most in left]
        expected = [
            each.row(each.computed + offset, batches.rows)
            for each, count in zip(running, tokens, strict=True)
            for offset in range(count)
        ]
        slots = batches.fill(running, tokens)
        assert slots == expected + [UNMASKED_ROW] * (64 - len(expected))
        running = [each for each in running if each.computed < len(each.ids)]


@pytest.mark.parametrize(
    ("positions", "reads"),
    [
        ("all", 0),
        ("generated[2:3]", 0),
        ("generated[2:3]+until=5", 1),  # one masked token may end it
        ("all+until=5", 4),  # the chunk of the prompt and three tokens, the last of which ends it
        ("prompt+until=9", 1),
    ],
)
def test_ids_are_read_from_the_device_only_while_they_matter(positions: str, reads: int) -> None:
    batches = Batches()
    request = Request(1, positions, [8, 8, 8, 7, 7, 5, 7, 7, 7], prompt=3)
    batches.fill([request], [3])
    for _ in range(6):
        batches.fill([request], [1])
    assert batches.read == reads


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "generated[:2]", "all+until=5"])
def test_requests_that_decode_on_cost_nothing_once_their_rows_last(
    positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Batches()
    request = Request(1, positions, [8, 8, 8, 7, 7, 5, 7, 7, 7, 7], prompt=3)
    batches.fill([request], [3])
    for _ in range(5):
        batches.fill([request], [1])
    monkeypatch.setattr(batches.masks, "_table", None)  # what is left of the work would need it
    assert batches.fill([request], [1])[0] == request.row(8, batches.rows)


@pytest.mark.parametrize("rows", [[], [4], [4, 4, 2], [1, 2, 3, 4, 5]])
@pytest.mark.parametrize("used", [0, 2, 5])
def test_slots_behind_the_batch_are_unmasked(rows: list[int], used: int) -> None:
    slots = torch.tensor([9] * used + [UNMASKED_ROW] * (5 - used))
    assert fill_slots(slots, np.asarray(rows, dtype=np.int64), used) == len(rows)
    assert slots.tolist() == rows + [UNMASKED_ROW] * (5 - len(rows))


def test_refuses_a_batch_longer_than_the_slots() -> None:
    slots = torch.full((2,), 9, dtype=torch.int64)
    with pytest.raises(ValueError, match="3 tokens in a batch, slots for 2"):
        fill_slots(slots, np.ones(3, dtype=np.int64), 2)
    assert slots.tolist() == [9, 9]
