"""Masks inside experts, without an engine: what is scaled, what is left alone, and what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.experts import Experts
from crane_serve.engine import masked_experts as engine
from crane_serve.engine.masked_experts import _ACTIVATIONS, keep_weights, mask_experts

TOKENS, HIDDEN, COUNT, SIZE, TOP_K, ROWS = 7, 16, 4, 6, 2, 3
EXPERTS = Experts(count=COUNT, size=SIZE, layers=(0, 1))
SILU = SimpleNamespace(value="silu")


def given(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ids = torch.stack([torch.randperm(COUNT, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    return {
        "hidden": random(TOKENS, HIDDEN),
        "routing": random(TOKENS, TOP_K).softmax(-1),
        "ids": ids.int(),
        "w13": random(COUNT, 2 * SIZE, HIDDEN),
        "w2": random(COUNT, HIDDEN, SIZE),
        "table": torch.cat([torch.ones(1, COUNT, SIZE), random(ROWS - 1, COUNT, SIZE)]),
        "slots": torch.tensor([0, 1, 2, 0, 2, 1, 0, 2, 2]),
    }


def by_token(case: dict[str, Any], biases: tuple[Tensor, Tensor] | None = None, weighted: bool = False) -> Tensor:
    """The same, one token and expert after the other."""
    output = torch.zeros(TOKENS, HIDDEN)
    for token in range(TOKENS):
        for expert, share in zip(case["ids"][token].tolist(), case["routing"][token], strict=True):
            gate_up = case["w13"][expert] @ case["hidden"][token] + (0 if biases is None else biases[0][expert])
            neurons = functional.silu(gate_up[:SIZE]) * gate_up[SIZE:]
            neurons = neurons * case["table"][case["slots"][token], expert]
            if case.get("offsets") is not None:
                neurons = neurons + case["offsets"][case["slots"][token], expert]
            answer = case["w2"][expert] @ neurons + (0 if biases is None else biases[1][expert])
            output[token] += answer if weighted else share * answer
    return output


@pytest.mark.parametrize("with_offsets", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_biases", [False, True])
def test_masked_tokens_are_computed_again_and_others_are_left(
    with_biases: bool, weighted: bool, with_offsets: bool
) -> None:
    case = given()
    offsets = torch.randn(ROWS, COUNT, SIZE) if with_offsets else None
    case["offsets"] = offsets
    biases = (torch.randn(COUNT, 2 * SIZE), torch.randn(COUNT, HIDDEN)) if with_biases else None
    output = torch.full((TOKENS, HIDDEN), 7.0)
    arguments = (case["hidden"], case["routing"], case["ids"], None, case["w13"], case["w2"], *(biases or (None, None)))
    torch.ops.crane.masked_experts(output, *arguments, case["table"], offsets, case["slots"], "silu", weighted)
    masked = case["slots"][:TOKENS] > 0
    assert bool((output[~masked] == 7).all())
    assert torch.allclose(output[masked], by_token(case, biases, weighted)[masked], atol=1e-5)


def test_experts_of_other_ranks_add_nothing() -> None:
    case = given()
    places = torch.tensor([-1, 1, -1, 0])  # this rank has the experts 3 and 1
    own = [3, 1]
    output = torch.zeros(TOKENS, HIDDEN)
    torch.ops.crane.masked_experts(
        output,
        case["hidden"],
        case["routing"],
        case["ids"],
        places,
        case["w13"][own],
        case["w2"][own],
        None,
        None,
        case["table"][:, own],
        None,
        case["slots"],
        "silu",
        False,
    )
    case["routing"] = torch.where(torch.isin(case["ids"], torch.tensor(own)), case["routing"], 0.0)
    masked = case["slots"][:TOKENS] > 0
    assert torch.allclose(output[masked], by_token(case)[masked], atol=1e-5)


def test_activation_functions() -> None:
    gate, up = torch.randn(2, 5, SIZE, dtype=torch.float64) * 5
    halves = torch.cat([gate, up], dim=1)
    assert torch.allclose(_ACTIVATIONS["gelu"](halves), functional.gelu(gate) * up, atol=1e-6)
    assert torch.allclose(_ACTIVATIONS["gelu_tanh"](halves), functional.gelu(gate, approximate="tanh") * up, atol=1e-6)
    in_turns = torch.stack([gate, up], dim=2).flatten(1)
    clipped = gate.clamp(max=7)
    expected = (up.clamp(-7, 7) + 1) * clipped * torch.sigmoid(1.702 * clipped)
    assert torch.allclose(_ACTIVATIONS["swigluoai"](in_turns), expected)


class Kernel:
    """Experts in two kernels with the activation function between them, as vLLM's Triton experts."""

    def activation(self, kind: Any, output: Tensor, inputs: Tensor) -> None:
        output.copy_(functional.silu(inputs[:, :SIZE]) * inputs[:, SIZE:])

    def apply(self, *, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, expert_map, **rest) -> None:
        places = topk_ids.long() if expert_map is None else expert_map[topk_ids.long()]
        here = places.clamp(min=0).flatten()
        inputs = (w1[here] @ hidden_states.repeat_interleave(TOP_K, 0).unsqueeze(2))[..., 0]  # [tokens * top k, 2 size]
        neurons = torch.empty(len(inputs), SIZE)
        self.activation(activation, neurons, inputs)
        answers = (w2[here] @ neurons.unsqueeze(2))[..., 0].view(*places.shape, HIDDEN)
        answers = answers * (places >= 0).unsqueeze(2)
        assert not rest["apply_router_weight_on_input"]
        output.copy_((answers * topk_weights[..., None]).sum(1))


class PackedKernel(Kernel):
    """Experts in one kernel, as on a CPU: nothing between the products can be reached."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.w13_weight, layer.w2_weight = nn.Parameter(layer.w13_weight.detach()), layer.w2_weight

    def apply(self, **given: Any) -> None:
        Kernel.apply(Kernel(), **given)


class Routed(nn.Module):
    """Of vLLM: the weights of a layer's experts on one rank."""

    def __init__(self, kernel: Any, case: dict[str, Tensor], own: list[int] | None = None, ranks: int = 1) -> None:
        super().__init__()
        width = SIZE // ranks
        parallel = SimpleNamespace(tp_size=ranks, tp_rank=0, dp_size=1, enable_eplb=False, is_sequence_parallel=False)
        self.moe_config = SimpleNamespace(
            num_experts=COUNT,
            experts_per_token=TOP_K,
            intermediate_size=SIZE,
            intermediate_size_per_partition=width,
            activation=SILU,
            in_dtype=torch.float32,
            router_logits_dtype=torch.float32,
            moe_parallel_config=parallel,
        )
        self.w13_weight, self.w2_weight = nn.Parameter(case["w13"]), nn.Parameter(case["w2"])
        self.hidden_size, self.expert_map = HIDDEN, None
        if own is not None:
            self.w13_weight, self.w2_weight = nn.Parameter(case["w13"][own]), nn.Parameter(case["w2"][own])
            self.expert_map = torch.full((COUNT,), -1)
            self.expert_map[own] = torch.arange(len(own))
        self.quant_method = SimpleNamespace(
            plain=True,
            is_monolithic=False,
            moe_kernel=SimpleNamespace(fused_experts=kernel),
            forward_native=self.forward_native,
        )

    def forward_native(self, _: Any, x: Tensor, weights: Tensor, ids: Tensor, *__: None) -> Tensor:
        output = torch.empty(len(x), HIDDEN)
        self.quant_method.moe_kernel.fused_experts.apply(
            output=output,
            hidden_states=x,
            w1=self.w13_weight,
            w2=self.w2_weight,
            topk_weights=weights,
            topk_ids=ids,
            activation=SILU,
            expert_map=self.expert_map,
            apply_router_weight_on_input=False,
        )
        return output


class Router:
    """Of vLLM: the choice among a layer's experts."""

    def select_experts(self, *, hidden_states: Tensor, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = router_logits.topk(TOP_K)
        return values.softmax(-1), ids.int()


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_is_triton", lambda kernel: type(kernel) is Kernel)
    monkeypatch.setattr(engine, "_is_plain", lambda method: method.plain)


def runners(monkeypatch: pytest.MonkeyPatch, *routed: Routed, router: Any = Router) -> nn.Module:
    found = {
        layer: (f"layers.{layer}.mlp.experts", SimpleNamespace(routed_experts=of, router=router()))
        for layer, of in enumerate(routed)
    }
    monkeypatch.setattr(engine, "_runners", lambda decoder: found)
    return nn.Module()


def packed(case: dict[str, Tensor], own: list[int] | None = None) -> Routed:
    kernel = PackedKernel()
    routed = Routed(kernel, case, own)
    keep_weights(PackedKernel.process_weights_after_loading, kernel, routed)
    return routed


def between_kernels(case: dict[str, Tensor], own: list[int] | None = None) -> Routed:
    return Routed(Kernel(), case, own)


def ran(routed: Routed, case: dict[str, Tensor]) -> Tensor:
    return routed.forward_native(routed, case["hidden"], case["routing"], case["ids"])


@torch.no_grad()
@pytest.mark.parametrize("make", [packed, between_kernels])
@pytest.mark.parametrize("own", [None, [3, 1]])
@pytest.mark.parametrize("offsets", [False, True])
def test_experts_are_masked_by_layer(
    monkeypatch: pytest.MonkeyPatch, make: Any, own: list[int] | None, offsets: bool
) -> None:
    cases = [given(1), given(2)]
    routed = [make(case, own) for case in cases]
    slots = torch.zeros(9, dtype=torch.int64)
    before = [ran(of, case) for of, case in zip(routed, cases, strict=True)]
    decoder = runners(monkeypatch, *routed)
    parts, _ = mask_experts(decoder, EXPERTS, (24, 29), ROWS, slots, elsewhere=[], offsets=offsets)
    assert [(part.start, part.stop) for part in parts.values()] == [(0, 24), (5, 29)]
    assert not slots.any(), "the proof leaves nothing behind"
    for (layer, part), of, case, plain in zip(parts.items(), routed, cases, before, strict=True):
        assert bool((part.table == 1).all())
        places = torch.arange(COUNT * SIZE).view(COUNT, SIZE)
        assert torch.equal(part.of, places if own is None else places[sorted(own, key=own.index)])
        part.table.copy_(case["table"].flatten(1)[:, part.of])
        assert (part.offsets is not None) == offsets
        if part.offsets is not None:
            assert not part.offsets.any(), "the proof leaves nothing behind"
            case["offsets"] = torch.randn(ROWS, COUNT, SIZE)
            case["offsets"][0] = -0.0
            part.offsets.copy_(case["offsets"].flatten(1)[:, part.of])
        slots.copy_(case["slots"])
        masked = slots[:TOKENS] > 0
        after = ran(of, case)
        assert torch.equal(after[~masked], plain[~masked]), f"layer {layer}"
        if own is not None:
            case["routing"] = torch.where(torch.isin(case["ids"], torch.tensor(own)), case["routing"], 0.0)
        assert torch.allclose(after[masked], by_token(case)[masked], atol=1e-5), f"layer {layer}"
        slots.zero_()


def test_a_shard_of_each_expert_reads_its_own_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    case = given()
    half = {**case, "w13": case["w13"][:, :SIZE].contiguous(), "w2": case["w2"][..., : SIZE // 2].contiguous()}
    routed = Routed(Kernel(), half, ranks=2)
    routed.moe_config.moe_parallel_config.tp_rank = 1
    neurons = engine._own_neurons(routed, EXPERTS)
    assert torch.equal(neurons, torch.arange(COUNT * SIZE).view(COUNT, SIZE)[:, SIZE // 2 :])


@pytest.mark.parametrize(
    ("problem", "change"),
    [
        (
            "computed by Other; expected vLLM's Triton experts",
            lambda of: setattr(of.quant_method.moe_kernel, "fused_experts", Other()),
        ),
        ("computed by SimpleNamespace", lambda of: setattr(of.quant_method, "moe_kernel", None)),
        ("are quantised; expected plain weights", lambda of: setattr(of.quant_method, "plain", False)),
        ("balanced at run time", lambda of: setattr(of.moe_config.moe_parallel_config, "enable_eplb", True)),
        ("shared by data-parallel ranks", lambda of: setattr(of.moe_config.moe_parallel_config, "dp_size", 2)),
        ("sequence-parallel", lambda of: setattr(of.moe_config.moe_parallel_config, "is_sequence_parallel", True)),
        ("have 7 neurons each; expected 6", lambda of: setattr(of.moe_config, "intermediate_size", 7)),
        ("are padded", lambda of: setattr(of.moe_config, "intermediate_size_per_partition", 32)),
    ],
)
def test_experts_that_cannot_be_masked_are_refused(monkeypatch: pytest.MonkeyPatch, problem: str, change: Any) -> None:
    routed = Routed(Kernel(), given())
    change(routed)
    slots = torch.zeros(9, dtype=torch.int64)
    experts = EXPERTS.model_copy(update={"layers": (0,)})
    with pytest.raises(UnsupportedModelError, match=problem):
        mask_experts(runners(monkeypatch, routed), experts, (24,), ROWS, slots, elsewhere=[])


class Other(Kernel):
    """Experts that nobody knows."""


def test_layers_without_the_experts_that_they_should_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = torch.zeros(9, dtype=torch.int64)
    decoder = runners(monkeypatch, Routed(Kernel(), given()))
    with pytest.raises(UnsupportedModelError, match=r"found experts in layers \[0\], expected them in \[0, 1\]"):
        mask_experts(decoder, EXPERTS, (24, 24), ROWS, slots, elsewhere=[])
    parts, routers = mask_experts(decoder, EXPERTS, (24, 24), ROWS, slots, elsewhere=[1])
    assert list(parts) == list(routers) == [0]


class Deaf(Kernel):
    """Its second kernel reads what was there before the activation function was called."""

    def apply(self, *, output, hidden_states, w2, topk_ids, **_) -> None:
        neurons = torch.empty(TOP_K * len(hidden_states), SIZE)
        self.activation(SILU, neurons, torch.zeros(len(neurons), 2 * SIZE))
        output.copy_(hidden_states)


def test_experts_that_do_not_obey_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_is_triton", lambda kernel: True)
    slots = torch.zeros(9, dtype=torch.int64)
    experts = EXPERTS.model_copy(update={"layers": (0,)})
    with pytest.raises(UnsupportedModelError, match="does not switch off this one"):
        mask_experts(runners(monkeypatch, Routed(Deaf(), given())), experts, (24,), ROWS, slots, elsewhere=[])


def test_an_activation_function_that_differs_from_the_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    routed = packed(given())
    monkeypatch.setattr(engine, "_ACTIVATIONS", {"silu": _ACTIVATIONS["gelu"]})
    slots = torch.zeros(9, dtype=torch.int64)
    experts = EXPERTS.model_copy(update={"layers": (0,)})
    with pytest.raises(UnsupportedModelError, match=r"\(silu\) give something else under a mask of ones"):
        mask_experts(runners(monkeypatch, routed), experts, (24,), ROWS, slots, elsewhere=[])


class Crossed(Routed):
    """It counts its experts in another order than it says."""

    def forward_native(self, _: Any, x: Tensor, weights: Tensor, ids: Tensor, *__: None) -> Tensor:
        said, self.expert_map = self.expert_map, torch.tensor([1, 0, 2, 3])
        try:
            return super().forward_native(_, x, weights, ids)
        finally:
            self.expert_map = said


def test_an_expert_that_reads_the_row_of_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = torch.zeros(9, dtype=torch.int64)
    experts = EXPERTS.model_copy(update={"layers": (0,)})
    with pytest.raises(UnsupportedModelError, match="does not switch off this one"):
        mask_experts(runners(monkeypatch, Crossed(Kernel(), given())), experts, (24,), ROWS, slots, elsewhere=[])


def test_what_an_activation_is_called_for_is_known_only_inside_of_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    routed = Routed(Kernel(), given())
    slots = torch.zeros(9, dtype=torch.int64)
    experts = EXPERTS.model_copy(update={"layers": (0,)})
    mask_experts(runners(monkeypatch, routed), experts, (24,), ROWS, slots, elsewhere=[])
    kernel = routed.quant_method.moe_kernel.fused_experts
    with pytest.raises(ValueError, match="not enough values to unpack"):
        kernel.activation(SILU, torch.zeros(4, SIZE), torch.zeros(4, 2 * SIZE))


def test_routers_leave_out_what_a_token_s_mask_says(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = torch.zeros(20, dtype=torch.int64)
    given_routers = [Router(), Router()]
    pending = iter(given_routers)
    decoder = runners(monkeypatch, Routed(Kernel(), given(1)), Routed(Kernel(), given(2)), router=lambda: next(pending))
    _, tables = mask_experts(decoder, EXPERTS, (24, 24), ROWS, slots, elsewhere=[])
    assert [table.shape for table in tables.values()] == [(ROWS, COUNT)] * 2
    assert all(bool((table == 1).all()) for table in tables.values())
    logits = torch.randn(TOKENS, COUNT, generator=torch.Generator().manual_seed(3))
    plain = Router().select_experts(hidden_states=logits, router_logits=logits)
    tables[1][1] = torch.tensor([1.0, 0.0, 1.0, 0.0])
    tables[1][2] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    slots[:TOKENS] = torch.tensor([0, 1, 2, 0, 2, 1, 0])
    for found, same in zip(
        given_routers[0].select_experts(hidden_states=logits, router_logits=logits), plain, strict=True
    ):
        assert torch.equal(found, same), "of another layer"
    weights, ids = given_routers[1].select_experts(hidden_states=logits, router_logits=logits)
    unmasked = slots[:TOKENS] == 0
    assert torch.equal(weights[unmasked], plain[0][unmasked])
    assert torch.equal(ids[unmasked], plain[1][unmasked])
    for token in (1, 5):
        assert set(ids[token].tolist()) == {0, 2}
        both = logits[token, ids[token].long()]
        assert torch.allclose(weights[token], both.softmax(-1))
    for token in (2, 4):
        assert dict(zip(ids[token].tolist(), weights[token].tolist(), strict=True))[2] == 1
        assert weights[token].sum() == 1


class Stubborn(Router):
    def select_experts(self, *, hidden_states: Tensor, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        return super().select_experts(hidden_states=hidden_states, router_logits=router_logits.clamp(min=-1))


def test_routers_that_do_not_obey_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = torch.zeros(20, dtype=torch.int64)
    one = Router()
    for router, problem in ((Stubborn, r"its router \(Stubborn\) chooses experts"), (lambda: one, "router is shared")):
        decoder = runners(monkeypatch, Routed(Kernel(), given(1)), Routed(Kernel(), given(2)), router=router)
        with pytest.raises(UnsupportedModelError, match=problem):
            mask_experts(decoder, EXPERTS, (24, 24), ROWS, slots, elsewhere=[])
        assert not slots.any()


class Leaking(Kernel):
    """It adds up what is in all rows of its neurons."""

    def apply(self, *, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, expert_map, **rest) -> None:
        inner = torch.empty_like(output)
        neurons = torch.empty(TOP_K * len(topk_ids), SIZE)
        self.activation(activation, neurons, torch.zeros(len(neurons), 2 * SIZE))
        inner.copy_(hidden_states)
        output.copy_(inner.where(neurons.view(len(topk_ids), -1).any(1, keepdim=True), 0) + neurons.sum())


def test_offsets_that_reach_other_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_is_triton", lambda kernel: True)
    monkeypatch.setattr(engine, "_prove", lambda *_: None)
    slots = torch.zeros(9, dtype=torch.int64)
    decoder = runners(monkeypatch, Routed(Leaking(), given()))
    experts = EXPERTS.model_copy(update={"layers": (0,)})
    with pytest.raises(UnsupportedModelError, match="what a mask adds to an expert's neurons does not reach it alone"):
        mask_experts(decoder, experts, (24,), ROWS, slots, elsewhere=[], offsets=True)


def test_weights_are_kept_also_where_they_are_packed_into_the_same_memory() -> None:
    """As vLLM 0.33 does."""
    weights = {"w13_weight": torch.ones(2, 8, 3), "w2_weight": torch.ones(2, 3, 4)}
    layer = SimpleNamespace(**{name: nn.Parameter(weight.clone()) for name, weight in weights.items()}, w13_bias=None)

    def pack(_: Any, layer: Any) -> None:
        layer.w13_weight.data.zero_()
        layer.w2_weight.data.zero_()

    kernel = SimpleNamespace()
    keep_weights(pack, kernel, layer)
    w13, w2, *biases = getattr(kernel, engine._KEPT)
    assert torch.equal(w13, weights["w13_weight"])
    assert torch.equal(w2, weights["w2_weight"])
    assert biases == [None, None]
