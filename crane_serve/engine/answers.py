"""What an engine is asked for, what it answers, and the errors that it answers with."""

from dataclasses import dataclass

from crane_serve.engine.activations import Activations


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
