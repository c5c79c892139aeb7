"""EngineService over two ranks of each kind, while masks come and go."""

import json

import pytest
import torch

from crane_serve.common.masks import Positions
from tests.conftest import RANKS, Engines, Tiny
from tests.engines import Oracle, masked_tokens, same_shares

pytestmark = pytest.mark.engine

NATS_PER_TOKEN = 1e-4


@pytest.fixture(scope="module", params=RANKS)
def over_ranks(request: pytest.FixtureRequest, engines: Engines) -> dict:
    """What requests were promised and got, over two ranks."""
    engines.jobs.wait(request.param)
    return {"name": request.param, **json.loads((engines.directory / f"{request.param}.json").read_text())}


def test_every_request_ran_with_the_mask_it_was_promised(over_ranks, tiny: Tiny, tiny_oracle: Oracle) -> None:
    assert over_ranks["ranks"] == (2 if over_ranks["name"] == "data parallel" else 1)
    promised = {answer["promised"] for answer in over_ranks["answers"]}
    assert len(promised) > 130  # of contents: those served, those a name went through, and the scaled ones, twice
    for answer in over_ranks["answers"]:
        resolved = tiny.library.resolve(answer["promised"])
        prompt, tokens = answer["prompt"], answer["tokens"]
        masked = masked_tokens(Positions.parse(answer["positions"]), prompt + tokens, len(prompt))
        expected = tiny_oracle.logprobs(prompt + tokens, None if resolved is None else resolved.mask, masked)
        expected = expected[-len(tokens) :]
        assert abs(sum(answer["logprobs"]) - sum(expected)) / len(expected) < NATS_PER_TOKEN, answer
        assert answer["logprobs"] == pytest.approx(expected, abs=1e-3), answer


def test_neurons_of_all_ranks_have_the_values_that_transformers_computes(
    over_ranks, tiny: Tiny, tiny_oracle: Oracle
) -> None:
    assert len(over_ranks["shown"]) == 12
    for shown in over_ranks["shown"]:
        resolved = tiny.library.resolve(shown["mask"])
        mask = None if resolved is None else resolved.mask
        whole = (tiny_oracle.neurons(shown["tokens"], mask), *tiny_oracle.gates(shown["tokens"], mask))
        for layer, values in shown["values"].items():
            columns: slice | list[int] = slice(None)
            if int(layer) == 1:
                columns = [159, 3, 80, 79]
            elif "values" in values and int(layer) == 2:
                columns = [1, 158]
            elif "mean" in values and int(layer) == 0:
                columns = [100, 5]
            rows, act, up = (each[int(layer), :-1][:, columns] for each in whole)
            wanted = {"values": rows, "mean": rows.mean(0), "mean_abs": rows.abs().mean(0)}
            wanted |= {"max": rows.amax(0), "positive": (rows > 0).float().mean(0)}
            wanted |= {"act_positive": (act > 0).float().mean(0), "up_mean_abs": up.abs().mean(0)}
            for name, found in values.items():
                if "positive" in name:
                    assert same_shares(found, wanted[name], len(rows)), name
                else:
                    torch.testing.assert_close(torch.tensor(found), wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("what", "outcome"),
    [
        ("removed name", "UnknownMask: unknown mask 'changing'"),
        ("removed digest", "UnknownMask: unknown mask"),
        ("in use", "kept"),
        ("after use", "forgotten"),
        ("full", "nobody"),
        ("foreign", "FingerprintError: mask 'attnlrp-zh'"),
        ("outputs", "MaskFileError: mask 'outputs' scales MLP output dimensions"),
        ("unknown", "UnknownMask: unknown mask 'nobody'"),
    ],
)
def test_what_cannot_be_is_refused_and_the_next_request_runs(over_ranks, what: str, outcome: str) -> None:
    assert over_ranks["refused"][what].startswith(outcome)
