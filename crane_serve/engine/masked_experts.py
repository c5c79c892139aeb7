"""Masks inside the experts of a mixture: the scale of (token's mask, expert, neuron) between their two products.

vLLM computes all experts of a layer at once. Its Triton experts leave the neurons between two kernels, where they can
be scaled. Its CPU experts are one kernel, so tokens with a mask are computed again here, in plain torch, from weights
that are kept beside the kernel's own; tokens without a mask have what the kernel made of them, to the bit.

Experts that a mask keeps from being chosen have their logit set to minus infinity before the router sees it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.experts import Experts
from crane_serve.common.models.mlps import layer_of
from crane_serve.engine.table import NO_OFFSET, Part, new_table

_KEPT = "_crane_weights"  # of experts on a CPU, before their kernel packs them
_AGREEMENT = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # relative, kernel against plain torch


def keep_weights(original: Callable[..., Any], self: Any, layer: Any) -> Any:
    """Wraps `process_weights_after_loading` of vLLM's CPU experts, which packs their weights."""
    names = ("w13_weight", "w2_weight", "w13_bias", "w2_bias")
    # Copies: vLLM 0.33 writes what it packs into the same memory.
    copies = [None if (held := getattr(layer, name, None)) is None else held.data.clone() for name in names]
    setattr(self, _KEPT, copies)
    return original(self, layer)


def mask_experts(
    decoder: nn.Module,
    experts: Experts,
    sizes: Sequence[int],
    rows: int,
    slots: Tensor,
    elsewhere: Sequence[int],
    offsets: bool = False,
) -> tuple[dict[int, Part], dict[int, Tensor]]:
    """Patch every layer's experts and router; return what they read of a mask, by layer: parts, and of routers tables
    [rows, experts].

    sizes: the number of neurons of each layer, those of its experts included; slots: [maximum tokens], the table row of
    each token; elsewhere: layers of other ranks; offsets: whether masks may add to neurons. Raises
    UnsupportedModelError for experts that cannot be masked, and unless each layer that should have some has and obeys
    its mask.
    """
    runners = _runners(decoder)
    owned = sorted(set(experts.layers) - set(elsewhere))
    if sorted(runners) != owned:
        raise UnsupportedModelError(f"found experts in layers {sorted(runners)}, expected them in {owned}")
    parts, routers = {}, {}
    for layer, (path, runner) in runners.items():
        routed = runner.routed_experts
        _require_simple(path, routed, experts)
        kernel = routed.quant_method.moe_kernel.fused_experts
        of = _own_neurons(routed, experts)  # [experts, neurons], of this rank
        like = torch.empty(0, dtype=routed.moe_config.in_dtype, device=slots.device)
        table = new_table(rows, *of.shape, like=like)
        added = new_table(rows, *of.shape, like=like, value=NO_OFFSET) if offsets else None
        if hasattr(kernel, _KEPT):
            _mask_on_cpu(kernel, table, added, slots)
        else:
            _mask_between_kernels(kernel, table, added, slots)
        columns = experts.columns(layer, sizes)
        parts[layer] = Part(table, columns.start, columns.stop, of, added)
        _prove(path, routed, table, slots)
        if added is not None:
            _prove_offsets(path, routed, table, added, slots)
        routers[layer] = new_table(rows, experts.count, like=like)
        _mask_router(path, runner, routers[layer], slots)
    return parts, routers


def _runners(decoder: nn.Module) -> dict[int, tuple[str, Any]]:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface

    found: dict[int, tuple[str, Any]] = {}
    for path, module in decoder.named_modules():
        layer = layer_of(path)
        if isinstance(module, MoERunnerInterface) and layer is not None:
            if layer in found:
                raise UnsupportedModelError(f"layer {layer} has experts in {found[layer][0]} and {path}; expected one")
            found[layer] = (path, module)
    return found


def _require_simple(path: str, routed: Any, experts: Experts) -> None:
    """Raise UnsupportedModelError, unless the experts' neurons can be scaled, and token i of a batch is in row i."""
    config = routed.moe_config
    parallel = config.moe_parallel_config
    kernel = getattr(getattr(routed.quant_method, "moe_kernel", None), "fused_experts", None)
    problems = {
        "are quantised; expected plain weights": not _is_plain(routed.quant_method),
        f"are computed by {type(kernel or routed.quant_method).__name__}; expected vLLM's Triton experts "
        "(--moe-backend triton) or, on a CPU, its own": not (hasattr(kernel, _KEPT) or _is_triton(kernel)),
        "are balanced at run time (--enable-eplb)": parallel.enable_eplb or config.num_experts != experts.count,
        "are shared by data-parallel ranks or sequence-parallel ones; start without data parallelism": parallel.dp_size
        > 1
        or parallel.is_sequence_parallel,
        f"have {config.intermediate_size} neurons each; expected {experts.size}": config.intermediate_size
        != experts.size,
        "are padded": config.intermediate_size_per_partition != experts.size // parallel.tp_size,
    }
    for problem, given in problems.items():
        if given:
            raise UnsupportedModelError(f"{path}: its experts {problem}")


def _is_plain(method: Any) -> bool:
    """Whether the experts of a layer have plain weights."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    return isinstance(method, UnquantizedFusedMoEMethod)


def _is_triton(kernel: Any) -> bool:
    """Whether experts are computed by Triton's kernels for plain weights; derived classes do other things."""
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    return type(kernel) is TritonExperts


def _own_neurons(routed: Any, experts: Experts) -> Tensor:
    """[experts, neurons] of this rank: their indices among the neurons of all experts of the layer."""
    config = routed.moe_config
    width, rank = config.intermediate_size_per_partition, config.moe_parallel_config.tp_rank
    own: Tensor = torch.arange(experts.count)
    if routed.expert_map is not None:
        places = routed.expert_map.to("cpu")  # [experts], the place of each on this rank, -1 for none
        own = (places >= 0).nonzero().flatten()
        own = own[places[own].argsort()]
    neurons: Tensor = own.unsqueeze(1) * experts.size + torch.arange(width) + rank * width
    return neurons


def _mask_router(path: str, runner: Any, table: Tensor, slots: Tensor) -> None:
    """Set the logits of experts that may not be chosen to minus infinity. table: [rows, experts].

    Raises UnsupportedModelError unless the router obeys: it gives no weight to them, and all of it to the others.
    """
    router, routed = runner.router, runner.routed_experts
    if "select_experts" in vars(router) or routed.quant_method.is_monolithic:
        raise UnsupportedModelError(f"{path}: its router is shared or inside of a kernel; it cannot be masked")
    select = router.select_experts

    def masked_select(*args: Any, router_logits: Tensor, **kwargs: Any) -> Any:
        off = table[slots[: len(router_logits)]] == 0  # [tokens, experts]
        return select(*args, router_logits=router_logits.masked_fill(off, -torch.inf), **kwargs)

    router.select_experts = masked_select
    _prove_router(path, runner, table, slots)


@torch.inference_mode()
def _prove_router(path: str, runner: Any, table: Tensor, slots: Tensor) -> None:
    """Route tokens with every expert off but those whose numbers have a bit set, or not set."""
    config, spare = runner.routed_experts.moe_config, table.shape[0] - 1
    count, tokens = config.num_experts, min(16, len(slots))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, runner.routed_experts.hidden_size, generator=generator).to(table.device, table.dtype)
    logits = torch.randn(tokens, count, generator=generator).to(table.device, config.router_logits_dtype)
    numbers = torch.arange(count, device=table.device)
    slots[:tokens] = spare
    try:
        for bit in range((count - 1).bit_length()):
            for value in (0, 1):
                table[spare] = ((numbers >> bit) % 2 == value).to(table.dtype)
                weights, ids = runner.router.select_experts(hidden_states=hidden, router_logits=logits)
                is_off = table[spare][ids.long()] == 0  # [tokens, top k]
                if bool(weights[is_off].any()) or not bool(torch.isfinite(weights).all() & weights.any(dim=1).all()):
                    raise UnsupportedModelError(
                        f"{path}: its router ({type(runner.router).__name__}) chooses experts whose logit is minus "
                        "infinity; it cannot be masked"
                    )
    finally:
        table[spare].fill_(1.0)
        slots.fill_(0)


def _mask_between_kernels(kernel: Any, table: Tensor, offsets: Tensor | None, slots: Tensor) -> None:
    """Scale what the activation function of Triton's experts returns, and add to it. table, offsets: [rows, experts,
    neurons]."""
    apply, activation = kernel.apply, kernel.activation
    places: list[Tensor] = []

    def masked_apply(*args: Any, **kwargs: Any) -> Any:
        ids, expert_map = kwargs["topk_ids"], kwargs["expert_map"]  # [tokens, top k]; [experts]
        # What is routed to another rank is not computed on this one; its place does not matter.
        places[:] = [(ids if expert_map is None else expert_map[ids].clamp(min=0)).long()]
        try:
            return apply(*args, **kwargs)
        finally:
            places.clear()

    def masked_activation(kind: Any, output: Tensor, inputs: Tensor, *args: Any, **kwargs: Any) -> None:
        activation(kind, output, inputs, *args, **kwargs)
        (chosen,) = places
        rows = slots[: len(chosen)].unsqueeze(1)
        scales = table[rows, chosen]  # [tokens, top k, neurons]
        neurons = output.view(scales.shape).mul_(scales)
        if offsets is not None:
            neurons.add_(offsets[rows, chosen])

    kernel.apply, kernel.activation = masked_apply, masked_activation


def _mask_on_cpu(kernel: Any, table: Tensor, offsets: Tensor | None, slots: Tensor) -> None:
    """Compute the experts of masked tokens again. table, offsets: [rows, experts, neurons]."""
    apply = kernel.apply
    weights = getattr(kernel, _KEPT)

    def masked_apply(*args: Any, **kwargs: Any) -> Any:
        named = ("output", "hidden_states", "topk_weights", "topk_ids", "expert_map")
        output, hidden, routing, ids, expert_map = (kwargs[name] for name in named)
        # What the kernel makes of masked tokens is not read: one expert computes them, so that it is soon done.
        kwargs["topk_ids"] = ids.masked_fill(slots[: len(ids), None] != 0, 0)
        answer = apply(*args, **kwargs)
        weighted = kwargs["apply_router_weight_on_input"]
        torch.ops.crane.masked_experts(
            output,
            hidden,
            routing,
            ids,
            expert_map,
            *weights,
            table,
            offsets,
            slots,
            kwargs["activation"].value,
            weighted,
        )
        return answer

    kernel.apply = masked_apply


@torch.library.custom_op("crane::masked_experts", mutates_args=("output",))
def masked_experts(
    output: Tensor,
    hidden: Tensor,
    routing: Tensor,
    ids: Tensor,
    expert_map: Tensor | None,
    w13: Tensor,
    w2: Tensor,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    table: Tensor,
    offsets: Tensor | None,
    slots: Tensor,
    activation: str,
    weighted: bool,
) -> None:
    """Replace the output of tokens with a mask by that of their experts, neurons scaled and offsets added.

    output, hidden: [tokens, hidden]; routing, ids: [tokens, top k], weights and experts; expert_map: [experts], their
    places on this rank; w13: [experts, gate and up, hidden]; w2: [experts, hidden, neurons]; table, offsets: [rows,
    experts, neurons]; slots: the row of each token; weighted: whether `hidden` has been multiplied by the weights.
    """
    rows = slots[: len(ids)]
    tokens = rows.nonzero().flatten()
    if not len(tokens):
        return
    places = (ids if expert_map is None else expert_map[ids])[tokens].long()  # [masked, top k]
    total = torch.zeros(len(tokens), output.shape[1], dtype=torch.float32)
    for place in sorted(set(places.flatten().tolist())):
        if place < 0:
            continue
        index, choice = (places == place).nonzero(as_tuple=True)
        bias, second = (None if of is None else of[place] for of in (w13_bias, w2_bias))
        gate_up = functional.linear(hidden[tokens[index]], w13[place], bias)
        neurons = _ACTIVATIONS[activation](gate_up) * table[rows[tokens[index]], place]
        if offsets is not None:
            neurons = neurons + offsets[rows[tokens[index]], place]
        answer = functional.linear(neurons, w2[place], second).float()
        if not weighted:
            answer = answer * routing[tokens[index], choice].unsqueeze(1)
        total.index_add_(0, index, answer)
    output[tokens] = total.to(output.dtype)


@masked_experts.register_fake
def _(*_: Any) -> None:
    return


def _gated(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def neurons(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return function(gate) * up

    return neurons


def _swiglu_of_gpt_oss(gate_up: Tensor) -> Tensor:
    """Gate and up stand in turns; both are clipped."""
    gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": _gated(functional.silu),
    "gelu": _gated(functional.gelu),
    "gelu_tanh": _gated(lambda gate: functional.gelu(gate, approximate="tanh")),
    "swigluoai": _swiglu_of_gpt_oss,
}


@torch.inference_mode()
def _prove_offsets(path: str, routed: Any, table: Tensor, offsets: Tensor, slots: Tensor) -> None:
    """Switch off all experts but for what is added to the neurons of one: tokens of others must not notice."""
    config, spare = routed.moe_config, table.shape[0] - 1
    own = range(config.num_experts) if routed.expert_map is None else (routed.expert_map >= 0).nonzero().flatten()
    numbers = torch.as_tensor(list(own), device=table.device)[: len(slots)]
    hidden = torch.randn(len(numbers), routed.hidden_size, generator=torch.Generator().manual_seed(1))
    ids = numbers.unsqueeze(1).expand(-1, config.experts_per_token).to(torch.int32).contiguous()
    shares = torch.full(ids.shape, 1 / config.experts_per_token, device=table.device)
    inputs = hidden.to(table.device, table.dtype)
    slots[: len(ids)] = spare
    table[spare].fill_(0.0)

    def answers() -> Tensor:
        output: Tensor = routed.quant_method.forward_native(routed, inputs, shares, ids, None, None)
        return output.clone()  # [tokens, hidden]

    try:
        dead = answers()
        place = numbers[-1] if routed.expert_map is None else routed.expert_map[numbers[-1]].long()
        offsets[spare, place].fill_(1.0)
        changed = (answers() != dead).any(dim=1)  # [tokens]
        if changed.tolist() != [False] * (len(numbers) - 1) + [True]:
            raise UnsupportedModelError(f"{path}: what a mask adds to an expert's neurons does not reach it alone")
    finally:
        table[spare].fill_(1.0)
        offsets[spare].fill_(NO_OFFSET)
        slots.fill_(0)


@torch.inference_mode()
def _prove(path: str, routed: Any, table: Tensor, slots: Tensor) -> None:
    """Run each expert on two tokens: unmasked, under a mask of ones, switched off, and while some others are.

    Switched off, its output must not depend on the input; a mask of ones must change nothing that matters; and whether
    it is off must depend on its own row of the mask alone: experts are told apart by the bits of their numbers.
    """
    config = routed.moe_config
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, routed.hidden_size, generator=generator).to(table.device, table.dtype)
    own = range(config.num_experts) if routed.expert_map is None else (routed.expert_map >= 0).nonzero().flatten()
    numbers = torch.as_tensor(list(own), device=table.device)  # [experts], in the order of the model
    places = numbers if routed.expert_map is None else routed.expert_map[numbers].long()
    spare = table.shape[0] - 1

    def answers(group: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """[experts, hidden] of either token."""
        ids = group.repeat(2).unsqueeze(1).expand(-1, config.experts_per_token).to(torch.int32)  # [2 experts, top k]
        slots[: len(ids)] = row
        outputs: Tensor = routed.quant_method.forward_native(
            routed,
            both.repeat_interleave(len(group), dim=0),
            torch.full(ids.shape, 1 / config.experts_per_token, device=table.device),
            ids.contiguous(),
            None,
            None,
        )
        one, other = outputs.clone().chunk(2)
        return one, other

    try:
        for group in torch.split(numbers, max(1, len(slots) // 2)):
            live, _ = answers(group, 0)
            same, _ = answers(group, spare)
            table[spare].fill_(0.0)
            dead, dead_too = answers(group, spare)
            obeys = torch.equal(dead, dead_too) and bool((live != dead).any(dim=1).all())
            for bit in range(config.num_experts.bit_length()):
                on = (numbers >> bit) % 2
                table[spare, places] = on.to(table.dtype)[:, None].expand(-1, table.shape[2])
                expected = torch.where(((group >> bit) % 2).bool()[:, None], same, dead)
                obeys = obeys and torch.equal(answers(group, spare)[0], expected)
            table[spare].fill_(1.0)
            if not obeys:
                raise UnsupportedModelError(
                    f"{path}: switching off all neurons of an expert does not switch off this one; it cannot be masked"
                )
            apart = float((live - same).abs().max() / live.abs().max())
            if apart > _AGREEMENT.get(table.dtype, 1e-2):
                raise UnsupportedModelError(
                    f"{path}: its experts ({config.activation.value}) give something else under a mask of ones "
                    f"(relative {apart:.2g}); it cannot be masked"
                )
    finally:
        table[spare].fill_(1.0)
        slots.fill_(0)
