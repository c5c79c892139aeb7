"""One engine in a process of its own: reads a line of JSON per job from stdin, answers with a line of JSON on stdout.

    python benchmarks/worker.py '{"kind": "vllm", "model": "...", "masks": "...", "eager": false, "concurrency": 32}'

Kinds of engine:
- vllm: vLLM's offline engine, with or without the plugin as the environment says. Masks travel with each request.
- patched: the same, eager and without the plugin. One mask at a time is patched into the whole model.
- transformers: `generate` on one padded batch at a time, one mask at a time through hooks.

A job is `{"passes": [...], "max_tokens", "score", "answers", "positions"}`. Its passes run one after another; a pass is
`{"prompts": [token ids, ...], "masks": [name or null, ...], "mask": name or null}`, where `masks` (one per request) is
for vllm and `mask` (one per pass) for the other two. The answer holds seconds and latencies, all counted from the
start of the job.
"""

import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MAX_MODEL_LEN, MAX_BATCHED_TOKENS = 512, 2048

Job = dict[str, Any]
Pass = dict[str, Any]
Answer = list[tuple[int, float]]  # of one request: token and log-probability, step by step


class Latencies:
    """Times to the first token, and between tokens, of the requests of one job."""

    def __init__(self) -> None:
        self.first_s: list[float] = []
        self.between_s: list[float] = []

    def add(self, first_s: float, rest_s: float, tokens: int) -> None:
        """One request: seconds from the start of the job to its first token, and from there to its last."""
        self.first_s.append(first_s)
        if tokens > 1:
            self.between_s.append(rest_s / (tokens - 1))

    def summary(self) -> dict[str, float | None]:
        return {
            "ttft_s": statistics.median(self.first_s),
            "ttft_max_s": max(self.first_s),
            "tpot_s": statistics.median(self.between_s) if self.between_s else None,
        }


class VllmEngine:
    """vLLM's offline engine. Front end, engine core and worker share this process, so batches are deterministic."""

    def __init__(self, model: str, *, eager: bool, concurrency: int) -> None:
        from vllm import LLM

        self.llm = LLM(
            model,
            dtype="bfloat16",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=concurrency,
            max_num_batched_tokens=MAX_BATCHED_TOKENS,
            enable_prefix_caching=False,
            enforce_eager=eager,
            disable_log_stats=False,
        )

    def run(self, job: Job, work: Pass, since: float, latencies: Latencies) -> list[Answer]:
        """Run one pass; its answers are empty unless the job asks for them."""
        from vllm import SamplingParams

        positions = {"crane_positions": job["positions"]} if job.get("positions") else {}
        parameters = [
            SamplingParams(
                temperature=0,
                max_tokens=job["max_tokens"],
                ignore_eos=True,
                prompt_logprobs=0 if job.get("score") else None,
                logprobs=0 if job.get("answers") else None,
                extra_args=None if mask is None else {"crane_mask": mask, **positions},
            )
            for mask in work.get("masks") or [None] * len(work["prompts"])
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in work["prompts"]]
        began = time.perf_counter() - since
        answers: list[Answer] = []
        for result in self.llm.generate(prompts, parameters, use_tqdm=False):
            output, metrics = result.outputs[0], result.metrics
            if len(output.token_ids) != job["max_tokens"]:
                raise RuntimeError(f"a request gave {len(output.token_ids)} tokens, expected {job['max_tokens']}")
            waited = began + metrics.first_token_latency
            latencies.add(waited, metrics.last_token_ts - metrics.first_token_ts, len(output.token_ids))
            if job.get("answers"):
                steps = zip(output.token_ids, output.logprobs, strict=True)
                answers.append([(token, step[token].logprob) for token, step in steps])
        return answers


class PatchedEngine(VllmEngine):
    """vLLM without the plugin whose MLPs are replaced, for all requests alike, by ones that drop a mask's neurons."""

    def __init__(self, model: str, masks: Path, *, concurrency: int) -> None:
        super().__init__(model, eager=True, concurrency=concurrency)
        self._masks = masks

    def run(self, job: Job, work: Pass, since: float, latencies: Latencies) -> list[Answer]:
        mask = work.get("mask")
        neurons = None if mask is None else _neurons(self._masks, mask)
        self.llm.apply_model(functools.partial(patch_mlps, neurons=neurons))
        return super().run(job, work, since, latencies)


def patch_mlps(model: nn.Module, neurons: list[Tensor] | None) -> int:
    """Replace the forward of every gated MLP by one that zeroes `neurons[layer]`, or put the original back for None."""
    mlps = [m for m in model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "down_proj")]
    if not mlps or (neurons is not None and len(mlps) != len(neurons)):
        raise RuntimeError(f"found {len(mlps)} gated MLPs, expected one for each layer")
    for layer, mlp in enumerate(mlps):
        mlp.__dict__.pop("forward", None)
        if neurons is not None:
            mlp.forward = functools.partial(_forward_without, mlp, neurons[layer])
    return len(mlps)


def _forward_without(mlp: Any, neurons: Tensor, x: Tensor) -> Tensor:
    """The MLP with `neurons` switched off."""
    gate_up, _ = mlp.gate_up_proj(x)  # [tokens, 2 * neurons]
    activations = mlp.act_fn(gate_up).index_fill_(-1, neurons, 0.0)
    return mlp.down_proj(activations)[0]


class TransformersEngine:
    """`generate` of transformers on batches padded on the left, and a hook before every `down_proj`."""

    def __init__(self, model: str, masks: Path, *, concurrency: int) -> None:
        from crane_serve.common.models.load import load_causal_lm, load_tokenizer

        self.model: Any = load_causal_lm(Path(model), torch.bfloat16)
        self.tokenizer = load_tokenizer(Path(model))
        self.concurrency = concurrency
        self._masks = masks
        modules = self.model.named_modules()
        self._projections = [module for name, module in modules if name.endswith("mlp.down_proj")]

    @torch.inference_mode()
    def run(self, job: Job, work: Pass, since: float, latencies: Latencies) -> list[Answer]:
        """Run one pass in batches of at most `concurrency`. Gives tokens without log-probabilities (as 0.0)."""
        answers: list[Answer] = []
        hooks = self._hook(work.get("mask"))
        try:
            for batch in _chunks(work["prompts"], self.concurrency):
                answers += self._generate(batch, job["max_tokens"], since, latencies)
        finally:
            for hook in hooks:
                hook.remove()
        return answers if job.get("answers") else []

    def _hook(self, mask: str | None) -> list[Any]:
        if mask is None:
            return []
        neurons = _neurons(self._masks, mask)
        if len(neurons) != len(self._projections):
            raise RuntimeError(f"found {len(self._projections)} projections, expected {len(neurons)}")
        hooks = []
        for projection, off in zip(self._projections, neurons, strict=True):
            scale = torch.ones(projection.in_features, dtype=torch.bfloat16).index_fill_(0, off, 0.0)
            hooks.append(projection.register_forward_pre_hook(lambda _, args, s=scale: (args[0] * s,)))
        return hooks

    def _generate(self, prompts: list[list[int]], tokens: int, since: float, latencies: Latencies) -> list[Answer]:
        from transformers import StoppingCriteriaList

        width, pad = max(map(len, prompts)), self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])  # [requests, width]
        attention = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        times: list[float] = []

        def note_time(*_: Any, **__: Any) -> Tensor:
            times.append(time.perf_counter() - since)
            return torch.zeros(len(prompts), dtype=torch.bool)

        output = self.model.generate(
            ids,
            attention_mask=attention,
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([note_time]),
        )[:, width:]
        self.tokenizer.batch_decode(output)  # vLLM gives text, too
        for _ in prompts:
            latencies.add(times[0], times[-1] - times[0], tokens)
        return [[(token, 0.0) for token in row] for row in output.tolist()]


@functools.lru_cache(maxsize=512)
def _neurons(masks: Path, name: str) -> list[Tensor]:
    """Per layer the indices of the neurons that a mask switches off."""
    from crane_serve.common.masks import read_mask

    mask = read_mask(masks / f"{name}.safetensors").mask
    return [torch.tensor(neurons, dtype=torch.int64) for neurons in mask.neuron_sets()]


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _busy_cpu_s() -> float:
    """Seconds for which this machine's cores have been busy, with whatever (Linux; else 0)."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return 0.0
    ticks = [int(field) for field in fields]  # user, nice, system, idle, iowait, irq, softirq, steal
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def work(engine: Any, job: Job) -> dict[str, Any]:
    """Run the passes of one job and say how long they took, and what else kept the machine busy meanwhile."""
    latencies, answers = Latencies(), []
    busy, own = _busy_cpu_s(), time.process_time()
    began = time.perf_counter()
    for one in job["passes"]:
        answers += engine.run(job, one, began, latencies)
    seconds = time.perf_counter() - began
    own, busy = time.process_time() - own, _busy_cpu_s() - busy
    requests = [prompt for one in job["passes"] for prompt in one["prompts"]]
    return {
        "seconds": seconds,
        "passes": len(job["passes"]),
        "prompt_tokens": sum(map(len, requests)),
        "output_tokens": len(requests) * job["max_tokens"],
        **latencies.summary(),
        "cpu_s": own,
        "others_cpu_s": max(0.0, busy - own),
        "answers": answers,
    }


def start(settings: dict[str, Any]) -> Any:
    """The engine that `settings` describe."""
    masks, concurrency = Path(settings["masks"]), settings["concurrency"]
    kinds: dict[str, Callable[[], Any]] = {
        "vllm": lambda: VllmEngine(settings["model"], eager=settings.get("eager", False), concurrency=concurrency),
        "patched": lambda: PatchedEngine(settings["model"], masks, concurrency=concurrency),
        "transformers": lambda: TransformersEngine(settings["model"], masks, concurrency=concurrency),
    }
    return kinds[settings["kind"]]()


def main() -> None:
    # Answers go to the original stdout; everything that libraries print goes to stderr, the log.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engine = start(json.loads(sys.argv[1]))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = work(engine, json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
