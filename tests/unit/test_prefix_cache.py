"""The prefix-cache salt: one per mask and client salt, and none for unmasked requests."""

from itertools import product

import pytest

from crane_serve.engine.prefix_cache import salted
from crane_serve.masks import MaskError

DIGESTS = ["a" * 64, "b" * 64]


@pytest.mark.parametrize("client_salt", [None, "tenant", ""])
def test_unmasked_requests_keep_their_salt(client_salt: str | None) -> None:
    assert salted(None, client_salt) == client_salt


def test_masks_and_clients_share_nothing() -> None:
    salts = [salted(digest, client) for digest, client in product([None, *DIGESTS], [None, "one", "two", *DIGESTS])]
    assert len(set(salts)) == len(salts)


def test_the_same_mask_and_client_share_a_salt() -> None:
    assert salted(DIGESTS[0], "one") == salted(DIGESTS[0], "one")


@pytest.mark.parametrize("digest", [None, DIGESTS[0]])
def test_a_client_cannot_ask_for_the_blocks_of_a_mask(digest: str | None) -> None:
    masked = salted(DIGESTS[1], None)
    assert masked is not None
    with pytest.raises(MaskError, match="cache_salt must not begin with 'crane-mask-'"):
        salted(digest, masked)
