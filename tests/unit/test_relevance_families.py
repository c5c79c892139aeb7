import pytest
import torch
from torch import nn
from transformers import LlamaConfig, OPTConfig, OPTForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.families import Projection, available, require_family, take_apart
from tests.decoders import NAMES, random_decoder
from tests.tiny import HIDDEN, NEURONS

GATED = [name for name in NAMES if name not in ("opt", "gpt2")]


def test_every_family_is_tested() -> None:
    assert {type(random_decoder(name)).__name__ for name in NAMES} == set(available())


def test_unknown_architectures_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM; it knows GPT2LMHeadModel, Gemma2ForCausalLM"):
        require_family("BertForMaskedLM")


@pytest.mark.parametrize("family", NAMES)
def test_parts_are_what_their_names_say(family: str) -> None:
    """What the parts compute together is what the model computes."""
    model = random_decoder(family)
    decoder = take_apart(model)
    seen: dict[str, torch.Tensor] = {}
    layer = decoder.layers[1]

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _, inputs, output: seen.update({f"{name} in": inputs[0], name: output}))

    def output_of(projection: Projection) -> torch.Tensor:
        return projection.module.forward(seen["gate in"])[..., projection.rows]

    watch("act", layer.act_fn)
    watch("down", layer.down_proj)
    watch("gate", layer.gate.module)
    token_ids = torch.randint(258, (2, 7))
    hidden = decoder.trunk(inputs_embeds=decoder.embedding(token_ids), use_cache=False).last_hidden_state
    logits = hidden @ decoder.unembedding.weight.T
    if decoder.final_softcap is not None:
        logits = decoder.final_softcap * torch.tanh(logits / decoder.final_softcap)

    torch.testing.assert_close(logits, model(token_ids).logits)
    assert layer.gated == (layer.up is not None) == (family in GATED)
    assert decoder.sizes == (NEURONS, NEURONS)
    assert (seen["act"].shape[-1], seen["down in"].shape[-1], seen["down"].shape[-1]) == (NEURONS, NEURONS, HIDDEN)
    torch.testing.assert_close(seen["act in"], output_of(layer.gate))
    neurons = seen["act"] if layer.up is None else seen["act"] * output_of(layer.up)
    torch.testing.assert_close(seen["down in"], neurons)


@pytest.mark.parametrize("family", NAMES)
def test_queries_keys_and_values_have_their_own_rows(family: str) -> None:
    layer = take_apart(random_decoder(family)).layers[0]
    grouped = family in GATED
    widths = [p.rows.stop - p.rows.start for p in (layer.query, layer.key, layer.value)]
    assert widths == ([64, 32, 32] if grouped else [64, 64, 64])
    fused = layer.query.module is layer.key.module
    assert fused == (family in ("phi3", "gpt2"))
    starts = [p.rows.start for p in (layer.query, layer.key, layer.value)]
    assert starts == ([0, widths[0], widths[0] + widths[1]] if fused else [0, 0, 0])


def test_learned_positions_limit_the_length() -> None:
    assert take_apart(random_decoder("gpt2", n_positions=99)).positions == 99
    assert take_apart(random_decoder("opt", max_position_embeddings=77)).positions == 77
    assert take_apart(random_decoder("llama")).positions is None


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("gemma3", "attn_logit_softcapping", 30.0),
        ("gemma3", "use_bidirectional_attention", True),
        ("llama", "is_causal", False),
        ("opt", "do_layer_norm_before", False),
        ("gpt2", "add_cross_attention", True),
    ],
)
def test_features_without_a_rule_are_refused(family: str, key: str, value: object) -> None:
    model = random_decoder(family)
    setattr(model.config, key, value)
    with pytest.raises(UnsupportedModelError, match=f"with {key}={value!r} is not supported"):
        take_apart(model)


def test_soft_caps_are_known() -> None:
    decoder = take_apart(random_decoder("gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=3.0))
    assert (decoder.attention_softcap, decoder.final_softcap) == (2.0, 3.0)
    assert take_apart(random_decoder("gemma3", final_logit_softcapping=5.0)).final_softcap == 5.0
    uncapped = take_apart(random_decoder("gemma2", attn_logit_softcapping=None, attention="sdpa"))
    assert uncapped.attention_softcap is None


def test_an_attention_that_leaves_out_the_cap_is_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"'sdpa' leaves out the soft cap of its attention; expected 'eager'"
    ):
        take_apart(random_decoder("gemma2", attention="sdpa"))


def test_opt_with_projected_embeddings_is_refused_by_name() -> None:
    config = OPTConfig(
        vocab_size=32, hidden_size=16, word_embed_proj_dim=8, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UnsupportedModelError, match=r"module model\.decoder\.project_out \(Linear\)"):
        take_apart(OPTForCausalLM(config))


def test_a_missing_layer_is_noticed() -> None:
    model = random_decoder("llama")
    del model.model.layers[1]
    with pytest.raises(UnsupportedModelError, match=r"1 modules in model\.layers, its config says 2"):
        take_apart(model)


def test_a_missing_module_is_named() -> None:
    model = random_decoder("llama")
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(UnsupportedModelError, match=r"no module model\.layers\.1\.mlp\.up_proj"):
        take_apart(model)


def test_a_module_of_another_kind_is_named() -> None:
    model = random_decoder("llama")
    model.model.layers[0].mlp.down_proj = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.down_proj is Identity, expected Linear"):
        take_apart(model)


def test_a_projection_of_another_width_is_named() -> None:
    model = random_decoder("phi3")
    model.model.layers[0].self_attn.qkv_proj = nn.Linear(64, 100)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.self_attn\.qkv_proj has 100 outputs, expected 128"):
        take_apart(model)


def test_an_unlisted_module_is_named() -> None:
    model = random_decoder("llama")
    model.model.layers[0].self_attn.q_norm = nn.RMSNorm(8)
    with pytest.raises(UnsupportedModelError, match=r"module model\.layers\.0\.self_attn\.q_norm \(RMSNorm\)"):
        take_apart(model)


def test_an_unembedding_with_a_bias_is_refused() -> None:
    model = random_decoder("llama")
    model.lm_head = nn.Linear(64, 258)
    with pytest.raises(UnsupportedModelError, match="lm_head has a bias"):
        take_apart(model)


def test_neurons_are_counted_per_layer() -> None:
    model = random_decoder("llama")
    model.model.layers[1].mlp = LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=12, num_attention_heads=2))
    assert take_apart(model).sizes == (NEURONS, 12)
