"""ModelPasses: runs a model over batches so that methods get its activations and gradients, in as few passes as
possible."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crane_serve.common.models.decoder import Decoder, Group, KnownGroup, KnownLayer
from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.families import decoder_of
from crane_serve.common.models.open_experts import Routes
from relevance.accumulators import FiniteCheck
from relevance.encoding import Batch
from relevance.method import (
    Activations,
    AttributionTarget,
    Gradients,
    Measured,
    OfActivations,
    OfGradients,
    Pass,
    Site,
    Units,
)
from relevance.rules import PLAIN, Rules, propagation
from relevance.targets import log_probabilities, per_document, target_logits

_TARGETS = {AttributionTarget.TARGET_LOGIT: target_logits, AttributionTarget.LOG_PROBABILITY: log_probabilities}
_Deliver = Callable[[Tensor, Tensor | None, Tensor], None]
_Key = TypeVar("_Key")


class Tap(torch.autograd.Function):
    """The identity. In the backward pass it gives the saved tensors and the gradient to `deliver`.

    value: any shape; input_sum: something small to be saved with it, or None. Both are saved as autograd saves
    tensors, so they may be recomputed before the backward pass reaches them.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, input_sum: Tensor | None, deliver: _Deliver) -> Tensor:
        """value: any shape, returned unchanged."""
        ctx.save_for_backward(value, input_sum)
        ctx.deliver = deliver
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """gradient: of the shape of value, given to `deliver` and returned."""
        ctx.deliver(*ctx.saved_tensors, gradient)
        return gradient, None, None


def units_of(decoder: Decoder, outputs: bool = False) -> Units:
    """The units of a model; outputs: include the dimensions of the MLPs' outputs."""
    gated = any(isinstance(layer, KnownLayer) and layer.gated for layer in decoder.layers)
    return Units(decoder.sizes, decoder.embedding.get_parameter("weight").shape[1], gated, outputs)


def by_pass(methods: Sequence[Measured]) -> dict[Pass | None, list[Measured]]:
    """The passes that `methods` need, with the methods that each serves; None is a forward pass without a backward
    pass.

    Methods that listen to activations get those of the first pass, since the rules do not change activations.
    """
    served: dict[Pass | None, list[Measured]] = {}
    for method in methods:
        if isinstance(method.source, Pass):
            served.setdefault(method.source, []).append(method)
    listening = [method for method in methods if isinstance(method, OfActivations)]
    if listening:
        served.setdefault(next(iter(served), None), []).extend(listening)
    return served


class ModelPasses:
    """Runs a model for methods: inside `with ModelPasses(model) as passes:`, `run` gives a batch to them.

    The model must be in evaluation mode (dropout would make the result random); it is unchanged afterwards. With
    `checkpointing` a layer's activations are computed again in the backward pass instead of being kept.

    Raises UnsupportedModelError for a model that is not built as most are, and for rules in one without a family.
    """

    def __init__(self, model: nn.Module, checkpointing: bool = False) -> None:
        self.model = model
        self.decoder = decoder_of(model)
        self.checkpointing = checkpointing
        self.device = self.decoder.unembedding.weight.device
        self._hooks = _Hooks()
        self._open = ExitStack()
        self._rules = ExitStack()
        self._current = PLAIN

    def __enter__(self) -> "ModelPasses":
        with ExitStack() as stack:
            # Before the rules, whose hooks act at the same modules: methods see tensors before the rules do.
            stack.enter_context(self._hooks.installed(self.decoder))
            stack.callback(lambda: self._rules.close())
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()
        self._current = PLAIN

    def run(self, batch: Batch, methods: Sequence[Measured]) -> None:
        """Let `methods` accumulate the model's activations and gradients on `batch`, documents of one language.

        Raises NonFiniteError naming the layer that overflows.
        """
        for wanted, served in by_pass(methods).items():
            if wanted is None:
                self._forward(batch, served)
            else:
                self._backward(batch, served, wanted)

    def _forward(self, batch: Batch, served: Sequence[Measured]) -> None:
        with self._hooks.listening(batch, served, self.device), torch.no_grad():
            last_hidden(self.decoder, self.decoder.embedding(batch.token_ids))
            self._hooks.activations.require("activations")

    def _backward(self, batch: Batch, served: Sequence[Measured], wanted: Pass) -> None:
        self._switch_to(wanted.rules)
        with ExitStack() as stack:
            stack.enter_context(self._hooks.listening(batch, served, self.device))
            if self.checkpointing:
                stack.enter_context(checkpointed(self.decoder, self._hooks.recomputing))
            stack.enter_context(torch.enable_grad())
            embeddings = self.decoder.embedding(batch.token_ids).detach()  # [documents, tokens, hidden]
            hidden = last_hidden(self.decoder, embeddings.requires_grad_())
            self._hooks.activations.require("activations")
            values = _TARGETS[wanted.target](self.decoder, hidden, batch, wanted.rules)
            # Documents do not affect each other, so the gradient of the sum has each document's own gradient.
            total = per_document(values, batch).sum()
            # No method needs gradients below the lowest sites.
            torch.autograd.grad(total, self._hooks.lowest, allow_unused=True)
            self._hooks.gradients.require("gradients", last_first=True)

    def _switch_to(self, rules: Rules) -> None:
        if rules != self._current:
            self._rules.close()
            self._current = PLAIN
            self._rules.enter_context(propagation(self.model, rules))
            self._current = rules


def last_hidden(decoder: Decoder, embeddings: Tensor) -> Tensor:
    """Final hidden states [documents, tokens, hidden] of input embeddings of the same shape, times the scale of logits,
    as the unembedding reads them.

    There is no attention mask: padding stands on the right, where causal attention never looks.
    """
    hidden: Tensor = decoder.trunk(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    if decoder.unembedding.in_features > hidden.shape[-1]:
        hidden = nn.functional.pad(hidden, (0, 1), value=1.0)
    return hidden if decoder.logit_scale == 1 else hidden * decoder.logit_scale


@contextmanager
def checkpointed(
    decoder: Decoder, recomputing: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Iterator[None]:
    """Every decoder layer keeps only its input, and is computed again, inside `recomputing()`, in the backward pass."""

    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            return checkpoint(
                forward,
                *arguments,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), recomputing()),
                **options,
            )

        return run

    blocks = _blocks(decoder)
    try:
        for block in blocks:
            block.forward = wrapped(block.forward)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _blocks(decoder: Decoder) -> list[nn.Module]:
    """The decoder layers as modules."""
    for modules in decoder.trunk.modules():
        if isinstance(modules, nn.ModuleList) and len(modules) == len(decoder.layers):
            pairs = zip(modules, decoder.layers, strict=True)
            if all(any(part is layer.groups[0].down_proj for part in block.modules()) for block, layer in pairs):
                return list(modules)
    raise UnsupportedModelError(f"{type(decoder.trunk).__name__} has no list of its decoder layers")


class _Hooks:
    """Hooks at every MLP that give its tensors to the methods that listen, if any.

    lowest: the tensors of the first layer at which a method listens; activations, gradients: checks that all are
    finite.
    """

    def __init__(self) -> None:
        self._silence()

    def _silence(self) -> None:
        self.batch: Batch | None = None
        self.lowest: list[Tensor] = []
        self._of_activations: list[OfActivations] = []
        self._reads: frozenset[str] = frozenset()
        self._of_gradients: dict[Site, list[OfGradients]] = {}
        self._recomputing = False
        self._kept: dict[str, Tensor] = {}
        # Of layers with several groups of neurons, by layer and place, until all of them are there.
        self._told: dict[int, dict[int, dict[str, Tensor]]] = {}
        self._delivered: dict[tuple[int, Site], dict[int, dict[str, Tensor]]] = {}

    @contextmanager
    def listening(self, batch: Batch, methods: Sequence[Measured], device: torch.device) -> Iterator[None]:
        """Give the tensors of the passes on `batch` to `methods` while the context lasts."""
        self.batch = batch
        self._of_activations = [method for method in methods if isinstance(method, OfActivations)]
        self._reads = frozenset().union(*(method.reads for method in self._of_activations))
        for method in methods:
            if isinstance(method, OfGradients):
                for site in method.wanted:
                    self._of_gradients.setdefault(site, []).append(method)
        layers = max((method.units.layers for method in methods), default=0)
        self.activations, self.gradients = FiniteCheck(layers, device), FiniteCheck(layers, device)
        try:
            yield
        finally:
            self._silence()

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """While a layer is computed again, its activations are not given to methods a second time."""
        self._recomputing = True
        try:
            yield
        finally:
            self._recomputing = False
            self._kept.clear()

    @contextmanager
    def installed(self, decoder: Decoder) -> Iterator[None]:
        with ExitStack() as stack:
            for index, layer in enumerate(decoder.layers):
                for number, group in enumerate(layer.groups):
                    place = _Place(index, number, len(layer.groups), group.of_experts)
                    for module, hook in self._of_group(place, group).items():
                        stack.callback(module.register_forward_hook(hook).remove)
                    before = self._neurons_hook(place)
                    stack.callback(group.down_proj.register_forward_pre_hook(before).remove)
            yield

    def _of_group(self, place: "_Place", group: Group) -> Mapping[nn.Module, Callable[..., Tensor | None]]:
        def act_hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if "act" in self._reads and not self._recomputing:
                self._kept["act"] = place.whole(inputs)(output.detach())

        def down_hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return self._tapped(place, [(Site.OUTPUT, slice(None))], output, inputs[0])

        hooks: dict[nn.Module, Callable[..., Tensor | None]] = {}
        if group.act_fn is not None:
            hooks[group.act_fn] = act_hook
        if place.of == 1 and not group.of_experts:
            hooks[group.down_proj] = down_hook
        return hooks if not isinstance(group, KnownGroup) else self._of_projections(place, group) | hooks

    def _of_projections(self, place: "_Place", group: KnownGroup) -> dict[nn.Module, Callable[..., Tensor | None]]:
        projections = {group.gate.module: [(Site.GATE, group.gate.rows)]}
        if group.up is not None:
            projections.setdefault(group.up.module, []).append((Site.UP, group.up.rows))
        source = group.up or group.gate

        def projection_hook(sites: list[tuple[Site, slice]], up: slice | None) -> Callable[..., Tensor | None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
                whole = place.whole(inputs)
                if up is not None and "up" in self._reads and not self._recomputing:
                    self._kept["up"] = whole(output.detach()[..., up])
                return self._tapped(place, sites, output, inputs[0], whole)

            return hook

        return {
            module: projection_hook(sites, source.rows if module is source.module else None)
            for module, sites in projections.items()
        }

    def _neurons_hook(self, place: "_Place") -> Callable[..., tuple[Any, ...] | None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self.batch is None:
                return None
            value: Tensor = inputs[0]
            if not self._recomputing:
                self.activations.see(place.layer, value)
                self._tell(place, value)
            tapped = self._tapped(place, [(Site.NEURONS, slice(None))], value, None)
            return None if tapped is None else (tapped, *inputs[1:])

        return hook

    def _tell(self, place: "_Place", neurons: Tensor) -> None:
        assert self.batch is not None
        if self._of_activations:
            with torch.no_grad():
                parts = {name: _by_document(part, self.batch) for name, part in self._kept.items()}
                self._kept.clear()
                parts["neurons"] = _by_document(neurons.detach(), self.batch)
                joined = _joined(self._told, place.layer, parts, place)
                if joined is not None:
                    for method in self._of_activations:
                        method.accumulate(Activations(place.layer, self.batch, **joined))

    def _tapped(
        self,
        place: "_Place",
        sites: list[tuple[Site, slice]],
        value: Tensor,
        inputs: Tensor | None,
        whole: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> Tensor | None:
        """`value` behind a Tap if a method listens at one of its `sites`, which are slices of its last dimension.

        inputs: what it was made of, which all groups of a layer read alike; whole: as `_Place.whole` gives it.
        """
        batch = self.batch
        wanted = [(site, rows) for site, rows in sites if self._of_gradients.get(site)]
        if batch is None or not wanted or not value.requires_grad:
            return None
        input_sum = None
        if inputs is not None:
            dtype = torch.promote_types(inputs.dtype, torch.float32)
            input_sum = inputs.detach().sum(dim=-1, dtype=dtype).view(batch.token_ids.shape)  # [documents, tokens]

        def deliver(value: Tensor, input_sum: Tensor | None, gradient: Tensor) -> None:
            self.gradients.see(place.layer, gradient)
            for site, rows in wanted:
                of_group = {"value": value[..., rows], "gradient": gradient[..., rows]}
                parts = {name: _by_document(whole(part), batch) for name, part in of_group.items()}
                joined = _joined(self._delivered, (place.layer, site), parts, place)
                if joined is not None:
                    gradients = Gradients(place.layer, site, batch, **joined, input_sum=input_sum)
                    for method in self._of_gradients[site]:
                        method.accumulate(gradients)

        if place.layer == 0 and not self._recomputing:
            self.lowest.append(value)
        tapped: Tensor = Tap.apply(value, input_sum, deliver)  # type: ignore[no-untyped-call]
        return tapped


@dataclass(frozen=True)
class _Place:
    """A group of neurons: the index of its layer, its number among the layer's groups and how many those are."""

    layer: int
    group: int
    of: int
    of_experts: bool

    def whole(self, inputs: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
        """What makes [tokens, neurons] of what a module that has `inputs` returns for each of the neurons."""
        if not self.of_experts:
            return lambda tensor: tensor
        routes: Routes = inputs[1]
        return routes.spread


def _joined(
    waiting: dict[_Key, dict[int, dict[str, Tensor]]], key: _Key, parts: dict[str, Tensor], place: _Place
) -> dict[str, Tensor] | None:
    """The tensors of all groups of a layer side by side, in the order of the groups; None until all are there."""
    if place.of == 1:
        return parts
    groups = waiting.setdefault(key, {})
    groups[place.group] = parts
    if len(groups) < place.of:
        return None
    in_order = [groups[number] for number in range(place.of)]
    del waiting[key]
    names = set.intersection(*map(set, in_order))  # the activation function of some groups may not be known
    return {name: torch.cat([group[name] for group in in_order], dim=-1) for name in names}


def _by_document(tensor: Tensor, batch: Batch) -> Tensor:
    """The tensor as [documents, tokens, n], also if the MLP has flattened it."""
    return tensor.reshape(*batch.token_ids.shape, -1)
