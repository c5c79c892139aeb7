"""The benchmarks' own arithmetic: who is asked what, and what is made of the seconds."""

import argparse
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import loads
import summary
import throughput
import worker

PROMPTS = [[0, index] for index in range(32)]


def test_mixed_uses_every_mask_once_they_rotate():
    names = [name for turn in range(8) for name in loads.mixed(PROMPTS, 4, 256, turn)["passes"][0]["masks"]]
    assert sorted(names) == sorted(f"m{index}" for index in range(256))
    assert set(loads.mixed(PROMPTS, 4, 2, turn=3)["passes"][0]["masks"]) == {"m0", "m1"}
    assert set(loads.mixed(PROMPTS, 4, 0)["passes"][0]["masks"]) == {None}


def test_one_by_one_is_the_same_work():
    together = loads.mixed(PROMPTS, 4, 5, turn=1)["passes"][0]
    apart = loads.one_by_one(PROMPTS, 4, 5, turn=1)["passes"]
    assert len(apart) == 5
    pairs = [(prompt, one["mask"]) for one in apart for prompt in one["prompts"]]
    assert sorted(pairs) == sorted(zip(together["prompts"], together["masks"], strict=True))


def test_speed_ratio_is_baseline_over_own_time_and_pairs_repetitions():
    baseline = {(0, repetition): 2.0 + repetition for repetition in range(6)}
    twice = {key: seconds * 2 for key, seconds in baseline.items()}
    found = summary.speed_ratio(baseline, twice)
    assert found["ratio"] == 0.5
    assert found["interval"] == [0.5, 0.5]  # what slows both down cancels
    assert found["repetitions"] == 6

    few = summary.speed_ratio(baseline, {(0, 1): 3.0, (9, 9): 100.0})
    assert few["ratio"] == 1.0
    assert few["interval"] is None
    assert summary.speed_ratio({}, twice)["ratio"] is None


def test_arms_are_parsed_or_refused():
    arms = {arm.name: arm for arm in throughput.arms_of(throughput.DEFAULT_ARMS)}
    assert [arms[name].target for name in ("no-plugin", "idle", "masks-64", "masks-256", "eager-1")] == [
        None,
        0.99,
        0.97,
        0.95,
        None,
    ]
    for name in ("masks", "masks-0", "eager", "plugin"):
        with pytest.raises(argparse.ArgumentTypeError, match=name):
            throughput.Arm.parse(name)


class _Projection(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class _Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = _Projection(4, 12, bias=False), _Projection(6, 4, bias=False)

    def act_fn(self, x):
        return torch.relu(x[:, :6]) * x[:, 6:]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]


@torch.inference_mode()
def test_a_patched_mlp_lacks_its_neurons_until_it_is_put_back():
    torch.manual_seed(0)
    model, x = nn.Sequential(_Mlp(), _Mlp()), torch.randn(3, 4)
    before = model(x)
    assert worker.patch_mlps(model, [torch.tensor([0, 3]), torch.tensor([], dtype=torch.int64)]) == 2
    mlp = model[0]
    scale = torch.tensor([0.0, 1, 1, 0, 1, 1])
    expected = mlp.down_proj(mlp.act_fn(mlp.gate_up_proj(x)[0]) * scale)[0]
    assert torch.equal(mlp(x), expected)
    assert not torch.equal(model(x), before)
    worker.patch_mlps(model, None)
    assert torch.equal(model(x), before)
    with pytest.raises(RuntimeError, match="found 2 gated MLPs"):
        worker.patch_mlps(model, [torch.tensor([0])])
