"""Drive an EngineService through masks that come and go: `python run_service.py CHECKPOINT MASKS OUT [engine flags]`.

Writes what every request was promised and what it got; test_ranks.py judges. Rows for four masks, eight requests at
once.
"""

import asyncio
import json
import sys
from pathlib import Path

from crane_serve.common.masks import MaskError, MaskFileError, NeuronMask, Positions, StoredMask
from crane_serve.engine.activations import ActivationRequest, Reduction
from crane_serve.engine.answers import Sampling
from crane_serve.engine.configure import EngineConfig, configure_engine
from crane_serve.engine.service import EngineService

MASKS = [None, "en", "zh", "vi", "zh,vi", "en@0.5"]
PROMPTS = [
    "The harbour froze.",
    "港口结冰了。",
    "A prompt that is longer than one chunk of the prefill, in steps. " * 2,
]
ROWS, REQUESTS = 4, 8
REPLACEMENTS = 12
SCALED = 60
CHANGING = "changing"


def content(number: int) -> str:
    """A mask expression whose scales become the content of a name that is replaced over and over."""
    return f"vi@{number / 16!r}"


END_AMONG_MANY = "generated+until=" + ",".join(map(str, range(2, 258, 8)))


class Run:
    def __init__(self, service: EngineService) -> None:
        self.service = service
        self.answers: list[dict] = []
        self.refused: dict[str, str] = {}
        self.shown: list[dict] = []
        library = service.library
        self.contents = {library.resolve(content(n)).mask.whole().digest: content(n) for n in range(REPLACEMENTS + 1)}

    async def generate(
        self,
        prompt: str,
        mask: str | None,
        tokens: int = 6,
        positions: Positions = Positions.ALL,
        *,
        brought: dict | None = None,
    ) -> None:
        """Generate under `mask`. What it is promised is what the name means when the request is made.

        brought: a mask in the request, which does the same.
        """
        resolved = self.service.library.resolve(brought or mask, positions)
        promised = self.contents[resolved.mask.digest] if mask == CHANGING else mask
        prompt_ids = self.service.tokenizer(prompt)["input_ids"]
        sampling = Sampling(max_tokens=tokens, temperature=0.0, top_p=1.0, seed=None, stop=(), logprobs=0)
        steps = [step async for step in self.service.generate(prompt_ids, sampling, resolved, stream=False)]
        chosen = [token.chosen for step in steps for token in step.logprobs]
        self.answers.append(
            {
                "promised": promised,
                "positions": str(positions),
                "prompt": prompt_ids,
                "tokens": [token.token_id for token in chosen],
                "logprobs": [token.logprob for token in chosen],
            }
        )

    async def score(self, prompt: str, mask: str | None, rank: int) -> None:
        prompt_ids = self.service.tokenizer(prompt)["input_ids"]
        resolved = self.service.library.resolve(mask)
        scored = await self.service.score(prompt_ids[:-1], prompt_ids[-1:], resolved, data_parallel_rank=rank)
        logprobs = [token.logprob for token in (*scored.tokens, *scored.candidates)]
        self.answers.append(
            {"promised": mask, "positions": "all", "prompt": prompt_ids[:1], "tokens": prompt_ids[1:]}
            | {"logprobs": logprobs}
        )

    async def show(self, prompt: str, mask: str | None, request: ActivationRequest) -> None:
        """Generate, and keep the activations."""
        prompt_ids = self.service.tokenizer(prompt)["input_ids"]
        sampling = Sampling(max_tokens=6, temperature=0.0, top_p=1.0, seed=None, stop=(), logprobs=0)
        resolved = self.service.library.resolve(mask)
        run = self.service.generate(prompt_ids, sampling, resolved, stream=True, activations=request)
        steps = [step async for step in run]
        tokens = [*prompt_ids, *(token.chosen.token_id for step in steps for token in step.logprobs)]
        assert all(step.activations is None for step in steps[:-1])
        values = {
            layer: {name: array.tolist() for name, array in of_layer.items()}
            for layer, of_layer in steps[-1].activations.values.items()
        }
        self.shown.append({"tokens": tokens, "mask": mask, "values": values})

    async def refuses(self, what: str, action) -> None:
        """Expect an error, and that the engine goes on."""
        try:
            await action
        except (MaskError, MaskFileError, ValueError) as error:
            self.refused[what] = f"{type(error).__name__}: {error}"
        await self.generate(PROMPTS[0], "zh", tokens=2)

    def stored(self, name: str, expression: str) -> StoredMask:
        resolved = self.service.library.resolve(expression)
        return StoredMask(name, resolved.mask.whole(), self.service.library.masks["attnlrp-zh"].info)

    async def everything(self, foreign: StoredMask) -> None:
        service = self.service
        ranks = range(service.data_parallel_ranks)
        await asyncio.gather(*(self.score(p, m, rank) for p in PROMPTS for m in MASKS[:4] for rank in ranks))
        for mask in MASKS[4:]:
            await asyncio.gather(*(self.score(prompt, mask, rank) for prompt in PROMPTS for rank in ranks))

        # Neurons of both halves, and of both stages.
        every = ActivationRequest({0: None, 1: (159, 3, 80, 79), 2: (1, 158)})
        means = ActivationRequest({2: None, 0: (100, 5)}, tuple(Reduction))
        await asyncio.gather(*(self.show(p, m, of) for p in PROMPTS for m in ("zh", None) for of in (every, means)))

        # A name is replaced over and over while requests that use it come and go.
        await service.put_mask(self.stored(CHANGING, content(0)))
        changing = True

        async def stream(number: int) -> None:
            while changing:
                await self.generate(f"{number}: {PROMPTS[number % len(PROMPTS)]}", CHANGING, tokens=8)

        streams = [asyncio.create_task(stream(number)) for number in range(2)]
        for number in range(1, REPLACEMENTS + 1):
            answered = len(self.answers)
            # Then a stream has gone on with the content that is there now; one that has failed says so below.
            while len(self.answers) == answered and not any(stream.done() for stream in streams):
                await asyncio.sleep(0.05)
            await service.put_mask(self.stored(CHANGING, content(number)))
            assert self.contents[service.library.get(CHANGING).mask.digest] == content(number)
        changing = False
        await asyncio.gather(*streams)

        # A mask is removed while a request runs under it; its digest goes with it.
        digest = service.library.get(CHANGING).mask.digest
        long = asyncio.create_task(self.generate(PROMPTS[2], CHANGING, tokens=300))
        await asyncio.sleep(0.1)
        await service.remove_mask(CHANGING)
        self.refused["in use"] = "kept" if digest in service.library and not long.done() else "forgotten"
        await self.refuses("removed name", self.generate(PROMPTS[0], CHANGING))
        await self.refuses("removed digest", self.generate(PROMPTS[0], digest))
        await long
        for _ in range(50):
            if digest not in service.library:
                break
            await asyncio.sleep(0.1)
        self.refused["after use"] = "kept" if digest in service.library else "forgotten"

        # More masks than rows: at once, so that they wait for each other, and one after the other.
        factors = [f"zh@{(number + 1) / 128!r}" for number in range(SCALED)]
        many = await asyncio.gather(
            *(self.generate(PROMPTS[0], factor) for factor in factors[:REQUESTS]), return_exceptions=True
        )
        refused = sorted({type(error).__name__ for error in many if isinstance(error, BaseException)})
        self.refused["full"] = ", ".join(refused) or "nobody"
        for start in range(0, SCALED, ROWS):
            await asyncio.gather(*(self.generate(PROMPTS[0], factor) for factor in factors[start : start + ROWS]))

        # The same with masks that requests bring with them, beside those that they name.
        sets = service.library.get("zh").mask.neuron_sets()
        neurons = {str(layer): indices for layer, indices in enumerate(sets)}
        scales = [(number + 0.5) / 128 for number in range(SCALED)]
        brought = {f"zh@{scale!r}": {"neurons": neurons, "scale": scale} for scale in scales}
        for start in range(0, SCALED, REQUESTS):
            pairs = list(brought.items())[start : start + REQUESTS]
            await asyncio.gather(
                *(self.generate(PROMPTS[0], name, brought=mask) for name, mask in pairs),
                *(self.generate(PROMPTS[1], name) for name in ("vi", None)),
            )

        await self.refuses("foreign", service.put_mask(foreign))
        outputs = self.stored("outputs", "zh")
        scales = NeuronMask(outputs.mask.intermediate, outputs.mask.intermediate_sizes, _ones(service))
        await self.refuses("outputs", service.put_mask(StoredMask("outputs", scales, outputs.info)))
        await self.refuses("unknown", service.remove_mask("nobody"))
        for positions in ("all", "prompt", "generated", "prompt[-3:]+generated[:4]", END_AMONG_MANY):
            await self.generate(PROMPTS[2], "zh", tokens=12, positions=Positions.parse(positions))


def _ones(service: EngineService):
    import torch

    return torch.ones(service.library.fingerprint.layers, service.library.fingerprint.hidden_size)


async def run(config: EngineConfig, foreign: StoredMask) -> dict:
    service = await EngineService.start(config, "tiny")
    try:
        run = Run(service)
        await run.everything(foreign)
        assert service.library.retired == frozenset()
        return {
            "answers": run.answers,
            "refused": run.refused,
            "shown": run.shown,
            "ranks": service.data_parallel_ranks,
        }
    finally:
        service.stop()


def main() -> None:
    from crane_serve.common.masks import read_mask

    checkpoint, masks, out, foreign, *flags = sys.argv[1:]
    switches = {"inline_masks": True, "activations": True, "gates": True}
    config = configure_engine(Path(checkpoint), Path(masks), "attnlrp", ROWS, flags, **switches)
    result = asyncio.run(run(config, read_mask(Path(foreign))))
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
