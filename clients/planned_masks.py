"""The masks of a server that a plan means, checked before any item is asked."""

from collections.abc import Sequence

from clients.answers import MaskListing, MaskSummary
from clients.client import AsyncCraneClient
from clients.errors import CraneError, EvaluationError
from clients.evaluation import RANDOM, UNMASKED, PlannedMask
from clients.plan import MaskChoice, Plan, has_budget, matching

_COMPOSED = (",", "@")
_PATTERN = ("*", "?", "[")
_ALL = "*"
_PROBE = "a"


async def find_masks(client: AsyncCraneClient, plan: Plan) -> dict[str, PlannedMask]:
    """The masks that a plan means, by name, `none` first.

    Raises EvaluationError, naming the available masks, for a mask that the server lacks or cannot use, and for a
    pattern or choice without a match.
    """
    listing = await client.masks()
    planned = {UNMASKED: PlannedMask(name=UNMASKED)}
    everything = (_ALL,) if listing.masks else ()
    for choice in everything if plan.masks is None else plan.masks:
        for mask in await _chosen(client, choice, plan.budgets, listing):
            planned.setdefault(mask.name, mask)
    return planned


async def _chosen(
    client: AsyncCraneClient, choice: str | MaskChoice, budgets: Sequence[float] | None, listing: MaskListing
) -> list[PlannedMask]:
    allowed = [mask for mask in listing.masks if has_budget(mask, budgets)]
    if isinstance(choice, MaskChoice):
        names = [mask.name for mask in allowed if choice.fits(mask)]
    elif any(sign in choice for sign in _COMPOSED):
        return [await _composed(client, choice, listing)]
    elif any(sign in choice for sign in _PATTERN):
        names = matching([choice], (mask.name for mask in allowed))
    elif choice == UNMASKED:
        return []
    else:
        return [await _named(client, choice, listing)]
    if not names:
        label = choice if isinstance(choice, str) else choice.model_dump(exclude_none=True)
        of_budgets = "" if budgets is None else f" at the budgets {', '.join(f'{budget:g}' for budget in budgets)}"
        raise EvaluationError(f"no mask of the server fits {label!r}{of_budgets}; it has {_known(listing)}")
    return [await _named(client, name, listing) for name in names]


async def _named(client: AsyncCraneClient, name: str, listing: MaskListing) -> PlannedMask:
    for unusable in listing.invalid:
        if unusable.name == name:
            raise EvaluationError(f"mask {name!r} cannot be used by the server: {unusable.reason}")
    try:
        return _planned(await client.mask(name))
    except CraneError as error:
        if error.status != 404:
            raise
        hint = "" if listing.default_method else "; bare language names need a server with a default method"
        raise EvaluationError(f"the server has no mask {name!r}; it has {_known(listing)}{hint}") from error


def _planned(summary: MaskSummary) -> PlannedMask:
    details = summary.model_extra or {}
    seed = (details.get("parameters") or {}).get("seed")
    return PlannedMask(
        **{field: getattr(summary, field) for field in ("name", "digest", "neurons", "language", "method", "budget")},
        seed=seed if summary.method == RANDOM and isinstance(seed, int) else None,
        neurons_per_layer=tuple(details.get("neurons_per_layer") or ()),
    )


async def _composed(client: AsyncCraneClient, expression: str, listing: MaskListing) -> PlannedMask:
    """A union or a scaled mask. Its digest and its number of neurons come from an answer of the server under it."""
    try:
        used = (await client.score_text(_PROBE, mask=expression)).mask
    except CraneError as error:
        if error.status not in (400, 404, 409):
            raise
        raise EvaluationError(
            f"the server has no mask {expression!r} ({error.message}); it has {_known(listing)}"
        ) from error
    if used is None:
        raise EvaluationError(f"the server answers without a mask where {expression!r} was asked for")
    return PlannedMask(name=expression, digest=used.digest, neurons=used.neurons)


def _known(listing: MaskListing) -> str:
    return ", ".join([UNMASKED, *(summary.name for summary in listing.masks)])
