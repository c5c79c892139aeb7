from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, OPTConfig, OPTForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from crane_serve.common.models.decoder import Projection
from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.families import available, require_family, take_apart
from relevance import proof
from relevance.model import load_model
from relevance.model_passes import last_hidden
from relevance.proof import prove_conservation
from relevance.rules import CP_LRP
from tests.architectures import OF_EXPERTS
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
WITH_A_SHARED_GATE = {"Qwen2MoeForCausalLM"}
WITH_EXPERTS = set(OF_EXPERTS)
LINEAR_BELOW_AND_ABOVE_0 = {"opt"}  # ReLU: f(z) / z is f'(z)


def test_rules_are_known_for_many_architectures() -> None:
    assert len(available()) >= 25
    assert set(ALL) >= NOT_GATED | UNGROUPED


def test_unknown_architectures_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM; it knows ArceeForCausalLM, BioGptForCausalLM"):
        require_family("BertForMaskedLM")


@pytest.mark.parametrize("family", ALL)
def test_parts_are_what_their_names_say(family: str) -> None:
    """What the parts compute together is what the model computes, before it is taken apart."""
    model = random_decoder(family)
    token_ids = torch.randint(258, (2, 7))
    own = model(token_ids).logits
    decoder = take_apart(model)
    seen: dict[str, Any] = {}
    layer = decoder.layers[1]

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _, inputs, output: seen.update({f"{name} in": inputs, name: output}))

    for number, group in enumerate(layer.groups):
        watch(f"act {number}", group.act_fn)
        watch(f"down {number}", group.down_proj)
        watch(f"gate {number}", group.gate.module)
    hidden = last_hidden(decoder, decoder.embedding(token_ids))
    logits = hidden @ decoder.unembedding.weight.T
    if decoder.final_softcap is not None:
        logits = decoder.final_softcap * torch.tanh(logits / decoder.final_softcap)

    torch.testing.assert_close(logits, own)
    layers = model.config.get_text_config().num_hidden_layers
    assert len(decoder.sizes) == layers
    assert family in WITH_EXPERTS or decoder.sizes == (NEURONS,) * layers
    assert any(group.of_experts for group in layer.groups) == (family in WITH_EXPERTS)
    counted = 0
    for number, group in enumerate(layer.groups):

        def output_of(projection: Projection, name: str = f"gate {number} in") -> torch.Tensor:
            return projection.module.forward(*seen[name])[..., projection.rows]

        def whole(values: torch.Tensor, sparse: bool = group.of_experts, number: int = number) -> torch.Tensor:
            return seen[f"gate {number} in"][1].spread(values) if sparse else values

        neurons = group.columns.stop - group.columns.start
        assert group.columns.start == counted
        counted = group.columns.stop
        assert group.gated == (group.up is not None) == (family not in NOT_GATED)
        act, (down_in, *_), down = seen[f"act {number}"], seen[f"down {number} in"], seen[f"down {number}"]
        assert (whole(act).shape[-1], down_in.shape[-1], down.shape[-1]) == (neurons, neurons, HIDDEN)
        torch.testing.assert_close(seen[f"act {number} in"][0], output_of(group.gate))
        torch.testing.assert_close(down_in, whole(act if group.up is None else act * output_of(group.up)))
    assert decoder.sizes[1] == counted


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
        left_out += [replace(CP_LRP, shares=False)] * (family in WITH_A_SHARED_GATE)
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
        ("OlmoeForCausalLM", "clip_qkv", 8.0),
    ],
)
def test_features_without_a_rule_are_refused(family: str, key: str, value: object) -> None:
    model = random_decoder(family)
    setattr(model.config, key, value)
    with pytest.raises(UnsupportedModelError, match=f"with {key}={value!r} is not supported"):
        take_apart(model)


def test_a_product_with_experts_that_has_no_rule_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_decoder("MixtralForCausalLM", dtype=torch.float64).requires_grad_(False)
    decoder = take_apart(model)
    prove_conservation(model, decoder)
    part = type(decoder.layers[0].groups[0].gate.module)
    plain = part.forward
    monkeypatch.setattr(
        part, "forward", lambda self, x, routes: plain(self, x, routes) * x[routes.tokens].std(-1, keepdim=True)
    )
    with pytest.raises(UnsupportedModelError, match=r"lose or gain [0-9.]+% of the logits"):
        prove_conservation(model, decoder)


def test_what_is_beside_experts_and_their_router_is_named() -> None:
    model = random_decoder("MixtralForCausalLM")
    take_apart(model)
    model.model.layers[0].mlp.norm = nn.RMSNorm(8)
    with pytest.raises(UnsupportedModelError, match=r"module model\.layers\.0\.mlp\.norm \(RMSNorm\)"):
        take_apart(model)


@pytest.mark.parametrize("change", [{"has_bias": True}, {"is_concatenated": False}])
def test_experts_of_another_form_have_no_rules(change: dict[str, bool]) -> None:
    model = random_decoder("MixtralForCausalLM")
    vars(model.model.layers[0].mlp.experts).update(change)
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        setattr(model.model.layers[0].mlp.experts, name, torch.zeros(4, 1))
    with pytest.raises(UnsupportedModelError, match=r"MixtralExperts: the rules .* of the form act\(gate\) \* up"):
        take_apart(model)


def test_layers_may_be_dense_or_of_experts() -> None:
    model = random_decoder("Qwen3MoeForCausalLM", mlp_only_layers=[1], dtype=torch.float64).requires_grad_(False)
    decoder = take_apart(model)
    assert [[group.of_experts for group in layer.groups] for layer in decoder.layers] == [[True], [False], [True]]
    prove_conservation(model, decoder)


def test_norms_of_queries_and_keys_may_be_there() -> None:
    without, with_them = (
        len(take_apart(random_decoder("Glm4MoeForCausalLM", use_qk_norm=of)).norms) for of in (False, True)
    )
    assert (without, with_them) == (3 * 2 + 1, 3 * 4 + 1)


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
