"""Scoring: log-probabilities of given tokens, computed where one is asked for and nowhere else.

vLLM's `prompt_logprobs` computes a row of logits for every token of a prompt, and reads nothing from the prefix cache.
A request with the argument `crane_score` is scored from its token `first` on; what comes before may come from the
cache, in which a hit ends before the token whose logits score the first one. Each of its `candidates` is scored as the
token after the prompt. The scores travel as vLLM's prompt log-probabilities, one row for each scored token: first those
of the prompt, then the candidates; its rank is 1 if it was the most probable one, otherwise 2.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crane_serve.engine.admission import SCORE_ARGUMENT
from crane_serve.engine.config import mask_config
from crane_serve.engine.vocabulary import unknown_token, vocabulary_size

_ROWS, _ROWS_ON_CPU = 1024, 128  # of logits at a time
_SUMMED_ON_CPU = 16  # rows whose exponentials are summed at a time, in a processor's cache
_BEST, _OTHER = 1, 2  # ranks


class ScoreRequest(NamedTuple):
    """first: index of the first token of the prompt to score, 1 at least, or the prompt's length for none; candidates:
    token ids to score as the next token."""

    first: int
    candidates: tuple[int, ...]

    @property
    def argument(self) -> dict[str, Any]:
        """The `extra_args` that ask for it."""
        return {SCORE_ARGUMENT: {"first": self.first, "candidates": list(self.candidates)}}

    @classmethod
    def of(cls, sampling_params: Any) -> "ScoreRequest | None":
        """What a request asks to have scored, or None; it has been checked by `check_score`."""
        asked = (getattr(sampling_params, "extra_args", None) or {}).get(SCORE_ARGUMENT)
        return None if asked is None else cls(asked["first"], tuple(asked["candidates"]))


def check_score(vllm_config: Any, request: Any, tokenizer: Any = None) -> None:
    """Raise VLLMValidationError if an EngineCoreRequest asks for scores that there cannot be.

    tokenizer: to give the text of a token that the model does not have.
    """
    from vllm.exceptions import VLLMValidationError

    parameters, prompt = request.sampling_params, len(request.prompt_token_ids or ())
    asked = (getattr(parameters, "extra_args", None) or {}).get(SCORE_ARGUMENT)
    if asked is None:
        return
    well_formed = isinstance(asked, Mapping) and asked.keys() == {"first", "candidates"}
    if not well_formed or not _whole([asked["first"]]) or not isinstance(asked["candidates"], Collection):
        raise VLLMValidationError(f"{SCORE_ARGUMENT}: expected 'first' and 'candidates'", parameter=SCORE_ARGUMENT)
    first, candidates = asked["first"], asked["candidates"]
    if mask_config(vllm_config) is None or parameters.prompt_logprobs != 0 or not _whole(candidates):
        raise VLLMValidationError(
            f"{SCORE_ARGUMENT}: expected an engine with masks, prompt_logprobs=0 and token ids",
            parameter=SCORE_ARGUMENT,
        )
    if not 1 <= first <= prompt or (first == prompt and not candidates):
        raise VLLMValidationError(
            f"{SCORE_ARGUMENT}: first is {first}, expected 1 to {prompt}, and a token to score",
            parameter=SCORE_ARGUMENT,
        )
    vocabulary = vocabulary_size(vllm_config.model_config)
    for candidate in candidates:
        if not 0 <= candidate < vocabulary:
            raise unknown_token(candidate, prompt, vocabulary, tokenizer)


def _whole(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


class _Shorter:
    """A request with fewer tokens, for vLLM's look into the prefix cache, which leaves the last one to be computed."""

    def __init__(self, request: Any, tokens: int) -> None:
        self._request = request
        self.num_tokens = tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def get_computed_blocks(original: Callable[..., Any], self: Any, request: Any, *longest: Any, **named: Any) -> Any:
    """vLLM's method in the engine core: a hit of a scored request ends before the token that scores the first one.

    longest, named: since 0.33, how many tokens a hit may have; None for all but the last.
    """
    asked = ScoreRequest.of(request.sampling_params)
    if asked is None:
        return original(self, request, *longest, **named)

    def shorter(length: int | None) -> int | None:
        return None if length is None else min(length, asked.first - 1)

    of_name = {name: shorter(length) for name, length in named.items()}
    return original(self, _Shorter(request, asked.first), *map(shorter, longest), **of_name)


class Chunk(NamedTuple):
    """The tokens of one request in a step.

    row: of the first of them in the hidden states; start: its position; tokens: how many; prompt: tokens of the prompt.
    targets: the prompt's tokens from one position to another, [tokens], int64.
    """

    request_id: str
    row: int
    start: int
    tokens: int
    prompt: int
    targets: Callable[[int, int], Tensor]


@dataclass
class _Scored:
    request: ScoreRequest
    pieces: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)


class Scoring:
    """The scored requests of one worker. `add` each, then `step` with the hidden states of every batch."""

    def __init__(self) -> None:
        self._scored: dict[str, _Scored] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._scored

    def add(self, request_id: str, request: ScoreRequest) -> None:
        """Begin a request, or begin it again."""
        self._scored[request_id] = _Scored(request)

    def remove(self, request_id: str) -> None:
        """Forget a request, if it is there."""
        self._scored.pop(request_id, None)

    def keep(self, request_ids: Collection[str]) -> None:
        """Forget all other requests."""
        self._scored = {key: scored for key, scored in self._scored.items() if key in request_ids}

    def step(
        self, logits_of: Callable[[Tensor], Tensor], hidden: Tensor, chunks: Iterable[Chunk]
    ) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Score the tokens of a batch; the requests whose prompts are done with it, with all their scores.

        hidden: [tokens, hidden size]; logits_of: [rows, hidden size] -> [rows, vocabulary]. Scores are token ids
        [scored, 1], log-probabilities in nats [scored, 1] and ranks [scored]. After a preemption a prompt begins again,
        before its first scored token.
        """
        parts: list[tuple[_Scored, Tensor, Tensor]] = []  # with rows and tokens, [scored] each
        done = []
        for chunk in chunks:
            scored = self._scored.get(chunk.request_id)
            if scored is None:
                continue
            first, candidates = scored.request
            if chunk.start < first:
                scored.pieces.clear()
            end = chunk.start + chunk.tokens
            low, high = max(first - 1, chunk.start), min(end, chunk.prompt - 1)
            if low < high:
                rows = torch.arange(low, high, device=hidden.device) + (chunk.row - chunk.start)
                parts.append((scored, rows, chunk.targets(low + 1, high + 1)))
            if end >= chunk.prompt:
                done.append(chunk.request_id)
                if candidates:
                    tokens = torch.tensor(candidates, device=hidden.device)
                    last = chunk.row + chunk.prompt - 1 - chunk.start
                    parts.append((scored, torch.full_like(tokens, last), tokens))
        if parts:
            rows, tokens = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
            logprobs, ranks = token_scores(logits_of, hidden, rows, tokens)
            ends = list(itertools.accumulate(len(part[1]) for part in parts))
            for (scored, _, wanted), begin, end in zip(parts, [0, *ends], ends, strict=False):
                scored.pieces.append((wanted, logprobs[begin:end], ranks[begin:end]))
        return {request_id: self._scores(request_id) for request_id in done}

    def _scores(self, request_id: str) -> tuple[Tensor, Tensor, Tensor]:
        pieces = self._scored.pop(request_id).pieces
        tokens, logprobs, ranks = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return tokens[:, None].int(), logprobs[:, None], ranks


def token_scores(
    logits_of: Callable[[Tensor], Tensor], hidden: Tensor, rows: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities in nats [scored] of `tokens` [scored] at `rows` [scored] of `hidden`, and their ranks [scored].

    Logits are made for each row once, in blocks. Rows that are asked for twice stand side by side.
    """
    distinct, places = torch.unique_consecutive(rows, return_inverse=True)
    size = _ROWS_ON_CPU if hidden.device.type == "cpu" else _ROWS
    logprobs, ranks = [], []
    for start, block in zip(range(0, len(distinct), size), torch.split(distinct, size), strict=True):
        here = (places >= start) & (places < start + size)
        at, wanted = places[here] - start, tokens[here]
        logits = logits_of(hidden[block])  # [rows, vocabulary]
        highest, best = logits.max(-1)  # [rows], the first of several
        logprobs.append(logits[at, wanted].float() - _log_sum_exp(logits, highest.float())[at])
        ranks.append(torch.where(best[at] == wanted, _BEST, _OTHER))
    return torch.cat(logprobs), torch.cat(ranks)


def _log_sum_exp(logits: Tensor, highest: Tensor) -> Tensor:
    """float32 [rows]. logits: [rows, vocabulary]; highest: float32 [rows]. One buffer is used again and again: on a
    CPU new memory costs more than the exponentials."""
    size = _SUMMED_ON_CPU if logits.device.type == "cpu" else len(logits)
    buffer = torch.empty(min(size, len(logits)), logits.shape[1], device=logits.device)
    sums = torch.empty_like(highest)
    for some, most, total in zip(*(torch.split(of, size) for of in (logits, highest, sums)), strict=True):
        exponentials = buffer[: len(some)].copy_(some).sub_(most.unsqueeze(1)).exp_()
        torch.sum(exponentials, dim=1, out=total)
    return highest + sums.log()
