"""FakeEngine: EngineService's interface without vLLM; deterministic, and it can be told to fail, wait or die."""

import asyncio
import string
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from crane_serve.common.atomic import write_atomically
from crane_serve.common.masks import (
    Fingerprint,
    MaskInfo,
    MaskLibrary,
    NeuronMask,
    ResolvedMask,
    StoredMask,
    UnknownMask,
    encode_mask,
    mask_path,
)
from crane_serve.common.models.prefix import StartTokens
from crane_serve.common.text.tokens import token_texts
from crane_serve.engine.activations import ActivationRequest, Activations, ActivationsOff
from crane_serve.engine.answers import EngineDead, SampledToken, Sampling, Scores, Step, TokenLogprob, TokenScore
from crane_serve.service.api.concurrency import paced
from crane_serve.service.api.openai import ROUTES
from tests.tiny import byte_tokenizer

FINGERPRINT = Fingerprint(
    architecture="TinyForCausalLM",
    layers=2,
    hidden_size=4,
    intermediate_sizes=(6, 5),
    config_digest="a" * 64,
    weights_digest="b" * 64,
)
NEURONS = {
    "attnlrp-en": [[0], [1]],
    "attnlrp-zh": [[1, 2], []],
    "attnlrp-vi": [[], [3, 4]],
    "lape-zh": [[5], []],
}
BROKEN = "broken.safetensors: not a readable mask file"


def library() -> MaskLibrary:
    masks = {}
    for name, neurons in NEURONS.items():
        method, language = name.split("-")
        info = MaskInfo(language=language, method=method, fingerprint=FINGERPRINT, budget=0.25, parameters={"seed": 1})
        masks[name] = StoredMask(name, NeuronMask.switching_off(neurons, FINGERPRINT.intermediate_sizes), info)
    return MaskLibrary(FINGERPRINT, masks, {"broken": BROKEN}, default_method="attnlrp")


# Of each of vLLM's request models, what the tests send.
FIELDS = {
    "/v1/completions": "prompt prompt_embeds suffix echo",
    "/v1/chat/completions": "messages tools response_format max_completion_tokens",
    "/v1/chat/completions/batch": "messages best_of",
    "/v1/responses": "input metadata",
    "/v1/messages": "messages system metadata",
    "/inference/v1/generate": "token_ids sampling_params",
    "/tokenize": "prompt messages add_special_tokens",
    "/detokenize": "tokens",
    "/v1/messages/count_tokens": "messages",
}
SAMPLING = "n max_tokens temperature top_p top_k seed stop logprobs stream use_beam_search vllm_xargs model user"


def openai_fields() -> dict[str, dict[str, frozenset[str]]]:
    fields = {
        path: {"": frozenset(f"{FIELDS[path.removesuffix('/render')]} {SAMPLING}".split())}
        for path, method in ROUTES.items()
        if method == "POST"
    }
    fields["/inference/v1/generate"]["sampling_params"] = frozenset(["n", "max_tokens", "extra_args"])
    return fields


@dataclass(frozen=True)
class Call:
    """One request that reached the engine. first: where scoring begins; candidates: after `token_ids`, if scored."""

    token_ids: list[int]
    mask: ResolvedMask | None
    sampling: Sampling | None = None
    stream: bool = False
    first: int = 0
    candidates: tuple[int, ...] = ()
    activations: ActivationRequest | None = None

    @property
    def scored(self) -> list[int]:
        """All tokens."""
        return [*self.token_ids, *self.candidates]


class FakeEngine:
    """Generates the letters a, b, c, ... and scores a token id t with -t nats, twice that under a mask.

    answers: other tokens than the letters, by the name of the mask; token_s: how long each takes.
    """

    model_name = "tiny"
    model_names = ("tiny",)
    max_model_tokens = 512
    kv_cache_tokens: int | None = 4096
    mask_rows = 256

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory  # of saved masks
        self.on_tokens: Callable[[str | None, int, int], object] | None = None
        self.mask_rows_used = 0
        self.library = library()
        self.tokenizer = byte_tokenizer()
        self.configured_bos: int | None = None  # by the model's config
        self.is_dead = False
        self.stopped = False
        self.calls: list[Call] = []
        self.running = 0
        self.aborted = 0
        self.error: Exception | None = None
        self.error_after_tokens = 0
        self.wait_after_tokens: int | None = None
        self.not_greedy: set[int] = set()
        self.answers: Mapping[str | None, Sequence[str]] = {}
        self.token_s = 0.0
        self.has_activations = True
        self.openai_fields = openai_fields()
        self.openai: ASGIApp = JSONResponse({"answered": "by vLLM"})

    def stop(self) -> None:
        self.stopped = True

    def metrics(self) -> bytes:
        return b"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0.0\n"

    @property
    def start_tokens(self) -> StartTokens:
        return StartTokens.of(self.tokenizer, () if self.configured_bos is None else [self.configured_bos])

    async def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] async for text in paced(texts)]

    async def token_texts(self, token_ids: Sequence[int], first: int) -> list[str]:
        await asyncio.sleep(0)
        return token_texts(self.tokenizer, token_ids, first)

    async def put_mask(self, stored: StoredMask, *, save: bool = False) -> None:
        self.library.fingerprint.require(stored.info.fingerprint, f"mask {stored.name!r}")
        await asyncio.sleep(0)
        await self._misbehave(0)
        if save and self.directory is not None:
            path = mask_path(self.directory, stored.name)
            write_atomically(path, encode_mask(stored.name, stored.mask, stored.info))
        self.library.put(stored)

    async def remove_mask(self, name: str, *, save: bool = False) -> None:
        await asyncio.sleep(0)
        await self._misbehave(0)
        if name not in self.library.masks and not (save and name in self.library.invalid):
            raise UnknownMask(f"unknown mask {name!r}; this server has {', '.join(self.library.masks)}")
        if save and self.directory is not None:
            mask_path(self.directory, name).unlink(missing_ok=True)
        self.library.discard(name)

    @asynccontextmanager
    async def row(self, mask: ResolvedMask | None) -> AsyncIterator[None]:
        self.mask_rows_used += mask is not None
        try:
            yield
        finally:
            self.mask_rows_used -= mask is not None

    def show(self, request: ActivationRequest | None, prompt: int, tokens: int) -> Activations | None:
        """Values that say where they are: the layer, plus a tenth per neuron, plus 100 per position."""
        if request is None:
            return None
        if not self.has_activations:
            raise ActivationsOff("the server was started without activations")
        request.require(FINGERPRINT, prompt, tokens)
        end = tokens if request.end is None else min(tokens, request.end)
        values = {}
        for layer, neurons in request.neurons.items():
            chosen = range(FINGERPRINT.intermediate_sizes[layer]) if neurons is None else neurons
            rows = np.array(
                [[layer + n / 10 + 100 * at for n in chosen] for at in range(request.first, end)], np.float32
            )
            reduced = {str(name): rows.max(axis=0) for name in request.reductions}
            values[layer] = reduced or {"values": rows}
        return Activations(request.first, end - request.first, values)

    async def generate(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        mask: ResolvedMask | None,
        *,
        stream: bool,
        activations: ActivationRequest | None = None,
    ) -> AsyncGenerator[Step]:
        self.calls.append(Call(prompt_ids, mask, sampling, stream, activations=activations))
        seen = self.show(activations, len(prompt_ids), len(prompt_ids) + sampling.max_tokens - 1)
        self.running += 1
        done = False
        text: list[str] = []
        tokens: list[SampledToken] = []
        written = self.answers.get(None if mask is None else mask.name, string.ascii_lowercase)
        try:
            for index in range(sampling.max_tokens):
                await asyncio.sleep(self.token_s)
                await self._misbehave(index)
                token, last = written[index % len(written)], index + 1 == sampling.max_tokens
                text.append(token)
                token_ids = self.tokenizer(token, add_special_tokens=False)["input_ids"]
                chosen = TokenLogprob(token_ids[0] if len(token_ids) == 1 else index, token, -0.5)
                tokens.append(SampledToken(chosen, (chosen,) * (sampling.logprobs or 0)))
                if stream or last:
                    logprobs = None if sampling.logprobs is None else tuple(tokens)
                    done = last
                    yield Step("".join(text), len(text), "length" if last else None, logprobs, seen if last else None)
                    text, tokens = [], []
        finally:
            self.running -= 1
            self.aborted += not done
            if self.on_tokens is not None:
                self.on_tokens(None if mask is None else mask.name, len(prompt_ids), index + 1)

    async def score(
        self,
        prompt_ids: list[int],
        candidates: Sequence[int],
        mask: ResolvedMask | None,
        *,
        first: int = 1,
        activations: ActivationRequest | None = None,
    ) -> Scores:
        self.calls.append(Call(prompt_ids, mask, first=first, candidates=tuple(candidates), activations=activations))
        await asyncio.sleep(0)
        await self._misbehave(0)
        factor = 1 if mask is None else 2

        def score(token_id: int) -> TokenScore:
            return TokenScore(-float(factor * token_id), token_id not in self.not_greedy)

        tokens, last = tuple(map(score, prompt_ids[first:])), tuple(map(score, candidates))
        seen = self.show(activations, len(prompt_ids), len(prompt_ids))
        return Scores(tokens, last, len(prompt_ids) - 1, 1, seen)

    async def _misbehave(self, index: int) -> None:
        if self.is_dead:
            raise EngineDead("the engine has died")
        if self.error is not None and index >= self.error_after_tokens:
            raise self.error
        if self.wait_after_tokens is not None and index >= self.wait_after_tokens:
            await asyncio.Event().wait()
