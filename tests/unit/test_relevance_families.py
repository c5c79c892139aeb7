from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, OPTConfig, OPTForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.families import Projection, available, require_family, take_apart
from relevance import proof
from relevance.model import load_model
from relevance.model_passes import last_hidden
from relevance.proof import prove_conservation
from relevance.rules import CP_LRP
from tests.decoders import NAMES, random_decoder
from tests.tiny import HIDDEN, NEURONS, tiny_model

# Those of `tests.tiny`, which every other test of relevance has too, and all others by the class names of their models.
ALL = (*NAMES, *sorted(set(available()) - {type(random_decoder(name)).__name__ for name in NAMES}))
UNGROUPED = {"opt", "gpt2", "BioGptForCausalLM", "GPTJForCausalLM"}  # as many heads for keys and values as for queries
NOT_GATED = {
    "opt",
    "gpt2",
    "ArceeForCausalLM",
    "BioGptForCausalLM",
    "GPTJForCausalLM",
    "Jais2ForCausalLM",
    "NemotronForCausalLM",
    "PhiForCausalLM",
    "Starcoder2ForCausalLM",
}
LINEAR_BELOW_AND_ABOVE_0 = {"opt"}  # ReLU: f(z) / z is f'(z)


def test_rules_are_known_for_many_architectures() -> None:
    assert len(available()) >= 25
    assert set(ALL) >= NOT_GATED | UNGROUPED


def test_unknown_architectures_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM; it knows ArceeForCausalLM, BioGptForCausalLM"):
        require_family("BertForMaskedLM")


@pytest.mark.parametrize("family", ALL)
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
    hidden = last_hidden(decoder, decoder.embedding(token_ids))
    logits = hidden @ decoder.unembedding.weight.T
    if decoder.final_softcap is not None:
        logits = decoder.final_softcap * torch.tanh(logits / decoder.final_softcap)

    torch.testing.assert_close(logits, model(token_ids).logits)
    assert layer.gated == (layer.up is not None) == (family not in NOT_GATED)
    assert decoder.sizes == (NEURONS,) * model.config.get_text_config().num_hidden_layers
    assert (seen["act"].shape[-1], seen["down in"].shape[-1], seen["down"].shape[-1]) == (NEURONS, NEURONS, HIDDEN)
    torch.testing.assert_close(seen["act in"], output_of(layer.gate))
    neurons = seen["act"] if layer.up is None else seen["act"] * output_of(layer.up)
    torch.testing.assert_close(seen["down in"], neurons)


@pytest.mark.parametrize("family", ALL)
def test_rules_lose_nothing_and_a_rule_that_is_left_out_is_noticed(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_decoder(family, dtype=torch.float64).requires_grad_(False)
    decoder = take_apart(model)
    prove_conservation(model, decoder)
    left_out = [replace(CP_LRP, norms=False)]
    if decoder.layers[0].gated:
        left_out.append(replace(CP_LRP, gate=1.0))
    elif family not in LINEAR_BELOW_AND_ABOVE_0:
        left_out.append(replace(CP_LRP, activation=False))
    for rules in left_out:
        monkeypatch.setattr(proof, "CP_LRP", rules)
        with pytest.raises(UnsupportedModelError, match=r"lose or gain [0-9.]+% of the logits"):
            prove_conservation(model, decoder)


def test_a_part_that_is_not_linear_is_noticed_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of a known kind at a known place that does more than its kind."""
    checkpoint = tiny_model("llama", tmp_path / "llama")
    model = load_model(checkpoint, torch.float32, torch.device("cpu"))
    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: plain(self, x) * x.std(-1, keepdim=True))
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()
    with pytest.raises(UnsupportedModelError, match="something in it is not linear and has no rule"):
        load_model(checkpoint, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("family", ALL)
def test_queries_keys_and_values_have_their_own_rows(family: str) -> None:
    layer = take_apart(random_decoder(family)).layers[0]
    grouped = family not in UNGROUPED
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


def test_a_bias_of_the_unembedding_is_its_last_column() -> None:
    model = random_decoder("llama")
    model.lm_head = nn.Linear(64, 258)
    token_ids = torch.arange(9)[None]
    decoder = take_apart(model)
    logits = last_hidden(decoder, decoder.embedding(token_ids)) @ decoder.unembedding.weight.T
    torch.testing.assert_close(logits, model(token_ids).logits)


def test_neurons_are_counted_per_layer() -> None:
    model = random_decoder("llama")
    model.model.layers[1].mlp = LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=12, num_attention_heads=2))
    assert take_apart(model).sizes == (NEURONS, 12)
