"""The check at start finds a layer, or a rank, in which masks do nothing, and masks that outlast their request."""

from collections.abc import Sequence

import pytest
import torch

from crane_serve.common.masks import Fingerprint, MaskInfo, MaskLibrary, NeuronMask, ResolvedMask, StoredMask
from crane_serve.engine.answers import Scores, TokenScore
from crane_serve.engine.self_check import SelfCheckFailed, check_masks
from tests.tiny import byte_tokenizer

RANKS = 2


class FakeService:
    """Log-probabilities that every masked neuron moves, unless its layer is deaf on that rank."""

    data_parallel_ranks = RANKS
    tokenizer = byte_tokenizer()

    def __init__(self, fingerprint: Fingerprint, deaf: tuple[tuple[int, int], ...] = (), leak: float = 0.0) -> None:
        self.library = MaskLibrary(fingerprint, {})
        self._deaf = deaf  # (rank, layer)
        self._leak = leak
        self._drift = 0.0

    async def put_mask(self, stored: StoredMask) -> None:
        self.library.put(stored)

    async def remove_mask(self, name: str) -> None:
        self.library.discard(name)

    async def score(
        self, prompt_ids: list[int], candidates: Sequence[int], mask: ResolvedMask | None, *, data_parallel_rank: int
    ) -> Scores:
        moved = torch.tensor(0.0) if mask is None else (1 - mask.mask.whole().intermediate).sum(dim=1)
        heard = [
            float(amount)
            for layer, amount in enumerate(moved.flatten())
            if (data_parallel_rank, layer) not in self._deaf
        ]
        logprobs = tuple(-float(token) - sum(heard) - self._drift for token in prompt_ids[1:])
        self._drift += 0.0 if mask is None else self._leak
        return Scores(tuple(TokenScore(logprob, False) for logprob in logprobs), (), len(prompt_ids), 0)


async def test_an_engine_that_obeys_passes_and_keeps_no_trace(fingerprint: Fingerprint) -> None:
    service = FakeService(fingerprint)
    await check_masks(service)  # type: ignore[arg-type]
    assert service.library.masks == {}
    assert service.library.forget(service.library.retired)
    assert service.library.retired == frozenset()


async def test_a_users_mask_of_the_same_name_stays(fingerprint: Fingerprint) -> None:
    service = FakeService(fingerprint)
    mask = NeuronMask.switching_off([[0], []], fingerprint.intermediate_sizes)
    info = MaskInfo(language="xx", method="test", fingerprint=fingerprint)
    await service.put_mask(StoredMask("self-check-layer", mask, info))
    await check_masks(service)  # type: ignore[arg-type]
    assert [stored.mask.digest for stored in service.library.masks.values()] == [mask.digest]


@pytest.mark.parametrize("rank", range(RANKS))
async def test_a_deaf_layer_of_one_rank_is_found(fingerprint: Fingerprint, rank: int) -> None:
    with pytest.raises(SelfCheckFailed, match=r"layers \[1\] changes nothing; masks cannot be served"):
        await check_masks(FakeService(fingerprint, deaf=((rank, 1),)))  # type: ignore[arg-type]


async def test_the_layer_that_may_drown_an_idle_one_is_named(fingerprint: Fingerprint) -> None:
    with pytest.raises(SelfCheckFailed, match=r"layers \[1\] changes nothing; .*layer 0 changes most, by 6 nats"):
        await check_masks(FakeService(fingerprint, deaf=((0, 1), (1, 1))))  # type: ignore[arg-type]


async def test_a_model_in_which_no_layer_matters_is_told_from_one_with_an_idle_layer(fingerprint: Fingerprint) -> None:
    with pytest.raises(SelfCheckFailed, match=r"layers \[0, 1\] changes nothing; .*behind the last one"):
        await check_masks(FakeService(fingerprint, deaf=((0, 0), (0, 1))))  # type: ignore[arg-type]


async def test_an_unmasked_request_that_masks_have_changed_is_found(fingerprint: Fingerprint) -> None:
    with pytest.raises(SelfCheckFailed, match=r"an unmasked request differs by \d+ nats from what it was before"):
        await check_masks(FakeService(fingerprint, leak=4.0))  # type: ignore[arg-type]


async def test_the_noise_of_a_machine_is_no_failure(fingerprint: Fingerprint) -> None:
    await check_masks(FakeService(fingerprint, leak=1e-3))  # type: ignore[arg-type]
