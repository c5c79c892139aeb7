"""FakeEngine: EngineService's interface without vLLM; deterministic, and it can be told to fail, wait or die."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from crane_serve.engine.service import EngineDead, PromptLogprobs, SampledToken, Sampling, Step, TokenLogprob
from crane_serve.masks import Fingerprint, MaskInfo, MaskLibrary, NeuronMask, ResolvedMask, StoredMask
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


@dataclass(frozen=True)
class Call:
    """One request that reached the engine."""

    token_ids: list[int]
    mask: ResolvedMask | None
    sampling: Sampling | None = None
    stream: bool = False


class FakeEngine:
    """Generates the letters a, b, c, ... and scores a token id t with -t nats, twice that under a mask."""

    model_name = "tiny"
    max_model_tokens = 512

    def __init__(self) -> None:
        self.library = library()
        self.tokenizer = byte_tokenizer()
        self.is_dead = False
        self.stopped = False
        self.calls: list[Call] = []
        self.running = 0
        self.aborted = 0
        self.error: Exception | None = None
        self.error_after_tokens = 0
        self.wait_after_tokens: int | None = None
        self.not_greedy: set[int] = set()

    def stop(self) -> None:
        self.stopped = True

    async def generate(
        self, prompt_ids: list[int], sampling: Sampling, mask: ResolvedMask | None, *, stream: bool
    ) -> AsyncGenerator[Step]:
        self.calls.append(Call(prompt_ids, mask, sampling, stream))
        self.running += 1
        done = False
        text: list[str] = []
        tokens: list[SampledToken] = []
        try:
            for index in range(sampling.max_tokens):
                await asyncio.sleep(0)
                await self._misbehave(index)
                letter, last = chr(ord("a") + index % 26), index + 1 == sampling.max_tokens
                text.append(letter)
                chosen = TokenLogprob(index, letter, -0.5)
                tokens.append(SampledToken(chosen, (chosen,) * (sampling.logprobs or 0)))
                if stream or last:
                    logprobs = None if sampling.logprobs is None else tuple(tokens)
                    done = last
                    yield Step("".join(text), len(text), "length" if last else None, logprobs)
                    text, tokens = [], []
        finally:
            self.running -= 1
            self.aborted += not done

    async def score(self, token_ids: list[int], mask: ResolvedMask | None) -> PromptLogprobs:
        self.calls.append(Call(token_ids, mask))
        await asyncio.sleep(0)
        await self._misbehave(0)
        factor = 1 if mask is None else 2
        scored = token_ids[1:]
        return PromptLogprobs(
            tuple(-float(factor * token_id) for token_id in scored),
            tuple(token_id not in self.not_greedy for token_id in scored),
        )

    async def _misbehave(self, index: int) -> None:
        if self.is_dead:
            raise EngineDead("the engine has died")
        if self.error is not None and index >= self.error_after_tokens:
            raise self.error
        if self.wait_after_tokens is not None and index >= self.wait_after_tokens:
            await asyncio.Event().wait()
