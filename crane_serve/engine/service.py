"""EngineService: vLLM's asynchronous engine as the HTTP layer sees it: tokens in, tokens and log-probabilities out."""

import asyncio
import copy
import math
import os
import time
import uuid
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from crane_serve.common.atomic import remove_file, written_aside
from crane_serve.common.masks import (
    Fingerprint,
    MaskError,
    MaskFileError,
    MaskLibrary,
    MaskTableFull,
    ResolvedMask,
    StoredMask,
    UnknownMask,
    encode_mask,
    mask_path,
)
from crane_serve.common.masks.hub import is_pinned
from crane_serve.common.models.errors import CheckpointError
from crane_serve.common.models.load import load_tokenizer, reason
from crane_serve.common.models.prefix import StartTokens
from crane_serve.common.text.tokens import token_texts
from crane_serve.engine.activations import (
    MAX_REQUESTS,
    TAKE_METHOD,
    ActivationRequest,
    Activations,
    ActivationsBusy,
    ActivationsError,
    ActivationsOff,
    joined,
)
from crane_serve.engine.admission import mask_arguments
from crane_serve.engine.config import (
    ACTIVATIONS_VARIABLE,
    DEFAULT_METHOD_VARIABLE,
    DISABLE_VARIABLE,
    INLINE_VARIABLE,
    MASKS_VARIABLE,
    OFFSETS_VARIABLE,
    ROWS_VARIABLE,
    MaskConfig,
    mask_config,
)
from crane_serve.engine.flags import serving_arguments
from crane_serve.engine.live_masks import CHANGE_METHOD, FORGET_METHOD
from crane_serve.engine.metering import meter
from crane_serve.engine.openai_app import RequestFields, build_openai_app
from crane_serve.engine.rows import Rows
from crane_serve.engine.scoring import ScoreRequest
from crane_serve.engine.self_check import check_masks

_CPU_KV_CACHE_GIB = "2"
_CPU_PRIMITIVES = "64"
_CPU_BLOCK_TOKENS = 32


class EngineDead(RuntimeError):
    """The engine process has died; no request can be served."""


class EngineBusy(RuntimeError):
    """The engine takes no such request at the moment; the same one may succeed later."""


class FailedRequest(RuntimeError):
    """The engine failed at this one request, by no fault of the request, and goes on with others."""


class PinnedMasks(ValueError):
    """The masks are a commit of a repository on the Hub, so no file of them is changed."""


class RejectedRequest(ValueError):
    """The engine refuses the request: too long, or parameters out of range."""


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt; temperature 0 is greedy.

    logprobs: alternatives per token, None for no log-probs; repetition_penalty: logits above 0 of tokens seen before,
    in the prompt too, are divided by it, those below 0 multiplied (Keskar et al., arXiv:1909.05858); 1 for none.
    """

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    logprobs: int | None
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability in nats."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True)
class SampledToken:
    """A generated token and the most likely alternatives at its position."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Step:
    """New tokens since the previous step of a generation; `finish_reason` is None until the last step, which has the
    activations of all tokens but the last, if they were asked for."""

    text: str
    tokens: int
    finish_reason: str | None
    logprobs: tuple[SampledToken, ...] | None
    activations: Activations | None = None


@dataclass(frozen=True)
class TokenScore:
    """A token's log-probability in nats, and whether it was the most probable one at its position."""

    logprob: float
    is_greedy: bool


@dataclass(frozen=True)
class Scores:
    """Of one prompt: its tokens from the first that was asked for, and then the candidates for the next one.

    computed, cached: how many of the prompt's tokens the model read now, and how many came from the prefix cache;
    activations: of the prompt's tokens, if they were asked for.
    """

    tokens: tuple[TokenScore, ...]
    candidates: tuple[TokenScore, ...]
    computed: int
    cached: int
    activations: Activations | None = None


@dataclass(frozen=True)
class EngineConfig:
    """A checked configuration of an engine with masks.

    vllm_config: vLLM's own. arguments: vLLM's flags, those of its OpenAI front end too, as a namespace.
    """

    vllm_config: Any
    arguments: Any


def configure_engine(
    model: Path,
    masks: Path,
    default_method: str,
    rows: int,
    flags: Sequence[str],
    *,
    inline_masks: bool = False,
    activations: bool = False,
) -> EngineConfig:
    """Check everything that can be checked before processes start.

    rows: how many different masks can be resident; flags: vLLM's own, of its engine and its OpenAI front end;
    inline_masks: whether requests may bring masks with them; activations: whether they can ask for values of neurons.
    Raises ValueError (MaskFileError, FingerprintError, CheckpointError, UnsupportedEngine, ...) naming what is wrong.
    """
    os.environ[MASKS_VARIABLE] = str(masks)
    os.environ[DEFAULT_METHOD_VARIABLE] = default_method
    os.environ[ROWS_VARIABLE] = str(rows)
    os.environ[INLINE_VARIABLE] = str(int(inline_masks))
    os.environ[ACTIVATIONS_VARIABLE] = str(int(activations))
    # Without a limit vLLM takes most of a CPU host's memory for its KV cache.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", _CPU_KV_CACHE_GIB)
    # oneDNN keeps machine code for each number of tokens that it has seen; by default for 1,024 products, half a GB.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _CPU_PRIMITIVES)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    arguments = serving_arguments(model, flags, program="crane serve")
    if current_platform.is_cpu():
        # vLLM 0.32 cannot load what it has compiled ahead of time for a CPU, and compiles it again at every start.
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
        if arguments.block_size is None:
            # A prefix is found in the cache by whole blocks. vLLM's on a CPU have 128 tokens, more than many questions.
            arguments.block_size = _CPU_BLOCK_TOKENS
    _require_readable(model, arguments)
    try:
        vllm_config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    except Exception as error:  # vLLM's own and those of the libraries below it have no common base
        if isinstance(error, ValueError | OSError) and "\n" not in str(error).strip():
            raise
        raise CheckpointError(f"{model}: vLLM cannot serve it so: {reason(error)}") from error
    if mask_config(vllm_config) is None:
        raise ValueError(f"masks are disabled ({DISABLE_VARIABLE} is set); the mask service cannot start")
    return EngineConfig(vllm_config, arguments)


def _require_readable(model: Path, arguments: Any) -> None:
    """Read config and tokenizer before vLLM does: its errors are not one line, or come when the engine has started."""
    Fingerprint.of(model)
    if not arguments.tokenizer and arguments.tokenizer_mode == "auto" and not arguments.skip_tokenizer_init:
        load_tokenizer(model, trust_remote_code=arguments.trust_remote_code)


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
        self._showing = 0  # requests that ask for activations
        self._changing = asyncio.Lock()
        self._forgetting: asyncio.Task[None] | None = None
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
        service.library.on_unused = lambda: loop.call_soon_threadsafe(service._forget_soon)
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

    async def put_mask(self, stored: StoredMask, *, save: bool = False) -> None:
        """Add a mask while serving, or replace the one of its name; requests that use the old one finish with it.

        save: write it to the directory of masks, too, before any process has it. Returns when every process has it.
        Raises PinnedMasks if that is a commit of the Hub, FingerprintError for another model's mask, MaskFileError for
        a mask that this engine cannot run, OSError if it cannot be written, EngineDead. After an error nothing has
        changed.
        """
        self._require_own_files(save)
        self.library.fingerprint.require(stored.info.fingerprint, f"mask {stored.name!r}")
        if stored.mask.output is not None and not self._config.outputs:
            raise MaskFileError(
                f"mask {stored.name!r} scales MLP output dimensions, which this engine was started without"
            )
        if stored.mask.offset is not None and not self._config.offsets:
            raise MaskFileError(
                f"mask {stored.name!r} adds to neurons, which this engine was started without; "
                f"{OFFSETS_VARIABLE}=1 at its start, or a mask that does so, makes room for it"
            )
        content = encode_mask(stored.name, stored.mask, stored.info)
        await self._whole(self._put(stored, content, save))

    def _require_own_files(self, save: bool) -> None:
        if save and is_pinned(self._config.masks):
            raise PinnedMasks(
                "the masks of this server are a commit of a repository on the Hub, which does not change; serve a "
                "directory (`crane masks pull`) to change masks"
            )

    async def _put(self, stored: StoredMask, content: bytes, save: bool) -> None:
        async with self._changing:
            with ExitStack() as files:
                put_in_place: Callable[[], None] | None = None
                if save:
                    aside = written_aside(mask_path(self._config.masks, stored.name), content)
                    put_in_place = await asyncio.to_thread(files.enter_context, aside)
                try:
                    await self._tell_cores(CHANGE_METHOD, stored.name, content)
                    if put_in_place is not None:
                        await asyncio.to_thread(put_in_place)
                except Exception:
                    with suppress(Exception):  # what has failed may fail again; the first error says why
                        await self._take_back(stored)
                    raise
            self.library.put(stored)
        await self._forget_unused()

    async def _take_back(self, stored: StoredMask) -> None:
        """Have the engine cores be as the front end, which never had `stored`."""
        before = self.library.masks.get(stored.name)
        content = None if before is None else encode_mask(before.name, before.mask, before.info)
        await self._tell_cores(CHANGE_METHOD, stored.name, content)
        if stored.mask.digest not in self.library:  # requests of the front end may have it otherwise
            await self._tell_cores(FORGET_METHOD, [stored.mask.digest])

    async def remove_mask(self, name: str, *, save: bool = False) -> None:
        """Remove the mask of exactly this name while serving; requests that use it finish with it.

        save: remove its file, too; the only way to remove a file without a usable mask. Raises PinnedMasks if it is in
        a commit of the Hub, UnknownMask, OSError if the file cannot be removed (then nothing has changed), EngineDead.
        """
        self._require_own_files(save)
        await self._whole(self._remove(name, save))

    async def _remove(self, name: str, save: bool) -> None:
        async with self._changing:
            if name not in self.library.masks and not (save and name in self.library.invalid):
                known = ", ".join(self.library.masks) or "no masks"
                raise UnknownMask(f"unknown mask {name!r}; this server has {known}")
            if save:
                await asyncio.to_thread(remove_file, mask_path(self._config.masks, name))
            self.library.discard(name)
            await self._tell_cores(CHANGE_METHOD, name, None)
        await self._forget_unused()

    @staticmethod
    async def _whole(change: Coroutine[Any, Any, None]) -> None:
        """Run a change to its end, even if the caller is cancelled: half a change would leave the processes with
        different masks."""
        await asyncio.shield(asyncio.ensure_future(change))

    def _forget_soon(self) -> None:
        if self._forgetting is None or self._forgetting.done():
            self._forgetting = asyncio.get_running_loop().create_task(self._forget_unused())

    async def _forget_unused(self) -> None:
        async with self._changing:
            with suppress(EngineDead):  # then there is nobody left to forget
                while digests := self.library.forget(self.library.retired):
                    await self._tell_cores(FORGET_METHOD, digests)

    async def _tell_cores(self, method: str, *arguments: Any) -> None:
        """Call a method of `live_masks` in every engine core."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._engine.engine_core.call_utility_async(method, *arguments)
        except EngineDeadError as error:
            raise EngineDead("the engine has died") from error

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
        async with (
            self._shown(activations, len(prompt_ids), sampling.max_tokens, parameters) as take,
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
        asked = ScoreRequest(first, tuple(candidates))
        parameters: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        parameters |= {"skip_reading_prefix_cache": False, "extra_args": asked.argument}
        if data_parallel_rank is None and self.data_parallel_ranks > 1:
            block_tokens = self._engine.vllm_config.cache_config.block_size
            data_parallel_rank = rank_of(prompt_ids[:first], self.data_parallel_ranks, block_tokens)
        async with self._shown(activations, len(prompt_ids), 1, parameters) as take:
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

    @asynccontextmanager
    async def _shown(
        self, asked: ActivationRequest | None, prompt: int, max_tokens: int, parameters: dict[str, Any]
    ) -> AsyncIterator[Callable[[int], Coroutine[Any, Any, Activations | None]]]:
        """Have a request with `parameters` keep its activations, if any are asked for; gives the function that takes
        those of so many tokens. What is not taken is forgotten.

        Raises ActivationsError for activations that cannot be had.
        """
        if asked is None:

            async def nothing(computed: int) -> Activations | None:
                return None

            yield nothing
            return
        if not self._config.activations:
            raise ActivationsOff("the server was started without activations; `crane serve --activations` has them")
        asked.require(self.library.fingerprint, prompt, min(prompt + max_tokens - 1, self.max_model_tokens))
        if self._showing >= MAX_REQUESTS:
            raise ActivationsBusy(f"{MAX_REQUESTS} requests are asking for activations; wait for one to end")
        key = uuid.uuid4().hex
        parameters["extra_args"] = {**parameters.get("extra_args", {}), **asked.argument(key)}
        taken = False

        async def take(computed: int) -> Activations | None:
            nonlocal taken
            taken = True
            parts = await self._take(key, computed)
            if parts is None:
                raise FailedRequest("the engine does not have the activations of all tokens")
            return joined(asked, self.library.fingerprint.intermediate_sizes, parts)

        self._showing += 1
        try:
            yield take
        finally:
            self._showing -= 1
            if not taken:
                with suppress(EngineDead):  # then there is nobody left to forget
                    await asyncio.shield(self._take(key, 0))

    async def _take(self, key: str, end: int) -> list[dict[str, Any]] | None:
        """Call `activations.TAKE_METHOD` in every engine core: the answer of the one that ran the request."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            of_cores = await self._engine.engine_core.call_utility_all_async(TAKE_METHOD, key, end)
        except EngineDeadError as error:
            raise EngineDead("the engine has died") from error
        return next((of_core for of_core in of_cores if of_core is not None), None)

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
            async with self.row(mask), aclosing(run) as results:
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


def configured_bos(model_config: Any) -> list[int]:
    """The BOS token of the model by the configs in vLLM's `model_config`; the tokenizer may have none."""
    configs = (model_config.hf_config, model_config.hf_text_config)
    of_generation = model_config.try_get_generation_config().get("bos_token_id")
    start_tokens = (*(getattr(config, "bos_token_id", None) for config in configs), of_generation)
    return [token_id for token_id in start_tokens if isinstance(token_id, int)]


def _sampled_token(token_id: int, candidates: Any, sampling: Sampling) -> SampledToken:
    ranked = sorted(candidates.items(), key=lambda item: item[1].rank)
    tokens = {key: TokenLogprob(key, value.decoded_token or "", value.logprob) for key, value in ranked}
    return SampledToken(tokens[token_id], tuple(tokens.values())[: sampling.logprobs or 0])
