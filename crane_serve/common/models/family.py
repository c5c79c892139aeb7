"""Family: the locations of a decoder's parts in the models of one architecture. It has names only and imports no
model."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class NormKind:
    """The normalisation of an architecture: y = (offset + weight) * x' / sqrt(mean(x'^2) + epsilon), perhaps plus a
    bias.

    epsilon: the attribute that holds it, or the number itself where none does; centred: x' is x minus its mean
    (LayerNorm), else x (RMSNorm). weightless: the norms that have no weight, which counts as 1, by the end of their
    paths; "*" for all.
    """

    epsilon: str | float
    offset: float = 0.0
    centred: bool = False
    weightless: tuple[str, ...] = ()


RMS_NORM = NormKind(epsilon="variance_epsilon")
LAYER_NORM = NormKind(epsilon="eps", centred=True)


@dataclass(frozen=True)
class Family:
    """Module paths of one architecture, the defaults being Llama's.

    architectures: class names of its models in transformers.
    `layer_norms` and the paths from `query` to `shared_gate` are relative to a decoder layer, the others to the whole
    model. Norms that a model lacks are left out. Paths that coincide among query, key and value, or gate and up, name
    one fused module, whose outputs stand in that order. up: None where the MLP is not gated, `gate` then being its
    first linear layer.
    Experts and routers are found by their structure. shared: shared experts, an MLP whose parts are called as those of
    a dense one, and which reads what the experts read; shared_gate: the projection to what it is weighted by.
    positions: learned position embeddings, if there are any. linear: class name of the projections inside a layer.
    attention_softcap, final_softcap: config keys of the caps c in c tanh(z / c), at attention scores and at logits.
    attention: the only attention implementation of transformers that computes this family's function, where it is
    not its default. refused: config key -> the value that it must have unless it is absent or None.
    beside: modules that read something else than text; nothing in them is looked at.
    """

    architectures: tuple[str, ...]
    norm: NormKind
    layer_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str | None = "mlp.up_proj"
    act_fn: str = "mlp.act_fn"
    down: str = "mlp.down_proj"
    shared: str | None = None
    shared_gate: str | None = None
    trunk: str = "model"
    embedding: str = "model.embed_tokens"
    positions: str | None = None
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    unembedding: str = "lm_head"
    linear: str = "Linear"
    attention_softcap: str | None = None
    final_softcap: str | None = None
    attention: str | None = None
    refused: Mapping[str, object] = field(default_factory=dict)
    beside: tuple[str, ...] = ()

    def inside(self, *architectures: str, path: str = "model.language_model", beside: tuple[str, ...]) -> "Family":
        """The same decoder, at `path` of models that read more than text."""
        return replace(
            self,
            architectures=architectures,
            trunk=path,
            embedding=path + self.embedding.removeprefix("model"),
            layers=path + self.layers.removeprefix("model"),
            final_norm=path + self.final_norm.removeprefix("model"),
            beside=beside,
        )

    @property
    def of_shared(self) -> "Family":
        """With the parts of shared experts in the place of those of the dense MLP."""
        gate, act_fn, down = (f"{self.shared}.{_name(path)}" for path in (self.gate, self.act_fn, self.down))
        up = None if self.up is None else f"{self.shared}.{_name(self.up)}"
        return replace(self, gate=gate, up=up, act_fn=act_fn, down=down)


def _name(path: str) -> str:
    return path.rpartition(".")[2]
