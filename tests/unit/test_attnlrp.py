import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from relevance.attnlrp import attnlrp, identity_rule, norm_rule, uniform_rule
from relevance.families import UnsupportedModelError, take_apart

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, **changes)
    return LlamaForCausalLM(config).eval()


def tiny_gemma(**changes: object) -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    options = {"initializer_range": 0.3, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    config = Gemma3TextConfig(**SIZES, num_attention_heads=4, num_key_value_heads=1, **{**options, **changes})
    return Gemma3ForCausalLM(config).eval()


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_identity_rule_by_hand() -> None:
    z = double([2.0, -1.0, 0.0, 1e-9])
    result = identity_rule(z, functional.silu(z), functional.silu)
    result.backward(torch.full_like(z, 3.0))
    assert torch.equal(result, functional.silu(z))
    # silu(z) / z is the logistic function, whose value at 0 is 1/2
    expected = [3 / (1 + math.exp(-2)), 3 / (1 + math.exp(1)), 1.5, 1.5]
    assert z.grad is not None
    assert z.grad.tolist() == pytest.approx(expected, abs=1e-5)


def test_identity_rule_sends_all_relevance_back() -> None:
    z = double([0.7, -2.0, 3.0])
    value = identity_rule(z, functional.gelu(z), functional.gelu)
    value.sum().backward()
    torch.testing.assert_close(z * z.grad, functional.gelu(z))


def test_uniform_rule_by_hand() -> None:
    x, y = double([2.0]), double([3.0])
    (uniform_rule(x) * uniform_rule(y)).backward(torch.tensor([10.0]))
    assert x.grad is not None
    assert y.grad is not None
    assert (x.grad.item(), y.grad.item()) == (15.0, 10.0)  # plainly 30 and 20
    assert (x * x.grad).item() == (y * y.grad).item() == 30.0  # half of 2 * 3 * 10 each


def test_norm_rule_by_hand() -> None:
    x = double([3.0, 4.0])
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64)
    rms = math.sqrt((9 + 16) / 2 + 0.5)
    value = scale * x / rms
    norm_rule(x, value, scale, epsilon=0.5).backward(torch.tensor([1.0, 10.0]))
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([1 / rms, 20 / rms], abs=1e-12)


def test_attention_rule_by_hand() -> None:
    # one query 1, keys 0 and log 3: attention 1/4 and 3/4; values 4 and 8: output 7
    query, keys, values = double([1.0]), double([0.0, math.log(3)]), double([4.0, 8.0])
    output = functional.scaled_dot_product_attention(
        uniform_rule(query, products=2).view(1, 1, 1),
        uniform_rule(keys, products=2).view(1, 2, 1),
        uniform_rule(values).view(1, 2, 1),
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


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma])
def test_a_gated_mlp_conserves_relevance(build: type[nn.Module]) -> None:
    model = build().double()
    mlp = model.get_submodule("model.layers.1.mlp")
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    with attnlrp(model):
        out = mlp(x)
        gradient = torch.randn_like(out)
        out.backward(gradient)
    assert x.grad is not None
    torch.testing.assert_close((x * x.grad).sum(-1), (out * gradient).sum(-1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma])
def test_every_norm_has_the_gradient_of_a_constant_reciprocal(build: type[nn.Module]) -> None:
    model = build()
    for norm in take_apart(model).norms:
        x = torch.randn(3, norm.module.get_parameter("weight").numel(), requires_grad=True)
        with attnlrp(model):
            value = norm.module(x)
            value.sum().backward()
        torch.testing.assert_close(x * x.grad, value)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma])
def test_forward_is_unchanged(build: type[nn.Module], attention: str) -> None:
    model = build(attn_implementation=attention)
    token_ids = torch.randint(64, (2, 11))
    plain = model(token_ids).logits
    with attnlrp(model):
        patched = model(token_ids).logits
    assert (patched - plain).abs().max() <= 1e-6
    assert torch.equal(model(token_ids).logits, plain)


def state(model: nn.Module) -> list[object]:
    return [
        (name, sorted(vars(module)), *(list(hooks) for key, hooks in sorted(vars(module).items()) if "hooks" in key))
        for name, module in model.named_modules()
    ]


def plain_gradient(model: nn.Module) -> Tensor:
    embeddings = torch.linspace(-1, 1, 6 * 16).view(1, 6, 16).requires_grad_()
    logits = model(inputs_embeds=embeddings).logits
    return torch.autograd.grad(logits[..., 1].sum(), embeddings)[0]


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma])
def test_the_model_is_restored(build: type[nn.Module]) -> None:
    model = build()
    before, gradient = state(model), plain_gradient(model)
    with attnlrp(model):
        assert state(model) != before
        assert not torch.allclose(plain_gradient(model), gradient)
    assert state(model) == before
    assert torch.equal(plain_gradient(model), gradient)

    def leave_by_exception() -> None:
        with attnlrp(model):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        leave_by_exception()
    assert state(model) == before


def test_hooks_of_others_stay() -> None:
    model = tiny_llama()
    calls: list[int] = []
    model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    with attnlrp(model):
        pass
    model(torch.tensor([[1, 2]]))
    assert calls == [1]


def explicit_relevance(model: LlamaForCausalLM, token_ids: Tensor) -> list[Tensor]:
    """Relevance of each layer's neurons to the mean target logit, from a graph whose every node has its rule in it."""

    def half_each(product: object, left: Tensor, right: Tensor) -> Tensor:
        return (product(left, right.detach()) + product(left.detach(), right)) / 2  # type: ignore[operator]

    def normalised(norm: nn.Module, x: Tensor) -> Tensor:
        return norm.weight * x * (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt().detach()

    def heads(x: Tensor) -> Tensor:
        return x.view(len(x), -1, 8).transpose(0, 1)  # [heads, tokens, 8]

    def rotated(x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], dtype=x.dtype)
        angles = positions[:, None] / 10000.0 ** (torch.arange(0, 8, 2, dtype=x.dtype) / 8)
        first, second = x.chunk(2, -1)
        return torch.cat(
            (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1
        )

    neurons: list[Tensor] = []
    x = model.model.embed_tokens(token_ids)  # [tokens, hidden]
    future = torch.ones(len(token_ids), len(token_ids), dtype=torch.bool).triu(1)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        h = normalised(layer.input_layernorm, x)
        q = rotated(heads(attention.q_proj(h)))
        k = rotated(heads(attention.k_proj(h))).repeat_interleave(2, 0)
        v = heads(attention.v_proj(h)).repeat_interleave(2, 0)
        scores = half_each(torch.matmul, q, k.transpose(1, 2)) / math.sqrt(8)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        x = x + attention.o_proj(half_each(torch.matmul, weights, v).transpose(0, 1).flatten(1))
        h = normalised(layer.post_attention_layernorm, x)
        gate = mlp.gate_proj(h)
        neurons.append(half_each(torch.mul, gate * (functional.silu(gate) / gate).detach(), mlp.up_proj(h)))
        x = x + mlp.down_proj(neurons[-1])
    logits = model.lm_head(normalised(model.model.norm, x))
    target_logits = logits[:-1].gather(1, token_ids[1:, None])
    gradients = torch.autograd.grad(target_logits.mean(), neurons)
    return [neuron * gradient for neuron, gradient in zip(neurons, gradients, strict=True)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_whole_model_equals_explicit_rules(attention: str) -> None:
    model = tiny_llama(attn_implementation=attention).double()
    token_ids = torch.randint(64, (9,))
    explicit = [relevance.detach() for relevance in explicit_relevance(model, token_ids)]
    neurons: list[Tensor] = []
    for layer in take_apart(model).layers:
        layer.down_proj.register_forward_pre_hook(lambda _, inputs: neurons.append(inputs[0]))
    with attnlrp(model):
        logits = model(token_ids[None]).logits[0]
    gradients = torch.autograd.grad(logits[:-1].gather(1, token_ids[1:, None]).mean(), neurons)
    for expected, neuron, gradient in zip(explicit, neurons, gradients, strict=True):
        # the model's own norms and rotary embeddings compute in float32
        torch.testing.assert_close((neuron * gradient)[0], expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_unknown_architectures_are_refused() -> None:
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with (
        pytest.raises(UnsupportedModelError, match="Qwen2ForCausalLM; it knows LlamaForCausalLM"),
        attnlrp(Qwen2ForCausalLM(config)),
    ):
        pass


@pytest.mark.parametrize("key", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_soft_capping_is_refused(key: str) -> None:
    with pytest.raises(UnsupportedModelError, match=key):
        take_apart(tiny_gemma(**{key: 30.0}))


def test_a_missing_layer_is_noticed() -> None:
    model = tiny_llama()
    del model.model.layers[1]
    with pytest.raises(UnsupportedModelError, match=r"1 modules in model\.layers, its config says 2"):
        take_apart(model)


def test_a_missing_module_is_named() -> None:
    model = tiny_llama()
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(UnsupportedModelError, match=r"no module model\.layers\.1\.mlp\.up_proj"):
        take_apart(model)


def test_a_module_of_another_kind_is_named() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.down_proj = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.down_proj is Identity, expected Linear"):
        take_apart(model)


def test_an_unlisted_norm_is_named() -> None:
    model = tiny_llama()
    model.model.layers[0].self_attn.q_norm = nn.RMSNorm(8)
    with pytest.raises(UnsupportedModelError, match=r"normalisation at model\.layers\.0\.self_attn\.q_norm"):
        take_apart(model)


def test_neurons_are_counted_per_layer() -> None:
    model = tiny_llama()
    config = LlamaConfig(**{**SIZES, "intermediate_size": 12}, num_attention_heads=4)
    model.model.layers[1].mlp = LlamaMLP(config)
    assert take_apart(model).sizes == (24, 12)
