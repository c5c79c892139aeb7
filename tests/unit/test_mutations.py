"""The mutations of `tests.mutations` fit the code: each finds what it breaks, once, and has tests."""

import pytest

from tests.mutations import MUTATIONS, ROOT, UNDER_V2, Mutation


@pytest.mark.parametrize("mutation", [*MUTATIONS, *UNDER_V2], ids=lambda mutation: mutation.promise)
def test_a_mutation_finds_what_it_breaks(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    for test in mutation.tests.split():
        path = ROOT / test.partition("::")[0]
        assert not path.suffix or path.exists(), test
