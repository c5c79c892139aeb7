"""Plain transformers with the masks as hooks: `python -m crane_serve.verify.reference PLAN` writes a Reference."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crane_serve.common.masks import Fingerprint, MaskLibrary, NeuronMask
from crane_serve.common.models.errors import UnsupportedModelError
from crane_serve.common.models.experts import expert_modules
from crane_serve.common.models.load import load_causal_lm, load_tokenizer
from crane_serve.common.models.mlps import language_model, require_mlps
from crane_serve.common.models.routers import find_routers, kept_from
from crane_serve.common.models.vocabulary import require_known
from crane_serve.verify import probes
from crane_serve.verify.plan import Outcome, ProcessPlan, Reference, describe

_FLOAT32_PARAMETERS = 1_000_000_000
_USER_MASKS = 3  # of the user's masks


def measure_reference(plan: ProcessPlan) -> Reference:
    """Score the texts of `probes` under the plan's masks.

    Raises UnsupportedModelError for a model with other MLPs, CheckpointError for one that transformers cannot load
    whole.
    """
    assert plan.masks is not None
    library = MaskLibrary.load(plan.directory, Fingerprint.of(plan.model))
    tokenizer = load_tokenizer(plan.model, trust_remote_code=plan.trust_remote_code)
    model: Any = load_causal_lm(plan.model, "auto", trust_remote_code=plan.trust_remote_code)
    gpu, low = torch.cuda.is_available(), model.dtype
    if plan.float32 or not gpu or sum(p.numel() for p in model.parameters()) < _FLOAT32_PARAMETERS:
        model.float()
    model.to("cuda" if gpu else "cpu")
    parts = _parts(model, plan.fingerprint)
    texts = tuple(tuple(tokenizer.encode(text)) for text in probes.TEXTS)
    for number, text in enumerate(texts, start=1):
        require_known(tokenizer, text, len(model.get_input_embeddings().weight), f"text {number} of the check")
    masks: list[str | None] = [None, *plan.masks.random, *plan.masks.from_user[:_USER_MASKS]]

    def scores() -> tuple[tuple[tuple[float, ...], ...], ...]:
        scaled = [None if name is None else library.masks[name].mask for name in masks]
        return tuple(tuple(_score(model, parts, text, mask) for text in texts) for mask in scaled)

    dtype, logprobs, rounded = model.dtype, scores(), None
    if dtype == torch.float32 and not plan.float32:
        model.to(low if low != torch.float32 else torch.bfloat16)
        rounded = scores()
    return Reference(
        dtype=str(dtype).removeprefix("torch."), texts=texts, masks=tuple(masks), logprobs=logprobs, rounded=rounded
    )


@dataclass(frozen=True)
class _Part:
    """Neurons of a layer: those that a projection reads, or, if it holds experts, all of theirs. columns: which.

    router: of the experts.
    """

    layer: int
    columns: slice
    module: Any
    router: nn.Module | None = None


def _parts(model: nn.Module, fingerprint: Fingerprint) -> list[_Part]:
    decoder, dense, experts = language_model(model), fingerprint.dense_sizes, fingerprint.experts
    mlps = require_mlps(decoder, dense, beside_experts=experts is not None)
    parts = [_Part(layer, slice(0, dense[layer]), mlp.projection) for layer, mlp in mlps.items()]
    if experts is not None:
        routers = find_routers(decoder)
        for layer, module in expert_modules(decoder).items():
            if not hasattr(module, "is_transposed"):
                raise UnsupportedModelError(f"{type(module).__name__} does not say how its weights are laid out")
            columns = experts.columns(layer, fingerprint.intermediate_sizes)
            parts.append(_Part(layer, columns, module, routers[layer]))
    return parts


@contextmanager
def _masked(parts: list[_Part], mask: NeuronMask | None) -> Iterator[None]:
    with ExitStack() as stack:
        for part in parts if mask is not None else ():
            assert mask is not None
            scale = mask.intermediate[part.layer, part.columns]  # [neurons]
            if part.router is not None:
                stack.enter_context(_experts_masked(part.module, scale))
                if mask.router is not None:
                    stack.enter_context(kept_from(part.router, mask.router[part.layer]))
                continue
            hook = part.module.register_forward_pre_hook(lambda _, args, s=scale: (args[0] * s.to(args[0]),))
            stack.callback(hook.remove)
            if mask.output is not None:
                output = mask.output[part.layer]  # [hidden]
                hook = part.module.register_forward_hook(lambda _, __, out, s=output: out * s.to(out))
                stack.callback(hook.remove)
        yield


@contextmanager
def _experts_masked(experts: Any, scale: Tensor) -> Iterator[None]:
    """While the experts compute, the weights that read their neurons are scaled. scale: [experts * neurons]."""
    whole = experts.down_proj.data  # [experts, hidden, neurons], the last two exchanged in some models
    by_expert = scale.view(len(whole), -1).to(whole)  # [experts, neurons]
    factors = by_expert.unsqueeze(2 if experts.is_transposed else 1)

    def before(*_: Any) -> None:
        experts.down_proj.data = whole * factors

    def after(*_: Any) -> None:
        experts.down_proj.data = whole

    hooks = experts.register_forward_pre_hook(before), experts.register_forward_hook(after, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def _score(model: Any, parts: list[_Part], text: tuple[int, ...], mask: NeuronMask | None) -> tuple[float, ...]:
    ids = torch.tensor([text], device=model.device)  # [1, tokens]
    with _masked(parts, mask):
        logits: Tensor = model(ids).logits[0].float()  # [tokens, vocabulary]
    logprobs = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]  # [tokens - 1]
    return tuple(logprobs.tolist())


def main(plan_file: str) -> int:
    """Score and record; returns the exit code."""
    plan = ProcessPlan.load(Path(plan_file))
    try:
        Outcome(plan.outcome).record(reference=measure_reference(plan))
    except Exception as error:  # a model that does not fit, or that transformers does not know
        Outcome(plan.outcome).record(error=describe(error))
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
