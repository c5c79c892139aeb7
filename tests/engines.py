"""Real engines for tests: checkpoints, random masks, server processes, and a plain transformers oracle."""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from crane_serve.common.masks import Fingerprint, MaskInfo, MaskLibrary, NeuronMask, Positions, write_mask
from crane_serve.common.models.mlps import language_model
from crane_serve.common.models.routers import find_routers, kept_from
from tests.experts import dense_by_layer, experts_by_layer, experts_changed
from tests.runners import INTERPRETED
from tests.tiny import mlp_projections

if TYPE_CHECKING:
    from crane_serve.common.masks import Composition

START_TIMEOUT_S = 1200 if INTERPRETED else 420


def random_masks(checkpoint: Path, directory: Path, *, share: float, offsets: bool = False) -> MaskLibrary:
    """Write masks attnlrp-en, -zh and -vi that switch off a random `share` of each layer's neurons; in a mixture of
    experts the last also one expert in each layer. offsets: -zh puts other values in the place of its neurons."""
    fingerprint = Fingerprint.of(checkpoint)
    for seed, language in enumerate(("en", "zh", "vi")):
        draw = random.Random(seed)
        neurons = [draw.sample(range(size), round(share * size)) for size in fingerprint.intermediate_sizes]
        mask = NeuronMask.switching_off(neurons, fingerprint.intermediate_sizes)
        if language == "vi" and fingerprint.experts is not None:
            router = torch.ones(fingerprint.layers, fingerprint.experts.count)
            for layer in fingerprint.experts.layers:
                router[layer, draw.randrange(fingerprint.experts.count)] = 0
            mask = NeuronMask(mask.intermediate, mask.intermediate_sizes, router=router)
        if language == "zh" and offsets:
            values = torch.randn(mask.intermediate.shape, generator=torch.Generator().manual_seed(seed)) / 2
            mask = NeuronMask(mask.intermediate, mask.intermediate_sizes, offset=(1 - mask.intermediate) * values)
        info = MaskInfo(language=language, method="attnlrp", fingerprint=fingerprint)
        write_mask(directory, f"attnlrp-{language}", mask, info)
    return MaskLibrary.load(directory, fingerprint, "attnlrp")


def add_output_mask(library: MaskLibrary, directory: Path) -> MaskLibrary:
    """Copy a library to `directory`, with a mask attnlrp-out that scales neurons and MLP output dimensions."""
    for stored in library.masks.values():
        write_mask(directory, stored.name, stored.mask, stored.info)
    fingerprint = library.fingerprint
    draw = torch.Generator().manual_seed(0)
    output = (torch.rand(fingerprint.layers, fingerprint.hidden_size, generator=draw) > 0.2).float()
    mask = NeuronMask(library.get("attnlrp-en").mask.intermediate, fingerprint.intermediate_sizes, output)
    write_mask(directory, "attnlrp-out", mask, MaskInfo(language="out", method="attnlrp", fingerprint=fingerprint))
    return MaskLibrary.load(directory, fingerprint, "attnlrp")


def masked_tokens(positions: Positions, token_ids: Sequence[int], prompt_tokens: int) -> list[int]:
    """Which tokens of a whole sequence a mask is for, by index: from the definition, token by token."""
    indices = list(range(len(token_ids)))
    prompt, generated = indices[:prompt_tokens], indices[prompt_tokens:]
    masked = [] if positions.prompt is None else prompt[slice(*positions.prompt)]
    masked += [] if positions.generated is None else generated[slice(*positions.generated)]
    for count, index in enumerate(masked, start=1):
        if token_ids[index] in positions.until:
            return masked[:count]
    return masked


Masked = slice | Sequence[int]
_ACTS = ("act_fn", "act", "activation_fn")
_UPS = ("up_proj", "c_fc", "fc1", "dense_h_to_4h", "gate_up_proj")


class Oracle:
    """Plain transformers in float32, with scales applied by hooks on the input of down_proj and on the MLP's output."""

    def __init__(self, checkpoint: Path, kind: type = AutoModelForCausalLM) -> None:
        self.model = kind.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    @contextmanager
    def _masked(self, mask: "NeuronMask | Composition | None", masked: Masked):
        """Scale the MLPs' inputs and outputs at the token positions `masked`."""
        if mask is not None and not isinstance(mask, NeuronMask):
            mask = mask.whole()

        def per_token(scale: torch.Tensor, tokens: int, otherwise: float = 1.0) -> torch.Tensor:
            scales = torch.full((tokens, len(scale)), otherwise)
            scales[masked] = scale
            return scales

        def changed(neurons: torch.Tensor, layer: int, columns: slice = slice(None)) -> torch.Tensor:
            """neurons: [..., tokens, neurons]."""
            flat, scale = neurons.flatten(0, -2), mask.intermediate[layer, columns]
            flat = flat * per_token(scale, len(flat))
            if mask.offset is not None:
                flat = flat + per_token(mask.offset[layer, columns], len(flat), 0.0)
            return flat.view_as(neurons)

        experts = experts_by_layer(self.model)
        if mask is not None and experts:
            with self._masked_experts(mask, experts, changed, masked):
                yield
            return
        hooks = []
        for index, (mlp, projection) in enumerate(mlp_projections(self.model) if mask is not None else ()):
            columns = slice(0, mask.intermediate_sizes[index])
            hooks.append(
                projection.register_forward_pre_hook(
                    lambda _, args, layer=index, columns=columns: (changed(args[0], layer, columns),)
                )
            )
            if mask.output is not None:
                output = mask.output[index]
                hooks.append(
                    mlp.register_forward_hook(lambda *args, s=output: args[2] * per_token(s, args[2].shape[-2]))
                )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _masked_experts(
        self, mask: NeuronMask, experts: Mapping[int, torch.nn.Module], changed: Callable, masked: Masked
    ):
        dense, routers = dense_by_layer(self.model), find_routers(language_model(self.model))
        with ExitStack() as stack:
            for layer, size in enumerate(mask.intermediate_sizes):
                width = dense[layer].in_features if layer in dense else 0
                if layer in dense:

                    def hook(_, args, layer=layer, width=width):
                        return changed(args[0], layer, slice(0, width))

                    stack.callback(dense[layer].register_forward_pre_hook(hook).remove)
                if layer in experts:
                    change = partial(changed, layer=layer, columns=slice(width, size))
                    stack.enter_context(experts_changed(experts[layer], change))
                if mask.router is not None and layer in experts:
                    assert masked == slice(None), "routers of some tokens only are not tested"
                    stack.enter_context(kept_from(routers[layer], mask.router[layer]))
            yield

    @torch.no_grad()
    def logprobs(
        self, token_ids: Sequence[int], mask: "NeuronMask | Composition | None", masked: Masked = slice(None)
    ) -> list[float]:
        """Log-probability in nats of each token after the first, with the mask at the token positions `masked`."""
        ids = torch.tensor([list(token_ids)])
        with self._masked(mask, masked):
            logprobs = self.model(ids).logits[0].log_softmax(-1)
        return logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()

    def neurons(self, token_ids: Sequence[int], mask: "NeuronMask | Composition | None") -> torch.Tensor:
        """The inputs of down_proj before the mask, as they are under it: [layers, tokens, neurons]."""
        rows: list[torch.Tensor] = []
        hooks = [
            projection.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2).clone()))
            for _, projection in mlp_projections(self.model)
        ]
        self._run_with(hooks, token_ids, mask)
        return torch.stack(rows)

    def gates(
        self, token_ids: Sequence[int], mask: "NeuronMask | Composition | None"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """act(gate), and what the up projection returns (without a gate the first linear map), under a mask:
        [layers, tokens, neurons] each."""
        rows: dict[str, list[torch.Tensor]] = {"act": [], "up": []}

        def noted(module: torch.nn.Module, which: str):
            return module.register_forward_hook(lambda *args: rows[which].append(args[2].flatten(0, -2).clone()))

        names = {"act": _ACTS, "up": _UPS}
        hooks = []
        for mlp, _ in mlp_projections(self.model):
            parts = dict(mlp.named_children())
            hooks += [noted(next(parts[name] for name in names[which] if name in parts), which) for which in rows]
        self._run_with(hooks, token_ids, mask)
        acts = torch.stack(rows["act"])
        return acts, torch.stack(rows["up"])[..., -acts.shape[-1] :]  # behind the gate, where one map makes both

    def _run_with(self, hooks: list, token_ids: Sequence[int], mask: "NeuronMask | Composition | None") -> None:
        """A forward pass with hooks, which are removed then. Those that mask are registered later, and run later."""
        try:
            self.logprobs(token_ids, mask)
        finally:
            for hook in hooks:
                hook.remove()

    def text_logprobs(self, text: str, mask: "NeuronMask | Composition | None") -> list[float]:
        return self.logprobs(self.tokenizer(text)["input_ids"], mask)


def same_shares(found: Sequence[float], expected: torch.Tensor, tokens: int) -> bool:
    """Whether shares of tokens at which something is above 0 are the same, but for a few tokens at which it is 0 up to
    rounding. expected: [neurons]."""
    differences = (torch.as_tensor(found, dtype=torch.float64) - expected.double()).abs()
    return bool((differences < 1.01 / tokens).all()) and int((differences > 1e-4).sum()) < 3


class Server:
    """A server process; started at once, waited for on first use.

    command: to which its port is appended; ready: the path that answers when it serves.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], ready: str = "/ready"
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self._command, self._ready = [*command, str(port)], ready
        self._environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **environment}
        self.start()

    @classmethod
    def of(cls, model: Path, masks: Path, log: Path, *flags: str, core: int | str, **environment: str) -> "Server":
        """`crane serve`. core: for its worker, as vLLM binds every worker to the first by default; of ranks, `0|1`."""
        command = [sys.executable, "-m", "crane_serve", "serve", str(model), "--masks", str(masks), *flags, "--port"]
        return cls(command, log, {"VLLM_CPU_OMP_THREADS_BIND": str(core), **environment})

    def start(self) -> None:
        """Start the process; once more under the same address, if it has ended."""
        with self.log.open("ab", buffering=0) as output:
            self.process = subprocess.Popen(
                self._command, stdout=output, stderr=subprocess.STDOUT, env=self._environment
            )

    def wait(self) -> "Server":
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}{self._ready}", timeout=5).is_success:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise RuntimeError(f"the server did not start:\n{self.log.read_text(errors='replace')[-4000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
