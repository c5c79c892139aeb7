"""From masks to table rows to tokens."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from crane_serve.common.masks import Composition, Member, NeuronMask, Positions
from crane_serve.engine.routing import fill_slots, row_per_token
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


ALL, PROMPT, GENERATED = Positions.ALL, Positions.PROMPT, Positions.GENERATED


@pytest.mark.parametrize("tokens", [[3, 1, 2], np.array([3, 1, 2], dtype=np.int32)], ids=["list", "array"])
def test_each_token_reads_the_row_of_its_request(tokens: list[int]) -> None:
    rows = row_per_token([2, 0, 5], [ALL] * 3, tokens, [0, 0, 0], [9, 9, 1])
    assert rows.tolist() == [2, 2, 2, 0, 5, 5]
    assert rows.dtype == np.int64


def test_a_request_without_tokens_has_none() -> None:
    assert row_per_token([2, 3], [ALL, PROMPT], [0, 1], [0, 0], [4, 4]).tolist() == [3]
    assert row_per_token([], [], [], [], []).tolist() == []


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
    rows = row_per_token(
        [3, 7, 7, 0], [ALL, PROMPT, GENERATED, PROMPT], [1, 4, 4, 2], [0, computed, computed, 0], [1, prompt, prompt, 1]
    )
    assert rows.tolist() == [3, *masked_prompt, *masked_generated, 0, 0]


def test_refuses_lists_of_different_length() -> None:
    with pytest.raises(ValueError, match="2 rows and 2 positions for 1, 2 and 2 requests"):
        row_per_token([1, 2], [ALL, ALL], [3], [0, 0], [5, 5])


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
