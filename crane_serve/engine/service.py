"""EngineService: vLLM's asynchronous engine as the HTTP layer sees it: tokens in, tokens and log-probabilities out."""

import asyncio
import copy
import math
import time
import uuid
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from typing import Any

from starlette.types import ASGIApp

from crane_serve.common.masks import MaskError, MaskLibrary, MaskTableFull, ResolvedMask
from crane_serve.common.models.prefix import StartTokens
from crane_serve.common.text.tokens import token_texts
from crane_serve.engine.activations import ActivationRequest, ActivationsError
from crane_serve.engine.admission import mask_arguments
from crane_serve.engine.answers import (
    EngineBusy,
    EngineDead,
    FailedRequest,
    RejectedRequest,
    SampledToken,
    Sampling,
    Scores,
    Step,
    TokenLogprob,
    TokenScore,
)
from crane_serve.engine.asked_activations import AskedActivations
from crane_serve.engine.config import MaskConfig, mask_config
from crane_serve.engine.configure import EngineConfig, configured_bos
from crane_serve.engine.cores import Cores
from crane_serve.engine.mask_changes import MaskChanges
from crane_serve.engine.metering import meter
from crane_serve.engine.openai_app import RequestFields, build_openai_app
from crane_serve.engine.rows import Rows
from crane_serve.engine.scoring import ScoreRequest
from crane_serve.engine.self_check import check_masks


def rank_of(context: Sequence[int], ranks: int, block_tokens: int) -> int | None:
    """The data-parallel rank whose prefix cache a context belongs in, so that all its continuations find it there.

    context: token ids; block_tokens: of a block of the KV cache. None for less than a block, of which nothing is kept,
    such as the start token of a whole text: vLLM spreads these.
    """
    return None if len(context) < block_tokens else zlib.crc32(repr(list(context)).encode()) % ranks


class EngineService:
    """One vLLM engine with masks.

    Made by `start`; then any number of concurrent `generate`, `score`, `put_mask` and `remove_mask`; `stop`.
    model_names: all names that the model is served under; answers name the first, `model_name`.
    openai: vLLM's own OpenAI application, which runs under the masks that vllm_xargs name, and checks no keys.
    openai_fields: what the bodies of its requests may have; it drops anything else.
    """

    openai: ASGIApp
    openai_fields: RequestFields

    def __init__(self, engine: Any, config: MaskConfig, model_names: Sequence[str]) -> None:
        self._engine = engine
        self._config = config
        self.library: MaskLibrary = config.library()
        self.model_names = tuple(model_names)
        self.tokenizer = engine.get_tokenizer()
        self.start_tokens = StartTokens.of(self.tokenizer, configured_bos(engine.model_config))
        self.on_tokens: Callable[[str | None, int, int], object] | None = None  # mask name, prompt, completion tokens
        meter(engine, self.library, lambda *tokens: self.on_tokens and self.on_tokens(*tokens))
        enough = config.rows >= engine.vllm_config.scheduler_config.max_num_seqs
        self._rows = Rows(None if enough else config.rows)
        cores = Cores(engine)
        self._changes = MaskChanges(config, self.library, cores)
        self.put_mask = self._changes.put
        self.remove_mask = self._changes.remove
        self._activations = AskedActivations(config, self.library.fingerprint, cores)
        # A copy of its own, used by one thread: tokenizers must not be shared between threads.
        self._encoder = ThreadPoolExecutor(1, "encoder")
        self._encoding = copy.deepcopy(self.tokenizer)
        self._longest_token = max(map(len, self.tokenizer.get_vocab()))

    @classmethod
    async def start(cls, config: EngineConfig, name: str) -> "EngineService":
        """Start the engine's processes, and check that masks take effect in every layer of every rank.

        name: the model's name, if no flag names it. Must be called in the event loop that will serve. Raises
        SelfCheckFailed if masks have no effect; ValueError, TypeError or KeyError for flags that do not suit the model.
        """
        from vllm.logger import init_logger
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = config.arguments
        engine = AsyncLLM.from_vllm_config(
            config.vllm_config,
            disable_log_stats=arguments.disable_log_stats,
            enable_log_requests=arguments.enable_log_requests,
        )
        # The configuration that admission reads; its library is the one that requests are resolved in.
        masks = mask_config(engine.input_processor.vllm_config)
        assert masks is not None, "configure_engine returns no configuration without masks"
        service = cls(engine, masks, arguments.served_model_name or [name])
        loop = asyncio.get_running_loop()
        service.library.on_unused = lambda: loop.call_soon_threadsafe(service._changes.forget_soon)
        began = time.monotonic()
        try:
            await check_masks(service)
            service.openai, service.openai_fields = await build_openai_app(
                engine, arguments, service.model_names, service.library
            )
        except BaseException:
            service.stop()
            raise
        init_logger("vllm.crane").info("masks take effect in every layer (%.1f s)", time.monotonic() - began)
        return service

    def stop(self) -> None:
        """End the engine's processes."""
        self.library.on_unused = None
        self._encoder.shutdown(wait=False, cancel_futures=True)
        self._engine.shutdown()

    @property
    def model_name(self) -> str:
        """The name of the base model in answers."""
        return self.model_names[0]

    @property
    def is_dead(self) -> bool:
        """Whether the engine has died; it does not come back."""
        return bool(self._engine.errored)

    @property
    def max_model_tokens(self) -> int:
        """Longest sequence, prompt and completion together, in tokens."""
        return int(self._engine.model_config.max_model_len)

    @property
    def kv_cache_tokens(self) -> int | None:
        """How many tokens the KV caches of all engines hold; None if vLLM does not say."""
        tokens = self._engine.vllm_config.cache_config.kv_cache_size_tokens
        return None if tokens is None else int(tokens) * self.data_parallel_ranks

    @property
    def data_parallel_ranks(self) -> int:
        """How many engines share the requests."""
        return int(self._engine.vllm_config.parallel_config.data_parallel_size)

    @property
    def mask_rows(self) -> int:
        """How many different masks can be resident."""
        return self._config.rows

    @property
    def mask_rows_used(self) -> int:
        """How many different masks requests are using now."""
        return len(self._rows.running)

    def metrics(self) -> bytes:
        """vLLM's own metrics in the Prometheus text format."""
        from prometheus_client import generate_latest
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        return generate_latest(get_prometheus_registry())

    async def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text without special tokens around it (see `start_tokens`), made beside the event loop.

        Raises RejectedRequest for a text that the model has no room for.
        """
        longest = self.max_model_tokens * self._longest_token
        for text in texts:
            if len(text) > longest:
                raise RejectedRequest(
                    f"a text has {len(text)} characters, more than the model's {self.max_model_tokens} tokens can hold"
                )
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoder, self._encode, list(texts))

    async def token_texts(self, token_ids: Sequence[int], first: int) -> list[str]:
        """As `common.text.tokens.token_texts` with the model's tokenizer, made beside the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoder, token_texts, self._encoding, list(token_ids), first)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded: list[list[int]] = self._encoding(texts, add_special_tokens=False)["input_ids"]
        return encoded

    async def generate(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        mask: ResolvedMask | None,
        *,
        stream: bool,
        activations: ActivationRequest | None = None,
    ) -> AsyncGenerator[Step]:
        """Continue a prompt. With `stream` each step is yielded when it is ready, otherwise all as one step.

        Raises RejectedRequest, MaskError, EngineBusy, FailedRequest or EngineDead, and ActivationsError for activations
        that cannot be had. Closing the iterator aborts the request.
        """
        from vllm.sampling_params import RequestOutputKind

        parameters = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "stop": list(sampling.stop),
            "logprobs": sampling.logprobs,
            "repetition_penalty": sampling.repetition_penalty,
            "output_kind": RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        }
        if activations is not None and activations.reductions and sampling.stop:
            raise ActivationsError(
                "a reduction and 'stop': the engine learns of stop strings too late to know the last token; expected "
                "reduce 'none', or no 'stop'"
            )
        computed = len(prompt_ids) - 1
        most = min(computed + sampling.max_tokens, self.max_model_tokens)
        self._activations.require(activations, len(prompt_ids), most)
        async with (
            self.row(mask),
            self._activations.kept(activations, parameters) as take,
            aclosing(self._run(prompt_ids, parameters, mask)) as results,
        ):
            async for result in results:
                output = result.outputs[0]
                computed += len(output.token_ids)
                logprobs = None
                if output.logprobs is not None:
                    pairs = zip(output.token_ids, output.logprobs, strict=True)
                    logprobs = tuple(_sampled_token(token_id, candidates, sampling) for token_id, candidates in pairs)
                seen = None if output.finish_reason is None else await take(computed)
                yield Step(output.text, len(output.token_ids), output.finish_reason, logprobs, seen)

    async def score(
        self,
        prompt_ids: list[int],
        candidates: Sequence[int],
        mask: ResolvedMask | None,
        *,
        first: int = 1,
        data_parallel_rank: int | None = None,
        activations: ActivationRequest | None = None,
    ) -> Scores:
        """Log-probabilities of the tokens of a prompt from `first` on, each given those before it, and of each of
        `candidates` as the token after the prompt.

        Only what comes before may be read from the prefix cache. data_parallel_rank: the engine to run it; None for
        `rank_of` the tokens before `first`, which are then in one engine's cache; with activations nothing is read from
        it. Raises RejectedRequest and as `generate` does.
        """
        length = len(prompt_ids) + bool(candidates)
        if length > self.max_model_tokens:
            raise RejectedRequest(f"the text has {length} tokens, and the model's context is {self.max_model_tokens}")
        if length == self.max_model_tokens and not candidates:
            raise RejectedRequest(
                f"the text has {length} tokens, as many as the model's context, and the engine never reads the last "
                f"one of these; with activations a text may have {length - 1}, or 'end' may be {length - 1} at most"
            )
        asked = ScoreRequest(first, tuple(candidates))
        parameters: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        parameters |= {"skip_reading_prefix_cache": False, "extra_args": asked.argument}
        if data_parallel_rank is None and self.data_parallel_ranks > 1:
            block_tokens = self._engine.vllm_config.cache_config.block_size
            data_parallel_rank = rank_of(prompt_ids[:first], self.data_parallel_ranks, block_tokens)
        self._activations.require(activations, len(prompt_ids), len(prompt_ids))
        async with self.row(mask), self._activations.kept(activations, parameters) as take:
            results = [result async for result in self._run(prompt_ids, parameters, mask, data_parallel_rank)]
            seen = await take(len(prompt_ids))
        per_token = next((result.prompt_logprobs for result in reversed(results) if result.prompt_logprobs), None)
        if per_token is None:
            raise RejectedRequest("the engine returned no log-probabilities")
        wanted = [*prompt_ids[first:], *candidates]
        rows = [row[token] for token, row in zip(wanted, per_token[1:], strict=True)]
        if not all(math.isfinite(row.logprob) for row in rows):
            raise RejectedRequest("the model gives a token of this text no finite log-probability")
        scores = tuple(TokenScore(row.logprob, row.rank == 1) for row in rows)
        cached = results[-1].num_cached_tokens or 0
        of_prompt = len(prompt_ids) - first
        return Scores(scores[:of_prompt], scores[of_prompt:], len(prompt_ids) - cached, cached, seen)

    async def _run(
        self,
        token_ids: list[int],
        parameters: dict[str, Any],
        mask: ResolvedMask | None,
        data_parallel_rank: int | None = None,
    ) -> AsyncGenerator[Any]:
        from vllm.exceptions import GenerationError, GracefulHTTPError, RetryableRequestError, VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if self.is_dead:
            raise EngineDead("the engine has died")
        extra_args = {**parameters.pop("extra_args", {}), **({} if mask is None else mask_arguments(mask))}
        try:
            sampling_params = SamplingParams(**parameters, extra_args=extra_args or None)
            run = self._engine.generate(
                tokens_input(token_ids), sampling_params, uuid.uuid4().hex, data_parallel_rank=data_parallel_rank
            )
            async with aclosing(run) as results:
                async for result in results:
                    if result.outputs and result.outputs[0].finish_reason == "error":
                        raise RejectedRequest("the engine could not run this request")
                    yield result
        except MaskTableFull:
            raise
        except EngineDeadError as error:
            raise EngineDead("the engine has died") from error
        except EngineGenerateError as error:
            if self.is_dead:
                raise EngineDead("the engine has died") from error
            raise RejectedRequest(str(error.__cause__ or error)) from error
        except (RetryableRequestError, GracefulHTTPError) as error:  # paused; too many are queued
            raise EngineBusy(str(error)) from error
        except GenerationError as error:
            raise FailedRequest(f"the engine failed at this request: {error}") from error
        except (VLLMClientError, ValueError) as error:
            if isinstance(error.__cause__, MaskError):
                # A new error: raising the old one again would make a reference cycle.
                raise type(error.__cause__)(str(error.__cause__)) from error
            raise RejectedRequest(str(error)) from error

    @asynccontextmanager
    async def row(self, mask: ResolvedMask | None) -> AsyncIterator[None]:
        """Wait until there is a row for the mask of a request, and keep it until its end."""
        if mask is None:
            yield
            return
        async with self._rows.taken(mask.mask.digest):
            yield


def _sampled_token(token_id: int, candidates: Any, sampling: Sampling) -> SampledToken:
    ranked = sorted(candidates.items(), key=lambda item: item[1].rank)
    tokens = {key: TokenLogprob(key, value.decoded_token or "", value.logprob) for key, value in ranked}
    return SampledToken(tokens[token_id], tuple(tokens.values())[: sampling.logprobs or 0])
