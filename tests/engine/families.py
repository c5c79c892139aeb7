"""Generate under masks with every model family: `python families.py CHECKPOINTS OUT [compiled] [gates]`, all in one
process.

CHECKPOINTS holds a directory per family, with its masks in `{family}-masks`; nothing under `tiny` is masked. OUT is
written after each, so that a run after a crash goes on with the next. gates: for engines with gates, and with them
"seen": of a prompt its tokens and what its dense MLPs have of act(gate) and up, by family and layer.
"""

import json
import os
import sys
from pathlib import Path

from offline import KV_BLOCKS, generate, start
from offline import PROMPTS as UNMASKED_PROMPTS

LONG = "A prompt that is longer than one chunk of the prefill, in steps. " * 2
PROMPTS = ["The harbour froze.", "港口结冰了。", LONG]
MASKS = [None, "en", "zh", "vi", "en@0.5,vi"]


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    checkpoints, out = Path(sys.argv[1]), Path(sys.argv[2])
    answers: dict[str, list | dict | str] = json.loads(out.read_text()) if out.exists() else {}
    for masks in sorted(checkpoints.glob("*-masks")):
        family = masks.name.removesuffix("-masks")
        if family in answers:
            continue
        answers[family] = "the process died"
        out.write_text(json.dumps(answers))
        os.environ["CRANE_MASKS"] = str(masks)
        gates = "gates" in sys.argv[3:] and family != "tiny"
        if "gates" in sys.argv[3:]:
            os.environ["CRANE_GATES"] = str(int(gates))
        try:
            settings = {"distributed_executor_backend": "uni", "num_gpu_blocks_override": 2 * KV_BLOCKS}
            llm = start(checkpoints / family, enforce_eager="compiled" not in sys.argv[3:], **settings)
            pairs = [(prompt, mask) for prompt in PROMPTS for mask in MASKS]
            prompts, expressions = zip(*pairs, strict=True)
            if family == "tiny":
                assert "crane" in llm.llm_engine.vllm_config.additional_config
                answers[family] = [generate(llm, [prompt], [None])[0] for prompt in UNMASKED_PROMPTS]
            else:
                generated = generate(llm, list(prompts), list(expressions), score=True)
                backend = {"by_transformers": llm.llm_engine.model_config.using_transformers_backend()}
                answers[family] = [
                    {"mask": mask, **backend, **answer} for (_, mask), answer in zip(pairs, generated, strict=True)
                ]
                if gates:
                    answers.setdefault("seen", {})[family] = seen(llm)
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
        except Exception as error:  # what it has left behind would be in the way of the next
            answers[family] = _said(error)
            out.write_text(json.dumps(answers))
            os.execv(sys.executable, [sys.executable, *sys.argv])
        out.write_text(json.dumps(answers))


def seen(llm) -> dict:
    """In this process: of the last prompt, unmasked."""
    from vllm import SamplingParams

    from crane_serve.engine.activations import TAKE_METHOD, ActivationRequest, Reduction, joined

    fingerprint = llm.llm_engine.vllm_config.additional_config["crane"].library().fingerprint
    sizes = fingerprint.intermediate_sizes
    if fingerprint.experts is not None:
        return {}
    request = ActivationRequest(dict.fromkeys(range(len(sizes))), (Reduction.ACT_POSITIVE, Reduction.UP_MEAN_ABS))
    parameters = SamplingParams(max_tokens=1, extra_args=request.argument("seen"))
    [answer] = llm.generate([LONG], [parameters], use_tqdm=False)
    tokens = answer.prompt_token_ids
    of_workers = getattr(llm.llm_engine.engine_core.engine_core, TAKE_METHOD)("seen", len(tokens))
    values = joined(request, sizes, of_workers).values
    layers = {layer: {name: each.tolist() for name, each in of.items()} for layer, of in values.items()}
    return {"tokens": tokens, "layers": layers}


def _said(error: BaseException) -> str:
    """What an engine that does not start says, without what stands around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
