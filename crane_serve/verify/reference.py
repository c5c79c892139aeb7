"""Plain transformers with the masks as hooks: `python -m crane_serve.verify.reference PLAN` writes a Reference."""

import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crane_serve.common.masks import Fingerprint, MaskLibrary, NeuronMask, applied
from crane_serve.common.models.load import load_causal_lm, load_tokenizer
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
    texts = tuple(tuple(tokenizer.encode(text)) for text in probes.TEXTS)
    for number, text in enumerate(texts, start=1):
        require_known(tokenizer, text, len(model.get_input_embeddings().weight), f"text {number} of the check")
    masks: list[str | None] = [None, *plan.masks.random, *plan.masks.from_user[:_USER_MASKS]]

    def scores() -> tuple[tuple[tuple[float, ...], ...], ...]:
        scaled = [None if name is None else library.masks[name].mask for name in masks]
        return tuple(tuple(_score(model, text, mask) for text in texts) for mask in scaled)

    dtype, logprobs, rounded = model.dtype, scores(), None
    if dtype == torch.float32 and not plan.float32:
        model.to(low if low != torch.float32 else torch.bfloat16)
        rounded = scores()
    return Reference(
        dtype=str(dtype).removeprefix("torch."), texts=texts, masks=tuple(masks), logprobs=logprobs, rounded=rounded
    )


@torch.inference_mode()
def _score(model: Any, text: tuple[int, ...], mask: NeuronMask | None) -> tuple[float, ...]:
    ids = torch.tensor([text], device=model.device)  # [1, tokens]
    with applied(model, mask):
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
