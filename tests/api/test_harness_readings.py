"""/score against lm-evaluation-harness itself, on one tiny model, for tokenizers of every kind."""

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM

from crane_serve.common.masks import ResolvedMask
from crane_serve.engine.answers import Scores, TokenScore
from crane_serve.service.api.app import create_app
from crane_serve.service.settings import ApiSettings
from tests.api.fake_engine import FakeEngine
from tests.tokenizer_kinds import ENDING, KINDS, VOCABULARY, Kind

ALONE = [("ab", " d"), ("ab ", "d"), ("ab \n", "d e"), ("汉", "语"), ("", "ad"), ("ab", "bd")]
ACROSS = [("ab", "cd"), ("a.b", "cc"), ("b", "cd")]  # "bc" is one token
TEXTS = ["a", "ab cd", " 汉语\n", "Tiếng Việt"]


class ModelEngine(FakeEngine):
    """Scores with a model."""

    def __init__(self, kind: Kind, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.tokenizer, self.configured_bos = kind.tokenizer(), kind.configured
        self._model = model

    async def score(
        self,
        prompt_ids: list[int],
        candidates: Sequence[int],
        mask: ResolvedMask | None,
        *,
        first: int = 1,
        **_: object,
    ) -> Scores:
        logprobs = log_softmax(self._model, prompt_ids)

        def scores(rows: Iterable[int], tokens: Sequence[int]) -> tuple[TokenScore, ...]:
            pairs = zip(rows, tokens, strict=True)
            return tuple(TokenScore(float(logprobs[row, t]), int(logprobs[row].argmax()) == t) for row, t in pairs)

        last = [len(prompt_ids) - 1] * len(candidates)
        tokens = scores(range(first - 1, len(prompt_ids) - 1), prompt_ids[first:])
        return Scores(tokens, scores(last, candidates), len(prompt_ids), 0)


def log_softmax(model: LlamaForCausalLM, token_ids: list[int]) -> torch.Tensor:
    """[tokens, vocabulary]."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits.log_softmax(dim=1)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=256, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest_asyncio.fixture
async def client(kind: Kind, model: LlamaForCausalLM) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(kind, model) as client:
        yield client


def serving(kind: Kind, model: LlamaForCausalLM) -> Any:
    async def start() -> FakeEngine:
        return ModelEngine(kind, model)

    app = create_app(start, ApiSettings())  # type: ignore[arg-type]
    return _Serving(app)


class _Serving:
    def __init__(self, app: Any) -> None:
        self._lifespan = app.router.lifespan_context(app)
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://crane")

    async def __aenter__(self) -> httpx.AsyncClient:
        await self._lifespan.__aenter__()
        return self._client

    async def __aexit__(self, *error: Any) -> None:
        await self._client.aclose()
        await self._lifespan.__aexit__(*error)


class Harness:
    """The harness's own figures. options: its model arguments."""

    def __init__(self, kind: Kind, model: LlamaForCausalLM, **options: Any) -> None:
        self._lm = HFLM(pretrained=model, tokenizer=kind.tokenizer(), device="cpu", max_length=256, **options)

    def continuation(self, context: str, continuation: str) -> tuple[float, bool]:
        asked = Instance(request_type="loglikelihood", doc={}, arguments=(context, continuation), idx=0)
        ((logprob, is_greedy),) = self._lm.loglikelihood([asked], disable_tqdm=True)
        return float(logprob), bool(is_greedy)

    def text(self, text: str) -> float:
        asked = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
        (logprob,) = self._lm.loglikelihood_rolling([asked], disable_tqdm=True)
        return float(logprob)


async def scores(client: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    response = await client.post("/score", json=body)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["scores"]
    return found


def starts(kind: Kind) -> Iterator[tuple[str, str]]:
    """Contexts, and a continuation, that bring the start token as text."""
    if kind.bos is not None:
        yield f"{kind.bos}ab", " d"
        yield "", f"{kind.bos}ad"


async def test_continuations_are_the_harness_s_by_default(
    client: httpx.AsyncClient, kind: Kind, model: LlamaForCausalLM
) -> None:
    harness = Harness(kind, model)
    for context, continuation in [*ALONE, *starts(kind)]:
        (score,) = await scores(client, context=context, continuations=[continuation])
        logprob, is_greedy = harness.continuation(context, continuation)
        assert score["logprob"] == pytest.approx(logprob, abs=1e-4), (context, continuation)
        assert score["is_greedy"] is is_greedy


async def test_a_token_across_the_join_is_read_as_the_harness_does_if_asked(
    client: httpx.AsyncClient, kind: Kind, model: LlamaForCausalLM
) -> None:
    harness = Harness(kind, model)
    for context, continuation in [*ALONE, *starts(kind), *ACROSS]:
        (score,) = await scores(client, context=context, continuations=[continuation], join="length")
        assert score["logprob"] == pytest.approx(harness.continuation(context, continuation)[0], abs=1e-4)
        assert score["bytes"] == len(continuation.encode())


async def test_a_token_across_the_join_is_scored_whole_by_default(
    client: httpx.AsyncClient, kind: Kind, model: LlamaForCausalLM
) -> None:
    harness, tokenizer = Harness(kind, model), kind.tokenizer()
    for context, continuation in ACROSS:
        (score,) = await scores(client, context=context, continuations=[continuation])
        scored = continuation.replace("c", "bc", 1)  # the token that reaches across begins in the context
        before = context[: -len("b")]
        if not before and kind is KINDS["glm"]:
            continue  # where the harness leaves out what the tokenizer puts before any text
        # The harness reads a context that ends where the token begins.
        assert score["logprob"] == pytest.approx(harness.continuation(before, scored)[0], abs=1e-4)
        assert score["tokens"] == len(tokenizer(scored, add_special_tokens=False)["input_ids"])
        assert score["logprob"] != pytest.approx(harness.continuation(context, continuation)[0], abs=1e-2)


async def test_texts_are_the_harness_s_by_default(
    client: httpx.AsyncClient, kind: Kind, model: LlamaForCausalLM
) -> None:
    # By itself HFLM scores a second BOS where the tokenizer adds one; its other models do not.
    harness = Harness(kind, model, add_bos_token=False)
    for text, score in zip(TEXTS, await scores(client, text=TEXTS), strict=True):
        assert score["logprob"] == pytest.approx(harness.text(text), abs=1e-4)
        assert score["bytes"] == len(text.encode())
        if kind.template == "$A":
            assert score["logprob"] == pytest.approx(Harness(kind, model).text(text), abs=1e-4)


async def test_a_text_that_brings_the_start_token_is_the_text_without_it(client: httpx.AsyncClient, kind: Kind) -> None:
    start = kind.eos if kind.bos is None else kind.bos
    with_start, without = await scores(client, text=[f"{start}Tiếng Việt", "Tiếng Việt"])
    assert with_start == without


@pytest.mark.parametrize("kind", ENDING.values(), ids=ENDING, indirect=False)
async def test_nothing_stands_behind_a_text(kind: Kind, model: LlamaForCausalLM) -> None:
    harness = Harness(replace(kind, template=kind.template.removesuffix(f" {kind.eos}")), model)
    async with serving(kind, model) as client:
        for context, continuation in ALONE:
            (score,) = await scores(client, context=context, continuations=[continuation])
            assert score["logprob"] == pytest.approx(harness.continuation(context, continuation)[0], abs=1e-4)
