"""The V1 seam with a runner made by hand: what of vLLM's state decides the rows of a step."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from crane_serve.common.masks import Composition, Member, NeuronMask
from crane_serve.engine.batch_masks import BatchMasks
from crane_serve.engine.runner_v1 import MaskedRunner
from crane_serve.engine.table import MaskTable, Part

PROMPT, UNKNOWN = 4, -1  # tokens; how vLLM keeps on the host what was sampled and has not arrived there


class Bench:
    """One request with a prompt of four tokens, 0 to 3, in a runner that schedules asynchronously."""

    def __init__(self, positions: str) -> None:
        mask = Composition([Member(NeuronMask.switching_off([[1]], [8]))])
        library: Any = SimpleNamespace(mask_of=lambda expression: mask)
        parameters = SimpleNamespace(extra_args={"crane_mask": "zh", "crane_positions": positions})
        self.known = np.full((1, 16), UNKNOWN, dtype=np.int32)
        self.known[0, :PROMPT] = range(PROMPT)
        self.runner = SimpleNamespace(
            load_model=None,
            _prepare_inputs=lambda *_: "prepared",
            _dummy_run=None,
            _get_prompt_logprobs_dict=None,
            device=torch.device("cpu"),
            requests={"a": SimpleNamespace(sampling_params=parameters, generator=None)},
            input_batch=SimpleNamespace(
                req_ids=["a"],
                num_prompt_tokens=np.array([PROMPT]),
                num_computed_tokens_cpu=np.array([0]),
                token_ids_cpu=self.known,
                generators={},
            ),
            discard_request_mask=SimpleNamespace(np=np.array([False])),
        )
        MaskedRunner(self.runner)._masks = self.masks = BatchMasks(
            library, MaskTable({0: [Part(torch.ones(2, 8), 0, 8)]}), torch.zeros(16, dtype=torch.int64)
        )

    def step(self, computed: int, ids: list[int]) -> list[int]:
        """The rows of a step, behind so many tokens, with these ids on the device."""
        self.runner.input_batch.num_computed_tokens_cpu[0] = computed
        self.runner.input_ids = SimpleNamespace(gpu=torch.tensor([*ids, 99, 99], dtype=torch.int32))
        assert self.runner._prepare_inputs(None, np.array([len(ids)])) == "prepared"
        return self.masks.slots[: len(ids)].tolist()


def test_the_model_itself_is_patched_where_graphs_wrap_it(monkeypatch: pytest.MonkeyPatch) -> None:
    patched: list[object] = []
    monkeypatch.setattr(BatchMasks, "install", lambda model, config: patched.append(model))
    bench = Bench("all")
    bench.runner.model, bench.runner.vllm_config = "wrapper", None
    bench.runner.get_model = lambda: "model"
    MaskedRunner(bench.runner)
    bench.runner.load_model = lambda: None
    loading = MaskedRunner(bench.runner)
    loading.load_model()
    assert patched == ["model"]


def test_an_end_is_found_where_the_host_does_not_know_it_yet() -> None:
    bench = Bench("all+until=50")
    assert bench.step(0, [0, 1, 2, 3]) == [1, 1, 1, 1]
    assert [bench.step(4 + index, [token])[0] for index, token in enumerate([7, 50, 50, 7])] == [1, 1, 0, 0]


def test_an_end_is_found_among_tokens_from_the_prefix_cache() -> None:
    assert Bench("all+until=2").step(3, [3]) == [0]
    assert Bench("all+until=3").step(3, [3]) == [1]
    assert Bench("prompt[3:]+generated+until=2").step(3, [3]) == [1]


def test_a_preempted_request_finds_its_end_again() -> None:
    bench = Bench("generated+until=8")
    bench.step(0, [0, 1, 2, 3])
    assert [bench.step(4 + index, [token])[0] for index, token in enumerate([7, 8, 9])] == [1, 1, 0]
    bench.known[0, PROMPT : PROMPT + 4] = [7, 9, 8, 9]  # what was sampled last was dropped, and sampled again
    assert bench.step(2, [2, 3, 7]) == [0, 0, 1]
    assert [bench.step(5 + index, [token])[0] for index, token in enumerate([9, 8, 9])] == [1, 1, 0]
    assert bench.step(7, [9]) == [0]
    bench.known[0, 5] = UNKNOWN
    with pytest.raises(RuntimeError, match="not known yet"):
        bench.step(6, [8])
