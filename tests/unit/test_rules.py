import math
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.families import take_apart
from relevance.rules import (
    ATTNLRP,
    CP_LRP,
    PLAIN,
    RELP,
    Rules,
    identity_rule,
    norm_rule,
    propagation,
    scaled_gradient,
    slope_at_zero,
    soft_cap,
)
from tests.decoders import MIXTURES, NAMES, exact, hidden_states, random_decoder
from tests.tiny import HIDDEN, NEURONS

RULES = [PLAIN, ATTNLRP, CP_LRP, RELP]
# Caps and windows that bend what short random documents compute.
FEATURES = {
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": 4},
    "gemma3": {"sliding_window": 4},
}


def decoder_of(family: str, attention: str | None = None) -> nn.Module:
    return random_decoder(family, attention=attention, **FEATURES.get(family, {}))


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def embeddings_of(documents: int, tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(documents, tokens, HIDDEN, generator=generator, dtype=dtype).requires_grad_()


def test_identity_rule_by_hand() -> None:
    z = double([2.0, -1.0, 0.0, 1e-9])
    result = identity_rule(z, functional.silu(z), slope=0.5)
    result.backward(torch.full_like(z, 3.0))
    assert torch.equal(result, functional.silu(z))
    # silu(z) / z is the logistic function, whose value at 0 is 1/2
    expected = [3 / (1 + math.exp(-2)), 3 / (1 + math.exp(1)), 1.5, 1.5]
    assert z.grad is not None
    assert z.grad.tolist() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_rule_is_finite_near_zero_and_hides_no_nan(dtype: torch.dtype) -> None:
    values = [0.0, -0.0, 1e-30, -1e-38, -100.0, math.nan]
    z = torch.tensor(values, dtype=dtype, requires_grad=True)
    identity_rule(z, functional.silu(z), slope=0.5, factor=0.5).sum().backward()
    assert z.grad is not None
    assert z.grad[:5].tolist() == pytest.approx([0.25, 0.25, 0.25, 0.25, 0.0], rel=1e-2, abs=1e-30)
    assert z.grad[5].isnan()


def test_identity_rule_sends_all_relevance_back() -> None:
    z = double([0.7, -2.0, 3.0])
    value = identity_rule(z, functional.gelu(z), slope=0.5)
    value.sum().backward()
    torch.testing.assert_close(z * z.grad, functional.gelu(z))


def test_slope_at_zero() -> None:
    assert slope_at_zero(functional.silu) == pytest.approx(0.5)
    assert slope_at_zero(nn.GELU(approximate="tanh")) == pytest.approx(0.5)
    assert slope_at_zero(torch.tanh) == 1
    assert slope_at_zero(nn.ReLU()) == 0
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=r"Sigmoid is 0\.5 at 0"):
        slope_at_zero(nn.Sigmoid())


def test_an_activation_function_of_experts_is_named() -> None:
    model = random_decoder("MixtralForCausalLM", hidden_act="sigmoid")
    with pytest.raises(UnsupportedModelError, match=r"activation Sigmoid\w* is 0\.5 at 0"), propagation(model, ATTNLRP):
        pass


def test_factors_of_a_product_by_hand() -> None:
    x, y = double([2.0]), double([3.0])
    (scaled_gradient(x, 0.5) * scaled_gradient(y, 0.5)).backward(torch.tensor([10.0]))
    assert x.grad is not None
    assert y.grad is not None
    assert (x.grad.item(), y.grad.item()) == (15.0, 10.0)  # plainly 30 and 20
    assert (x * x.grad).item() == (y * y.grad).item() == 30.0  # half of 2 * 3 * 10 each


def test_rms_norm_rule_by_hand() -> None:
    x = double([3.0, 4.0])
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64)
    rms = math.sqrt((9 + 16) / 2 + 0.5)
    norm_rule(x, scale * x / rms, scale, epsilon=0.5).backward(torch.tensor([1.0, 10.0]))
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([1 / rms, 20 / rms], abs=1e-12)


def test_layer_norm_rule_by_hand() -> None:
    x = double([3.0, 5.0])
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64)
    deviation = math.sqrt(1 + 0.5)
    value = scale * (x - 4) / deviation
    norm_rule(x, value, scale, epsilon=0.5, centred=True).backward(torch.tensor([1.0, 10.0]))
    assert x.grad is not None
    # behind the constant scale: 1 and 20; behind the centring each less their mean, 10.5
    assert x.grad.tolist() == pytest.approx([-9.5 / deviation, 9.5 / deviation], abs=1e-12)


@pytest.mark.parametrize("centred", [False, True])
def test_norm_rule_in_bfloat16_rounds_once(centred: bool) -> None:
    torch.manual_seed(0)
    x, gradient = torch.randn(6, 64).bfloat16(), torch.randn(6, 64).bfloat16()
    scale = torch.randn(64).bfloat16()
    results: list[Tensor] = []
    for dtype in (torch.bfloat16, torch.float64):
        leaf = x.detach().to(dtype, copy=True).requires_grad_()
        norm_rule(leaf, leaf, scale.to(dtype), 1e-6, centred).backward(gradient.to(dtype))
        assert leaf.grad is not None
        results.append(leaf.grad)
    torch.testing.assert_close(results[0], results[1].bfloat16(), rtol=2**-7, atol=1e-5)


def test_soft_cap_by_hand() -> None:
    for rules, expected in [(ATTNLRP, [0.5 * math.tanh(2.0), 1.0]), (PLAIN, [1 - math.tanh(2.0) ** 2, 1.0])]:
        z = double([6.0, 0.0])
        capped = soft_cap(z, 3.0, rules)
        capped.sum().backward()
        assert capped.tolist() == pytest.approx([3 * math.tanh(2.0), 0.0])
        assert z.grad is not None
        assert z.grad.tolist() == pytest.approx(expected)


def test_attention_rule_by_hand() -> None:
    # one query 1, keys 0 and log 3: attention 1/4 and 3/4; values 4 and 8: output 7
    query, keys, values = double([1.0]), double([0.0, math.log(3)]), double([4.0, 8.0])
    output = functional.scaled_dot_product_attention(
        scaled_gradient(query, ATTNLRP.query_key).view(1, 1, 1),
        scaled_gradient(keys, ATTNLRP.query_key).view(1, 2, 1),
        scaled_gradient(values, ATTNLRP.value).view(1, 2, 1),
        scale=1.0,
    )
    output.backward(torch.ones_like(output))
    assert output.item() == pytest.approx(7.0)
    # d output / d score_j = attention_j (value_j - output) = -3/4, 3/4
    assert query.grad is not None
    assert keys.grad is not None
    assert values.grad is not None
    assert query.grad.tolist() == pytest.approx([0.75 * math.log(3) / 4])
    assert keys.grad.tolist() == pytest.approx([-0.75 / 4, 0.75 / 4])
    assert values.grad.tolist() == pytest.approx([0.25 / 2, 0.75 / 2])


@pytest.mark.parametrize("rules", [ATTNLRP, CP_LRP, RELP], ids=lambda rules: rules.name)
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_a_gated_mlp_conserves_relevance(family: str, rules: Rules) -> None:
    model = decoder_of(family).double()
    mlp = model.get_submodule("model.layers.1.mlp")
    x = embeddings_of(2, 5)
    with propagation(model, rules):
        out = mlp(x)
        gradient = torch.randn_like(out)
        out.backward(gradient)
    assert x.grad is not None
    torch.testing.assert_close((x * x.grad).sum(-1), (out * gradient).sum(-1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", NAMES)
def test_every_norm_conserves_relevance_up_to_its_bias(family: str) -> None:
    model = exact(decoder_of(family))
    for norm in take_apart(model).norms:
        weight = norm.module.get_parameter("weight")
        bias = norm.module.get_parameter("bias") if norm.centred else torch.zeros_like(weight)
        x = torch.randn(3, weight.numel(), dtype=torch.float64, requires_grad=True)
        gradient = torch.randn_like(x)
        with propagation(model, ATTNLRP):
            value = norm.module(x)
            value.backward(gradient)
        torch.testing.assert_close((x * x.grad).sum(-1), ((value - bias) * gradient).sum(-1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*NAMES, *MIXTURES])
def test_forward_is_unchanged_to_the_bit(family: str, attention: str) -> None:
    model = decoder_of(family, "eager" if family == "gemma2" else attention)
    take_apart(model)  # opens experts, which rounds otherwise
    token_ids = torch.randint(258, (2, 11))
    embeddings = embeddings_of(2, 11, torch.float32)
    logits, hidden = model(token_ids).logits, hidden_states(model, embeddings)
    for rules in RULES:
        with propagation(model, rules):
            assert torch.equal(model(token_ids).logits, logits)
            assert torch.equal(hidden_states(model, embeddings), hidden)
    assert torch.equal(model(token_ids).logits, logits)


def state(model: nn.Module) -> list[object]:
    hooked = [
        (name, sorted(vars(module)), *(list(hooks) for key, hooks in sorted(vars(module).items()) if "hooks" in key))
        for name, module in model.named_modules()
    ]
    return [*hooked, model.config._attn_implementation]


def gradient_at_embeddings(model: nn.Module) -> Tensor:
    embeddings = embeddings_of(1, 6, torch.float32)
    return torch.autograd.grad(hidden_states(model, embeddings)[..., 1].sum(), embeddings)[0]


@pytest.mark.parametrize("family", [*NAMES, *MIXTURES])
def test_the_model_is_restored(family: str) -> None:
    model = decoder_of(family)
    take_apart(model)
    before, gradient = state(model), gradient_at_embeddings(model)
    for rules in RULES:
        with propagation(model, rules):
            assert (state(model) == before) == (rules is PLAIN)
            assert torch.allclose(gradient_at_embeddings(model), gradient) == (rules is PLAIN)
        assert state(model) == before
    assert torch.equal(gradient_at_embeddings(model), gradient)

    def leave_by_exception() -> None:
        with propagation(model, ATTNLRP):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        leave_by_exception()
    assert state(model) == before


def test_hooks_that_were_there_before_see_gradients_behind_the_rules() -> None:
    model = decoder_of("llama").double()
    (group,) = take_apart(model).layers[0].groups
    raw: list[Tensor] = []
    assert group.up is not None
    handle = group.up.module.register_forward_hook(lambda _, inputs, output: raw.append(output))
    products: list[Tensor] = []
    group.down_proj.register_forward_pre_hook(lambda _, inputs: products.append(inputs[0]))
    with propagation(model, RELP):
        total = hidden_states(model, embeddings_of(1, 6))[..., 1].sum()
        of_up, of_product = torch.autograd.grad(total, [raw[0], products[0]])
    # half of the product's relevance goes to up
    torch.testing.assert_close(raw[0] * of_up, products[0] * of_product / 2)
    assert handle.id in group.up.module._forward_hooks


@pytest.mark.parametrize("rules", [PLAIN, ATTNLRP], ids=lambda rules: rules.name)
@pytest.mark.parametrize("family", [*NAMES, *MIXTURES])
def test_padding_on_the_right_needs_no_attention_mask(family: str, rules: Rules) -> None:
    model = exact(decoder_of(family))
    lengths = (11, 7, 3)
    batch = embeddings_of(len(lengths), max(lengths))
    direction = torch.randn(HIDDEN, dtype=torch.float64)
    with propagation(model, rules):
        hidden = hidden_states(model, batch)
        total = torch.cat([hidden[index, :length] @ direction for index, length in enumerate(lengths)]).sum()
        together = torch.autograd.grad(total, batch)[0]
        for index, length in enumerate(lengths):
            document = batch[index : index + 1, :length].detach().requires_grad_()
            alone = torch.autograd.grad((hidden_states(model, document) @ direction).sum(), document)[0]
            scale = float(alone.abs().max())
            # eager attention takes its softmax in float32
            torch.testing.assert_close(together[index, :length], alone[0], rtol=1e-5, atol=1e-5 * scale)
            assert not together[index, length:].any()


Product = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Tensor]


def half_each(product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
    return (product(left, right.detach()) + product(left.detach(), right)) / 2


def only_right(product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
    return product(left.detach(), right)


# How each rule set differentiates attention weights * values, and act(gate) * up.
PRODUCTS: dict[str, tuple[Product, Product]] = {
    "attnlrp": (half_each, half_each),
    "cp-lrp": (only_right, only_right),
    "relp": (only_right, half_each),
}


def explicit_relevance(model: nn.Module, x: Tensor, rules: Rules) -> list[Tensor]:
    """Relevance of a Llama's neurons to the sum of hidden states, from a graph whose every node has its rule in it.

    x: [tokens, hidden]. Returns [tokens, neurons] for each layer.
    """
    mixing, gating = PRODUCTS[rules.name]
    cos, sin = (table[0] for table in model.model.rotary_emb(x[None], torch.arange(len(x))[None]))

    def normalised(norm: nn.Module, x: Tensor) -> Tensor:
        return norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt().detach()

    def heads(x: Tensor) -> Tensor:
        return x.view(len(x), -1, 32).transpose(0, 1)  # [heads, tokens, 32]

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    neurons: list[Tensor] = []
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        h = normalised(layer.input_layernorm, x)
        q = rotated(heads(attention.q_proj(h)))
        k = rotated(heads(attention.k_proj(h))).repeat_interleave(2, 0)
        v = heads(attention.v_proj(h)).repeat_interleave(2, 0)
        scores = half_each(torch.matmul, q, k.mT) / math.sqrt(32)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        x = x + attention.o_proj(mixing(torch.matmul, weights, v).transpose(0, 1).flatten(1))
        h = normalised(layer.post_attention_layernorm, x)
        gate = mlp.gate_proj(h)
        neurons.append(gating(torch.mul, gate * gate.sigmoid().detach(), mlp.up_proj(h)))
        x = x + mlp.down_proj(neurons[-1])
    return relevances(normalised(model.model.norm, x).sum(), neurons)


def relevances(total: Tensor, neurons: list[Tensor]) -> list[Tensor]:
    gradients = torch.autograd.grad(total, neurons)
    return [(neuron * gradient).detach() for neuron, gradient in zip(neurons, gradients, strict=True)]


def measured_relevance(model: nn.Module, x: Tensor, rules: Rules) -> list[Tensor]:
    """The same by `propagation`."""
    neurons: list[Tensor] = []
    with ExitStack() as stack:
        for layer in take_apart(model).layers:
            (group,) = layer.groups
            handle = group.down_proj.register_forward_pre_hook(lambda _, inputs: neurons.append(inputs[0]))
            stack.callback(handle.remove)
        stack.enter_context(propagation(model, rules))
        return [relevance.view(len(x), -1) for relevance in relevances(hidden_states(model, x[None]).sum(), neurons)]


@pytest.mark.parametrize("rules", [ATTNLRP, CP_LRP, RELP], ids=lambda rules: rules.name)
def test_neurons_have_the_relevance_of_an_explicit_graph(rules: Rules) -> None:
    model = exact(random_decoder("llama"))
    x = embeddings_of(1, 9)[0]
    measured = measured_relevance(model, x, rules)
    for found, expected in zip(measured, explicit_relevance(model, x, rules), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))
    assert not torch.allclose(measured[0], measured_relevance(model, x, PLAIN)[0], rtol=1e-2)


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: rules.name)
def test_fused_projections_have_the_relevance_of_separate_ones(rules: Rules) -> None:
    fused, separate = random_decoder("phi3"), random_decoder("llama", rms_norm_eps=1e-5)
    weights = fused.state_dict()
    for index in range(2):
        path = f"model.layers.{index}"
        qkv = weights.pop(f"{path}.self_attn.qkv_proj.weight").split([64, 32, 32])
        weights |= {f"{path}.self_attn.{name}_proj.weight": part for name, part in zip("qkv", qkv, strict=True)}
        gate, up = weights.pop(f"{path}.mlp.gate_up_proj.weight").chunk(2)
        weights |= {f"{path}.mlp.gate_proj.weight": gate, f"{path}.mlp.up_proj.weight": up}
    separate.load_state_dict(weights)
    exact(fused), exact(separate)
    x = embeddings_of(1, 9)[0]
    for found, expected in zip(
        measured_relevance(fused, x, rules), measured_relevance(separate, x, rules), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: rules.name)
def test_experts_that_all_tokens_have_alike_have_the_relevance_of_one_mlp(rules: Rules) -> None:
    """A router of zeros that chooses all four experts gives each a weight of 1/4."""
    mixture = random_decoder("MixtralForCausalLM", num_experts_per_tok=4)
    same = {name: getattr(mixture.config, name) for name in ("num_hidden_layers", "rms_norm_eps", "rope_parameters")}
    dense = random_decoder("llama", intermediate_size=4 * NEURONS, **same)
    weights = mixture.state_dict()
    for index in range(mixture.config.num_hidden_layers):
        path = f"model.layers.{index}.mlp"
        weights.pop(f"{path}.gate.weight").zero_()  # the router's own
        gate, up = weights.pop(f"{path}.experts.gate_up_proj").chunk(2, dim=1)  # [experts, neurons, hidden]
        down = weights.pop(f"{path}.experts.down_proj")  # [experts, hidden, neurons]
        weights |= {f"{path}.gate_proj.weight": gate.flatten(0, 1), f"{path}.up_proj.weight": up.flatten(0, 1)}
        weights[f"{path}.down_proj.weight"] = down.transpose(0, 1).flatten(1) / 4
    dense.load_state_dict(weights)
    exact(mixture), exact(dense)
    x = embeddings_of(1, 9)[0]
    found, expected = measured_relevance(mixture, x, rules), measured_relevance(dense, x, rules)
    for of_mixture, of_dense in zip(found, expected, strict=True):
        assert of_dense.abs().max() > 0
        scale = float(of_dense.abs().max())
        torch.testing.assert_close(of_mixture, of_dense, rtol=1e-8, atol=1e-10 * scale)


@pytest.mark.parametrize("rules", [CP_LRP, RELP], ids=lambda rules: rules.name)
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_an_mlp_without_a_gate_has_only_the_identity_rule(family: str, rules: Rules) -> None:
    """Detached attention weights, a ratio of act(z) to z and a reciprocal deviation as constants, by hand."""
    model = random_decoder(family, dtype=torch.float64)
    x = embeddings_of(1, 7)[0]
    layer = take_apart(model).layers[0]
    block = model.get_submodule("model.decoder.layers.0" if family == "opt" else "transformer.h.0")
    parts = (
        (block.self_attn_layer_norm, block.final_layer_norm, block.self_attn.out_proj)
        if family == "opt"
        else (block.ln_1, block.ln_2, block.attn.c_proj)
    )
    before_attention, before_mlp, output = parts

    def normalised(norm: nn.LayerNorm, x: Tensor) -> Tensor:
        deviation = (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt().detach()
        return norm.weight * (x - x.mean(-1, keepdim=True)) / deviation + norm.bias

    h = normalised(before_attention, x)
    q, k, v = (p.module(h)[..., p.rows].view(7, 2, 32).transpose(0, 1) for p in (layer.query, layer.key, layer.value))
    scores = (q @ k.mT / math.sqrt(32)).masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -math.inf)
    stream = x + output((scores.softmax(-1).detach() @ v).transpose(0, 1).flatten(1))
    (group,) = layer.groups
    z = group.gate.module(normalised(before_mlp, stream))
    stream = stream + group.down_proj(z * (group.act_fn(z) / z).detach())
    expected = torch.autograd.grad(stream[:, 1].sum(), x)[0]

    with propagation(model, rules):
        found = block(x[None])
        found = found[0] if isinstance(found, tuple) else found
        gradient = torch.autograd.grad(found[..., 1].sum(), x)[0]
    torch.testing.assert_close(found[0], stream, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


def test_attention_soft_caps_have_the_identity_rule() -> None:
    model = decoder_of("gemma2").double()
    attention = model.model.layers[1].self_attn
    tokens, cap = 6, 2.0
    x = embeddings_of(1, tokens)[0]
    rotation = model.model.rotary_emb(x[None], torch.arange(tokens)[None])
    cos, sin = (table[0] for table in rotation)
    future = torch.full((tokens, tokens), -1e30, dtype=torch.float64).triu(1)
    direction = torch.randn(tokens, HIDDEN, dtype=torch.float64)

    def quarter(x: Tensor) -> Tensor:
        return x / 4 + 0.75 * x.detach()

    def rotated(x: Tensor) -> Tensor:
        x = x.view(tokens, -1, 32).transpose(0, 1)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    q, k = rotated(quarter(attention.q_proj(x))), rotated(quarter(attention.k_proj(x)))
    scores = q @ k.mT * attention.scaling
    capped = scores * (cap * (scores / cap).tanh() / scores).detach()
    weights = (capped + future).float().softmax(-1).double()
    value = attention.v_proj(x)
    mixed = weights @ (value / 2 + value.detach() / 2)
    expected = torch.autograd.grad((attention.o_proj(mixed.transpose(0, 1).flatten(1)) * direction).sum(), x)[0]

    with propagation(model, ATTNLRP):
        output, _ = attention(x[None], position_embeddings=rotation, attention_mask=future[None, None])
        gradient = torch.autograd.grad((output[0] * direction).sum(), x)[0]
    assert scores.abs().max() > cap
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_unknown_architectures_are_refused() -> None:
    with (
        pytest.raises(UnsupportedModelError, match="does not know the architecture Linear"),
        propagation(nn.Linear(2, 2), PLAIN),
    ):
        pass
