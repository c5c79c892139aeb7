"""The HTTP benchmark's own arithmetic: who is asked what, and what is made of the answers."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import http_service


def test_prompts_are_distinct_and_of_all_languages() -> None:
    texts = http_service.text_pieces(500)
    assert len(set(texts)) == len(texts) == 500
    assert all(60 < len(text) <= 120 for text in texts)
    assert sum(any("\u4e00" <= character <= "\u9fff" for character in text) for text in texts[:30]) == 10
    with pytest.raises(ValueError, match="the corpus has"):
        http_service.text_pieces(10**6)


def test_masks_rotate_and_move_on() -> None:
    texts = [f"t{index}" for index in range(6)]
    assert [mask for _, mask in http_service.mixed(texts, ["a", "b"], 0)] == [None, "a", "b"] * 2
    assert [mask for _, mask in http_service.mixed(texts, ["a", "b"], 1)] == ["a", "b", None] * 2
    groups = http_service.by_mask(http_service.mixed(texts, ["a", "b"], 0))
    assert groups == {None: ["t0", "t3"], "a": ["t1", "t4"], "b": ["t2", "t5"]}


def test_settings_become_flags() -> None:
    flags = http_service.as_flags({"max_model_len": 8, "enforce_eager": True, "enable_prefix_caching": False})
    assert flags == ["--max-model-len", "8", "--enforce-eager", "--no-enable-prefix-caching"]


def test_the_slope_leaves_the_first_quarter_out() -> None:
    samples = [(1000 * index, 10**9 + (5 * 10**6 if index < 2 else 0) + 3000 * index) for index in range(8)]
    assert http_service.slope(samples) == pytest.approx(3.0)
    assert http_service.slope(samples[:1]) == 0.0


def test_speed_is_per_token() -> None:
    measurements = [
        {"way": way, "repetition": repetition, "seconds": seconds, "tokens": tokens}
        for repetition in range(4)
        for way, seconds, tokens in [
            ("offline", 1.0, 100),
            ("requests", 2.0, 100),
            ("singles", 1.0, 80),
        ]
    ]
    found = http_service.summarise_throughput(measurements)
    assert {way: figures["speed"]["ratio"] for way, figures in found.items()} == pytest.approx(
        {"offline": 1.0, "requests": 0.5, "singles": 0.8}
    )
    assert found["singles"]["tokens_per_s"] == pytest.approx(80)
    assert "0.800" in http_service.throughput_table(found)


def test_a_tally_tells_failures_apart() -> None:
    tally = http_service.Tally()
    for seconds in (1.0, 2.0, 3.0):
        tally.add(200, {}, b'{"usage": {"completion_tokens": 5}}', seconds)
    tally.add(200, {}, b"{", 2.0)
    tally.add(429, {"Retry-After": "1"}, b"", 0.1)
    tally.add(429, {}, b"", 0.1)
    tally.add(500, {}, b"", 0.1)
    found = tally.report()
    assert found["statuses"] == {"200": 4, "429": 2, "500": 1}
    assert (found["broken"], found["without_retry_after"], found["tokens"]) == (1, 1, 15)
    assert found["seconds"]["p50"] == 2.0


def test_measurements_are_chosen() -> None:
    chosen = http_service.parse(["model", "masks", "latency", "--out", "x", "memory"])
    assert chosen.measurements == ["latency", "memory"]
    assert http_service.parse(["model", "masks", "--out", "x"]).measurements == list(http_service.MEASUREMENTS)
    with pytest.raises(SystemExit):
        http_service.parse(["model", "masks", "speed", "--out", "x"])
