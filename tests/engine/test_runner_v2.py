"""The V2 seam against vLLM's own classes, with batches made by hand; tests.runners runs engines."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from crane_serve.common.masks import MaskError, MaskLibrary
from crane_serve.engine.config import MaskConfig
from crane_serve.engine.runner_v2 import add_scored, compute_prompt_logprobs, masked
from crane_serve.engine.scoring import ScoreRequest
from tests.engine.stand_in import Model
from tests.engines import random_masks
from tests.tiny import LAYERS, NEURONS, tiny_model

MAX_TOKENS, PROMPT = 16, 4


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[MaskLibrary, MaskConfig]:
    directory = tmp_path_factory.mktemp("v2")
    checkpoint = tiny_model("llama", directory / "model")
    library = random_masks(checkpoint, directory / "masks", share=0.3)
    return library, MaskConfig(5, False, False, str(checkpoint), directory / "masks", "attnlrp", library.manifest)


class Bench:
    """vLLM's DefaultModelState with masks, past its own construction, which wants a whole engine."""

    def __init__(self, library: MaskLibrary, config: MaskConfig) -> None:
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        class Bare(DefaultModelState):
            def __init__(self, vllm_config: object, model: nn.Module, *args: object) -> None:
                self.rope_state = self.prompt_embeds_state = None
                self.supports_mm_inputs = False

        vllm_config = SimpleNamespace(
            additional_config={"crane": config},
            compilation_config=SimpleNamespace(cudagraph_capture_sizes=None),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=MAX_TOKENS, max_num_seqs=4),
        )
        self.library = library
        self.model = Model()
        self.state = masked(Bare)(vllm_config, self.model, None, torch.device("cpu"))

    def add(self, **masks: str | None) -> None:
        """Add requests with a prompt of four tokens; "zh/prompt" asks for zh at the positions of the prompt."""
        for request_id, mask in masks.items():
            name, _, positions = (mask or "").partition("/")
            asked = {"crane_mask": name, "crane_positions": positions or "all"}
            parameters = SimpleNamespace(extra_args=None if mask is None else asked)
            request = SimpleNamespace(
                req_id=request_id,
                sampling_params=parameters,
                prompt_token_ids=list(range(PROMPT)),
                prefill_token_ids=list(range(PROMPT + 2)),  # of which two were generated before a preemption
            )
            self.state.add_request(0, request)

    def run(self, computed: int = 0, ids: Sequence[int] = (), **tokens: int) -> list[str]:
        """Prepare a batch of requests, each with its scheduled tokens; per slot, the mask whose scales it reads.

        ids: of the batch, on the device.
        """
        starts = np.cumsum([0, *tokens.values()], dtype=np.int32)
        return self.prepare(
            req_ids=list(tokens),
            query_start_loc_np=np.concatenate([starts, np.full(3, starts[-1])]),  # padded requests have no tokens
            num_computed_tokens_np=np.full(len(tokens), computed, dtype=np.int32),
            input_ids=torch.tensor([*ids, *[-1] * (MAX_TOKENS - len(ids))], dtype=torch.int32),
        )

    def prepare(self, **fields: object) -> list[str]:
        """Prepare vLLM's own dummy batch with other `fields`."""
        from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

        buffers = InputBuffers(max_num_reqs=8, max_num_tokens=MAX_TOKENS, device=torch.device("cpu"))
        batch = replace(InputBatch.make_dummy(2, MAX_TOKENS, buffers), **fields)
        assert self.state.prepare_inputs(batch, None) == {}
        return self.read()

    def read(self) -> list[str]:
        by_layer = [self._read_layer(layer) for layer in range(LAYERS)]
        assert all(names == by_layer[0] for names in by_layer)
        return by_layer[0]

    def _read_layer(self, layer: int) -> list[str]:
        known = {"none": torch.ones(NEURONS)}
        known |= {name: stored.mask.intermediate[layer] for name, stored in self.library.masks.items()}
        table = self.model.layers[layer].mlp.down_proj.table
        rows = table[self.state._crane_masks.slots]  # [maximum tokens, neurons]
        return [next(name for name, scale in known.items() if torch.equal(row, scale)) for row in rows]


@pytest.fixture
def bench(library: tuple[MaskLibrary, MaskConfig]) -> Bench:
    return Bench(*library)


def test_each_token_reads_the_mask_of_its_request_and_padding_none(bench: Bench) -> None:
    bench.add(a="zh", b=None, c="vi")
    slots = bench.run(a=3, b=2, c=1)
    assert slots == ["attnlrp-zh"] * 3 + ["none"] * 2 + ["attnlrp-vi"] + ["none"] * (MAX_TOKENS - 6)


def test_the_order_of_the_batch_decides_not_the_order_of_arrival(bench: Bench) -> None:
    bench.add(a="zh", b="vi")
    assert bench.run(b=1, a=2)[:3] == ["attnlrp-vi", "attnlrp-zh", "attnlrp-zh"]


def test_dummy_batches_are_unmasked(bench: Bench) -> None:
    bench.add(a="zh")
    bench.run(a=4)
    assert set(bench.prepare()) == {"none"}


def test_the_boundaries_of_the_batch_decide_not_the_tokens_scheduled_at_most(bench: Bench) -> None:
    """With adaptive verification vLLM schedules more tokens for a request than it runs."""
    bench.add(a="zh", b="vi")
    slots = bench.prepare(
        req_ids=["a", "b"],
        num_scheduled_tokens=np.array([4, 4], dtype=np.int32),
        query_start_loc_np=np.array([0, 2, 3], dtype=np.int32),
        num_computed_tokens_np=np.array([0, 0], dtype=np.int32),
    )
    assert slots == ["attnlrp-zh"] * 2 + ["attnlrp-vi"] + ["none"] * (MAX_TOKENS - 3)


def test_graph_capture_is_unmasked(bench: Bench) -> None:
    bench.add(a="zh")
    bench.run(a=4)
    bench.state.prepare_dummy_inputs(1, 4)
    assert set(bench.read()) == {"none"}


def test_a_preempted_request_comes_back_with_its_mask_and_an_id_with_its_new_one(bench: Bench) -> None:
    bench.add(a="zh")
    bench.run(a=2)
    bench.state.remove_request("a")
    bench.add(a="zh")
    assert bench.run(a=1)[0] == "attnlrp-zh"
    bench.state.remove_request("a")
    bench.add(a="vi")
    assert bench.run(a=1)[0] == "attnlrp-vi"


def test_a_mask_of_the_prompt_or_of_what_is_generated_ends_and_begins_there(bench: Bench) -> None:
    bench.add(a="zh/prompt", b="vi/generated")
    assert bench.run(computed=2, a=3, b=3)[:6] == ["attnlrp-zh", "attnlrp-zh", "none", "none", "none", "attnlrp-vi"]


def test_an_end_is_found_in_the_ids_of_the_device_and_before_the_first_step(bench: Bench) -> None:
    bench.add(a="zh/all+until=50", b="vi/generated[1:]+until=51")
    assert bench.run(computed=4, ids=[9, 9], a=1, b=1)[:2] == ["attnlrp-zh", "none"]
    assert bench.run(computed=5, ids=[50, 51], a=1, b=1)[:2] == ["attnlrp-zh", "attnlrp-vi"]
    assert bench.run(computed=6, ids=[9, 9], a=1, b=1)[:2] == ["none", "none"]
    bench.add(a="zh/all+until=5", b="vi/generated[1:]+until=5,6")  # begin again, behind ids 0 to 5
    assert bench.run(computed=6, ids=[9, 9], a=1, b=1)[:2] == ["none", "none"]
    bench.add(a="zh/all+until=5", b="vi/generated[1:]+until=4,6")
    assert bench.run(computed=3, ids=[3, 4, 5, 6] * 2, a=4, b=4)[:8] == [
        *["attnlrp-zh"] * 3,
        *["none"] * 3,
        *["attnlrp-vi"] * 2,
    ]


def test_a_prompt_of_embeddings_is_as_long_as_they_are(bench: Bench) -> None:
    parameters = SimpleNamespace(extra_args={"crane_mask": "zh", "crane_positions": "prompt[1:]"})
    request = SimpleNamespace(
        req_id="a", sampling_params=parameters, prompt_token_ids=None, prompt_embeds=torch.zeros(3, 8)
    )
    bench.state.add_request(0, request)
    assert bench.run(a=4)[:4] == ["none", "attnlrp-zh", "attnlrp-zh", "none"]


def test_the_batch_that_decodes_on_keeps_its_slots_and_a_change_of_order_changes_them(bench: Bench) -> None:
    bench.add(a="zh", b="vi", c=None)
    for _ in range(2):
        assert bench.run(computed=5, a=1, b=1, c=1)[:4] == ["attnlrp-zh", "attnlrp-vi", "none", "none"]
    assert bench.run(computed=5, c=1, b=1, a=1)[:4] == ["none", "attnlrp-vi", "attnlrp-zh", "none"]
    assert set(bench.run(computed=5, c=1)) == {"none"}
    assert bench.run(computed=6, c=1, b=1, a=1)[:4] == ["none", "attnlrp-vi", "attnlrp-zh", "none"]


def test_a_mask_that_admission_never_saw_stops_the_engine(bench: Bench) -> None:
    bench.add(a="fr")
    with pytest.raises(MaskError, match="unknown mask 'fr'"):
        bench.run(a=1)


def test_vllm_makes_masked_states_for_engines_with_masks_only(
    library: tuple[MaskLibrary, MaskConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.worker.gpu import model_states
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    from crane_serve.engine.plugin import _prepare_v2
    from crane_serve.engine.runner_v2 import MaskedModelState

    class State:
        pass

    monkeypatch.setattr(model_states, "resolve_model_state_cls", lambda vllm_config, model: State)
    for name in ("__init__", "add_request", "remove_request", "compute_prompt_logprobs"):
        monkeypatch.setattr(PromptLogprobsWorker, name, getattr(PromptLogprobsWorker, name))  # to be restored
    _prepare_v2()
    _prepare_v2()  # a second worker of the same process
    plain = model_states.resolve_model_state_cls(SimpleNamespace(additional_config={}), None)
    assert plain is State
    with_masks = model_states.resolve_model_state_cls(SimpleNamespace(additional_config={"crane": library[1]}), None)
    assert with_masks.__mro__[1:3] == (MaskedModelState, State)
    earlier = object.__new__(PromptLogprobsWorker)  # of an engine that was made before there were masks
    earlier.in_progress_prompt_logprobs, earlier.token_id_scores = {}, {}
    earlier.remove_request("a request of its own")


@pytest.mark.parametrize(("prefill", "is_scored"), [(PROMPT, True), (PROMPT + 2, False)])
def test_a_prompt_is_scored_unless_its_request_was_preempted_behind_it(prefill: int, is_scored: bool) -> None:
    worker = SimpleNamespace(uses_prompt_logprobs=np.array([True]))
    parameters = SimpleNamespace(extra_args=ScoreRequest(first=1, candidates=(5,)).argument)
    add_scored(lambda *_: None, worker, "a", 0, parameters)
    batch = SimpleNamespace(
        req_ids=["a"],
        query_start_loc_np=np.array([0, PROMPT]),
        num_computed_prefill_tokens_np=np.array([0]),
        num_scheduled_tokens=np.array([PROMPT]),
        idx_mapping_np=np.array([0]),
        prefill_len_np=np.array([prefill]),
    )
    answers = compute_prompt_logprobs(
        lambda *_: {},
        worker,
        lambda rows: torch.zeros(len(rows), 8),
        torch.zeros(PROMPT, 2),
        batch,
        torch.arange(PROMPT).unsqueeze(0),
        torch.zeros(1),
        np.array([PROMPT]),
    )
    assert list(answers) == ["a"] * is_scored
    for tensors in answers.values():
        assert tensors.logprob_token_ids.flatten().tolist() == [*range(1, PROMPT), 5]
