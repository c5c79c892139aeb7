"""The check at start: masks take effect, in every layer and on every data-parallel rank, or nothing is served."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from crane_serve.common.masks import MaskInfo, MaskLibrary, NeuronMask, ResolvedMask, StoredMask

_NAME = "self-check-layer"
_TEXT = "One two three four five six seven eight nine ten."
_TOKENS = 16


class SelfCheckFailed(ValueError):
    """Masks do not take effect in this engine."""


class TokenScore(Protocol):
    """The score of a token."""

    @property
    def logprob(self) -> float:
        """Log-probability in nats."""


class Scores(Protocol):
    """The scores of a prompt after its first token."""

    @property
    def tokens(self) -> Sequence[TokenScore]:
        """One per token."""


class MaskedEngine(Protocol):
    """An engine to check, such as `EngineService`."""

    library: MaskLibrary
    tokenizer: Any

    @property
    def data_parallel_ranks(self) -> int:
        """How many engines share the requests."""

    async def score(
        self,
        prompt_ids: list[int],
        candidates: Sequence[int],
        mask: ResolvedMask | None,
        *,
        data_parallel_rank: int | None = None,
    ) -> Scores:
        """The scores of a text on one rank."""

    async def put_mask(self, stored: StoredMask) -> None:
        """Add a mask, or replace the one of its name."""

    async def remove_mask(self, name: str) -> None:
        """Remove a mask."""


async def check_masks(service: MaskedEngine) -> None:
    """Score a text unmasked and with each layer's MLP switched off, by temporary masks.

    Raises SelfCheckFailed naming the layers whose mask changes nothing, or if the score of an unmasked request differs
    before and after masked requests.
    """
    fingerprint = service.library.fingerprint
    tokens = list(service.tokenizer(_TEXT)["input_ids"])[:_TOKENS]
    ranks = range(service.data_parallel_ranks)
    name = _NAME
    while name in service.library.masks or name in service.library.invalid:
        name += "-"  # a user's mask must not be replaced

    async def score(mask: str | None) -> list[tuple[float, ...]]:
        resolved = service.library.resolve(mask)
        scores = [await service.score(tokens, (), resolved, data_parallel_rank=rank) for rank in ranks]
        return [tuple(token.logprob for token in each.tokens) for each in scores]

    before = await score(None)
    idle, effects = [], []
    for layer in range(fingerprint.layers):
        scales = torch.ones(fingerprint.layers, max(fingerprint.intermediate_sizes))
        scales[layer, : fingerprint.intermediate_sizes[layer]] = 0.0
        info = MaskInfo(language="any", method="self-check", fingerprint=fingerprint)
        await service.put_mask(StoredMask(name, NeuronMask(scales, fingerprint.intermediate_sizes), info))
        masked = await score(name)
        effects.append(min(_apart(off, on) for off, on in zip(masked, before, strict=True)))
        if not effects[-1]:
            idle.append(layer)
    await service.remove_mask(name)
    if idle:
        raise SelfCheckFailed(
            f"switching off all neurons of layers {idle} changes nothing; masks cannot be served ({_suspect(effects)})"
        )
    drift = max(_apart(now, then) for now, then in zip(await score(None), before, strict=True))
    if drift > min(effects) / 2:
        raise SelfCheckFailed(
            f"an unmasked request differs by {drift:.3g} nats from what it was before masked ones, while masks make "
            f"a difference of {min(effects):.3g}; masks cannot be served"
        )


def _suspect(effects: Sequence[float]) -> str:
    """Where damaged weights may be: not always in the layer without effect, since those of another layer can hide its
    effect."""
    loudest = max(range(len(effects)), key=effects.__getitem__)
    if not effects[loudest]:
        return "no layer changes anything, as when the weights behind the last one are damaged"
    return f"layer {loudest} changes most, by {effects[loudest]:.3g} nats; damaged weights there would drown the others"


def _apart(left: tuple[float, ...], right: tuple[float, ...]) -> float:
    """Largest difference between log-probabilities of the same tokens, in nats."""
    return max(abs(one - other) for one, other in zip(left, right, strict=True))
