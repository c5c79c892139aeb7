"""AttnLRP a second time: relevance is sent back layer by layer by the rules themselves, without any gradient.

Every step computes a value and returns it with the way back, a function from the relevance of that value to the
relevance of each input (arXiv:2402.05602). Divisions by z need z that does not vanish: the data are random, and
`shares` fails if a denominator comes near to zero in float64.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, MixtralConfig, Qwen2MoeConfig

from crane_serve.common.models.families import take_apart
from relevance.rules import ATTNLRP, propagation
from tests.decoders import exact, randomised

Back = Callable[[Tensor], Tensor]
Back2 = Callable[[Tensor], tuple[Tensor, Tensor]]

WIDTH, NEURONS, HEADS, HEAD_WIDTH, TOKENS = 16, 24, 4, 4, 9
GATED = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": NEURONS,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD_WIDTH,
    "initializer_range": 0.3,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
WIDTHS = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 10}


def shares(relevance: Tensor, z: Tensor) -> Tensor:
    """R / z, for z that is nowhere nearly zero."""
    assert z.abs().min() > 1e-8 * z.abs().max()
    return relevance / z


def linear(x: Tensor, weight: Tensor, bias: Tensor | float = 0.0) -> tuple[Tensor, Back]:
    """Epsilon rule with epsilon 0: R_i = sum_j x_i W_ji R_j / z_j. weight: [..., out, in]; a bias keeps its part."""
    z = (weight @ x.unsqueeze(-1)).squeeze(-1) + bias

    def back(relevance: Tensor) -> Tensor:
        return x * (weight.mT @ shares(relevance, z).unsqueeze(-1)).squeeze(-1)

    return z, back


def matmul(a: Tensor, b: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Back2]:
    """Uniform rule: each summand a_ik b_kj of z_ij gives half of its share of R_ij to either factor.

    allowed: the entries of the product that are used; the others have no relevance.
    """
    z = a @ b

    def back(relevance: Tensor) -> tuple[Tensor, Tensor]:
        per_unit = shares(relevance, z if allowed is None else z.where(allowed, 1.0)) / 2  # [..., i, j]
        summands = torch.einsum("...ik,...kj,...ij->...ikj", a, b, per_unit)
        return summands.sum(-1), summands.sum(-3)

    return z, back


def softmax(x: Tensor, allowed: Tensor) -> tuple[Tensor, Back]:
    """Taylor rule: R_i = x_i (R'_i - s_i sum_j R'_j)."""
    s = x.masked_fill(~allowed, -torch.inf).softmax(-1)

    def back(relevance: Tensor) -> Tensor:
        return (x * (relevance - s * relevance.sum(-1, keepdim=True))).where(allowed, 0.0)

    return s, back


def added(x: Tensor, y: Tensor) -> tuple[Tensor, Back2]:
    """Each summand receives its share."""
    z = x + y

    def back(relevance: Tensor) -> tuple[Tensor, Tensor]:
        per_unit = shares(relevance, z)
        return x * per_unit, y * per_unit

    return z, back


def rms_norm(x: Tensor, scale: Tensor, epsilon: float) -> tuple[Tensor, Back]:
    """With a constant reciprocal: an element-wise linear map, which keeps each relevance where it is."""
    return scale * x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt(), lambda relevance: relevance


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Back]:
    """With a constant reciprocal: a linear map whose matrix centres, divides and scales, plus a bias."""
    centring = torch.eye(WIDTH, dtype=x.dtype) - 1 / WIDTH
    deviation = (x.var(-1, correction=0) + norm.eps).sqrt()
    return linear(x, norm.weight[:, None] * centring / deviation[:, None, None], norm.bias)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Back]:
    """Rotary embeddings of x [heads, tokens, width] as a matrix for each token. cos, sin: [tokens, width]."""
    half = torch.eye(HEAD_WIDTH, dtype=x.dtype).roll(HEAD_WIDTH // 2, dims=0)
    half[: HEAD_WIDTH // 2] *= -1  # x -> (-second half, first half)
    return linear(x, torch.diag_embed(cos) + torch.diag_embed(sin) @ half)


def heads(x: Tensor) -> Tensor:
    return x.view(TOKENS, -1, HEAD_WIDTH).transpose(0, 1)  # [heads, tokens, width]


def joined(x: Tensor) -> Tensor:
    return x.transpose(0, 1).reshape(TOKENS, -1)


def attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, allowed: Tensor
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """query: [heads, tokens, width]; key, value: [key_value_heads, tokens, width], shared by several query heads."""
    groups = len(query) // len(key)
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    products, back_products = matmul(query, key.mT, allowed)
    weights, back_weights = softmax(products * scaling, allowed)
    output, back_output = matmul(weights, value)

    def back(relevance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_weights, of_value = back_output(relevance)
        of_query, of_key = back_products(back_weights(of_weights))
        return of_query, of_key.mT.unflatten(0, (-1, groups)).sum(1), of_value.unflatten(0, (-1, groups)).sum(1)

    return output, back


def gated_mlp(x: Tensor, mlp: nn.Module, activation: Callable[[Tensor], Tensor]) -> tuple[Tensor, Callable]:
    gate, back_gate = linear(x, mlp.gate_proj.weight)
    up, back_up = linear(x, mlp.up_proj.weight)
    neurons = activation(gate) * up
    output, back_output = linear(neurons, mlp.down_proj.weight)

    def back(relevance: Tensor) -> tuple[Tensor, Tensor]:
        of_neurons = back_output(relevance)
        # Half of it to either factor; the activation function keeps what it receives (identity rule).
        return of_neurons, back_gate(of_neurons / 2) + back_up(of_neurons / 2)

    return output, back


def of_experts(x: Tensor, block: nn.Module, activation: Callable[[Tensor], Tensor]) -> tuple[Tensor, Callable]:
    """Token by token, expert by expert; what experts are weighted by is a constant. x: [tokens, hidden].

    Neurons of shared experts stand before those of the others, which are 0 where a token does not have them.
    """
    experts, (_, weights, ids) = block.experts, block.gate(x)
    parts: list[Tensor] = []  # each [hidden]: weighted outputs, of all tokens and experts
    backs: list[tuple[int, slice, Callable]] = []  # token, neurons
    shared = 0
    if hasattr(block, "shared_expert"):
        share = torch.sigmoid(block.shared_expert_gate(x))
        y, back_shared = gated_mlp(x, block.shared_expert, activation)
        shared = block.shared_expert.down_proj.in_features
        of_shared = share * y
    width = experts.down_proj.shape[2]
    output = torch.zeros_like(x) if not shared else of_shared
    for token, chosen in enumerate(ids.tolist()):
        for choice, expert in enumerate(chosen):
            one = nn.Module()
            gate, up = experts.gate_up_proj[expert].chunk(2)
            for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", experts.down_proj[expert])):
                one.add_module(name, nn.Module())
                one.get_submodule(name).weight = weight
            y, back = gated_mlp(x[token], one, activation)
            parts.append(weights[token, choice] * y)
            output = output.index_add(0, torch.tensor([token]), parts[-1][None])
            first = shared + expert * width
            backs.append((token, slice(first, first + width), back))

    def back(relevance: Tensor) -> tuple[Tensor, Tensor]:
        per_unit = shares(relevance, output)  # each summand receives its share
        of_neurons = torch.zeros(len(x), shared + len(experts.down_proj) * width, dtype=x.dtype)
        of_input = torch.zeros_like(x)
        if shared:
            of_neurons[:, :shared], of_input = back_shared(of_shared * per_unit)
        for (token, places, back), part in zip(backs, parts, strict=True):
            of_neurons[token, places], of_token = back(part * per_unit[token])
            of_input[token] += of_token
        return of_neurons, of_input

    return output, back


def causal(window: int = TOKENS) -> Tensor:
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    return (distance >= 0) & (distance < window)


def llama_attention(
    x: Tensor, part: nn.Module, rotation: tuple[Tensor, Tensor], allowed: Tensor, norm: Callable | None = None
) -> tuple[Tensor, Back]:
    """Attention of Llama, and with norms of query and key heads, of Gemma 3. x: [tokens, hidden], normalised."""
    (q, back_q), (k, back_k), (v, back_v) = (linear(x, p.weight) for p in (part.q_proj, part.k_proj, part.v_proj))
    q, k = heads(q), heads(k)
    if norm is not None:
        q, k = norm(q, part.q_norm)[0], norm(k, part.k_norm)[0]
    (q, back_rotary_q), (k, back_rotary_k) = rotary(q, *rotation), rotary(k, *rotation)
    mixed, back_mixed = attention(q, k, heads(v), part.scaling, allowed)
    output, back_output = linear(joined(mixed), part.o_proj.weight)

    def back(relevance: Tensor) -> Tensor:
        of_q, of_k, of_v = back_mixed(heads(back_output(relevance)))
        return back_q(joined(back_rotary_q(of_q))) + back_k(joined(back_rotary_k(of_k))) + back_v(joined(of_v))

    return output, back


def gated_neurons(
    model: nn.Module, x: Tensor, token_ids: Tensor, norm: Callable, activation: Callable, gemma: bool
) -> list[Tensor]:
    """Relevance of every layer's neurons to the mean target logit. x: embeddings [tokens, hidden]."""
    backs: list[Callable] = []
    for index, layer in enumerate(model.model.layers):
        window, kind = TOKENS, []
        if gemma:
            kind = [model.config.layer_types[index]]
            window = model.config.sliding_window if kind == ["sliding_attention"] else TOKENS
        rotation = tuple(table[0] for table in model.model.rotary_emb(x[None], torch.arange(TOKENS)[None], *kind))
        h, back_norm = norm(x, layer.input_layernorm)
        y, back_attention = llama_attention(h, layer.self_attn, rotation, causal(window), norm if gemma else None)
        if gemma:
            y, _ = norm(y, layer.post_attention_layernorm)
        x, back_first = added(x, y)
        h, back_second_norm = norm(x, layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm)
        y, back_mlp = (of_experts if hasattr(layer.mlp, "experts") else gated_mlp)(h, layer.mlp, activation)
        if gemma:
            y, _ = norm(y, layer.post_feedforward_layernorm)
        x, back_second = added(x, y)
        backs.append(
            residual(
                (back_first, lambda r, a=back_attention, n=back_norm: n(a(r))),
                back_second,
                back_mlp,
                back_second_norm,
            )
        )
    h, back_norm = norm(x, model.model.norm)
    return sent_back(back_norm(of_last_hidden(h, model.lm_head.weight, token_ids)), backs)


def residual(attention: tuple[Back2, Back], added_mlp: Back2, mlp: Callable, norm: Back) -> Callable:
    """The way back through one layer: relevance of its output -> relevance of its neurons and of its input."""

    def back(relevance: Tensor) -> tuple[Tensor, Tensor]:
        stream, branch = added_mlp(relevance)
        neurons, of_normalised = mlp(branch)
        stream, branch = attention[0](stream + norm(of_normalised))
        return neurons, stream + attention[1](branch)

    return back


def of_last_hidden(h: Tensor, unembedding: Tensor, token_ids: Tensor) -> Tensor:
    """The mean target logit is the relevance that there is; the epsilon rule brings it to h [tokens, hidden]."""
    relevance = torch.zeros_like(h)
    for position, target in enumerate(token_ids[1:]):
        logit, back = linear(h[position], unembedding[target][None])
        relevance[position] = back(logit / (TOKENS - 1))
    return relevance


def sent_back(relevance: Tensor, backs: list[Callable]) -> list[Tensor]:
    neurons: list[Tensor] = []
    for back in reversed(backs):
        of_neurons, relevance = back(relevance)
        neurons.append(of_neurons)
    return neurons[::-1]


def llama_neurons(model: nn.Module, x: Tensor, token_ids: Tensor) -> list[Tensor]:
    def norm(x: Tensor, module: nn.Module) -> tuple[Tensor, Back]:
        return rms_norm(x, module.weight, module.variance_epsilon)

    return gated_neurons(model, x, token_ids, norm, functional.silu, gemma=False)


def gemma3_neurons(model: nn.Module, x: Tensor, token_ids: Tensor) -> list[Tensor]:
    def norm(x: Tensor, module: nn.Module) -> tuple[Tensor, Back]:
        return rms_norm(x, 1 + module.weight, module.eps)

    def gelu(x: Tensor) -> Tensor:
        return functional.gelu(x, approximate="tanh")

    return gated_neurons(model, x, token_ids, norm, gelu, gemma=True)


def gpt2_neurons(model: nn.Module, x: Tensor, token_ids: Tensor) -> list[Tensor]:
    def conv(x: Tensor, module: nn.Module) -> tuple[Tensor, Back]:
        return linear(x, module.weight.T, module.bias)

    backs: list[Callable] = []
    x = x + model.transformer.wpe.weight[:TOKENS]
    for layer in model.transformer.h:
        h, back_norm = layer_norm(x, layer.ln_1)
        fused, back_fused = conv(h, layer.attn.c_attn)
        mixed, back_mixed = attention(*(heads(part) for part in fused.chunk(3, -1)), HEAD_WIDTH**-0.5, causal())
        y, back_output = conv(joined(mixed), layer.attn.c_proj)

        def back_attention(
            relevance: Tensor,
            n: Back = back_norm,
            f: Back = back_fused,
            m: Callable = back_mixed,
            o: Back = back_output,
        ) -> Tensor:
            return n(f(torch.cat([joined(part) for part in m(heads(o(relevance)))], -1)))

        x, back_first = added(x, y)
        h, back_second_norm = layer_norm(x, layer.ln_2)
        z, back_gate = conv(h, layer.mlp.c_fc)
        y, back_down = conv(functional.gelu(z, approximate="tanh"), layer.mlp.c_proj)

        def back_mlp(relevance: Tensor, g: Back = back_gate, d: Back = back_down) -> tuple[Tensor, Tensor]:
            of_neurons = d(relevance)
            return of_neurons, g(of_neurons)

        x, back_second = added(x, y)
        backs.append(residual((back_first, back_attention), back_second, back_mlp, back_second_norm))
    h, back_norm = layer_norm(x, model.transformer.ln_f)
    return sent_back(back_norm(of_last_hidden(h, model.lm_head.weight, token_ids)), backs)


def measured_neurons(model: nn.Module, x: Tensor, token_ids: Tensor) -> list[Tensor]:
    """The same by activation * gradient under the rules of this project."""
    neurons: dict[int, list[Tensor]] = {}  # of a layer, group after group
    for index, layer in enumerate(take_apart(model).layers):
        for group in layer.groups:
            group.down_proj.register_forward_pre_hook(
                lambda _, inputs, index=index: neurons.setdefault(index, []).append(inputs[0])
            )
    with propagation(model, ATTNLRP):
        logits = model(inputs_embeds=x.detach().requires_grad_()[None]).logits[0]
        target_logits = logits[:-1].gather(1, token_ids[1:, None])
        gradients = torch.autograd.grad(target_logits.mean(), [part for of in neurons.values() for part in of])
    left = iter(gradients)
    return [
        torch.cat([(part * next(left)).detach().view(TOKENS, -1) for part in of_layer], dim=1)
        for of_layer in neurons.values()
    ]


CONFIGS = {
    "llama": (LlamaConfig(**GATED), llama_neurons),
    "mixtral": (MixtralConfig(**GATED, **EXPERTS), llama_neurons),
    "qwen2-moe": (
        Qwen2MoeConfig(**GATED, **EXPERTS, **WIDTHS, qkv_bias=False),
        llama_neurons,
    ),
    "gemma3": (
        Gemma3TextConfig(
            **GATED,
            query_pre_attn_scalar=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
        gemma3_neurons,
    ),
    "gpt2": (
        GPT2Config(
            vocab_size=64, n_embd=WIDTH, n_inner=NEURONS, n_layer=2, n_head=HEADS, n_positions=32, initializer_range=0.3
        ),
        gpt2_neurons,
    ),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_neurons_have_the_relevance_that_the_rules_send_them(family: str) -> None:
    config, explicit_neurons = CONFIGS[family]
    model = exact(randomised(config))
    token_ids = torch.randint(64, (TOKENS,))
    embeddings = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        expected = explicit_neurons(model, embeddings, token_ids)
    for found, relevance in zip(measured_neurons(model, embeddings, token_ids), expected, strict=True):
        assert relevance.abs().max() > 0
        torch.testing.assert_close(found, relevance, rtol=1e-6, atol=1e-10 * float(relevance.abs().max()))
