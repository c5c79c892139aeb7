"""The server's answers, typed. Fields a newer server adds are ignored."""

from pydantic import BaseModel, ConfigDict, FiniteFloat, JsonValue


class Answer(BaseModel):
    """Base of all answers of the server."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class MaskReference(Answer):
    """The mask an answer was made under: canonical name, content digest, number of neurons switched or scaled.

    experts_off: how many experts routers may not choose; positions: the tokens that were masked, as in
    "all" or "generated[:16]".
    """

    name: str
    digest: str
    neurons: int
    experts_off: int = 0
    positions: str = "all"


class Usage(Answer):
    """Tokens a request cost. Of scores: how many of them the model computed, and how many were in its prefix cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    computed_tokens: int | None = None
    cached_tokens: int | None = None


class Output(Answer):
    """One completion: `index` is the position of its prompt in the request; `finish_reason` is "stop" or "length";
    `activations` are the values of neurons, if asked for."""

    index: int
    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprobs: JsonValue = None
    activations: JsonValue = None


class Generation(Answer):
    """Answer of /generate; at the end of a stream the outputs have no text, since the deltas had it."""

    model: str
    mask: MaskReference | None = None
    outputs: tuple[Output, ...]
    usage: Usage = Usage()


class Delta(Answer):
    """A piece of streamed text for the prompt at `index`; `finish_reason` is None until that prompt's last piece."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: JsonValue = None


class Token(Answer):
    """A token with its log-probability in nats. One that ends within a character has no text; the next has it all."""

    token_id: int
    token: str
    logprob: FiniteFloat


class Score(Answer):
    """Log-probability of one text or continuation.

    logprob: nats, summed over the tokens scored; tokens: how many; bytes: their length in UTF-8;
    is_greedy: for continuations, whether greedy decoding would have produced it; question: of several, the one that it
    belongs to, from 0; token_logprobs: of each token scored, if asked for with `return_tokens`.
    """

    logprob: FiniteFloat
    tokens: int
    bytes: int
    is_greedy: bool | None = None
    question: int | None = None
    token_logprobs: tuple[Token, ...] | None = None


class Scores(Answer):
    """Answer of /score, one score per text or continuation, in the order asked.

    prompts: the token ids that the model read for them, if asked for with `return_prompts`; activations: the values of
    neurons, likewise.
    """

    mask: MaskReference | None = None
    scores: tuple[Score, ...]
    usage: Usage = Usage()
    prompts: tuple[tuple[int, ...], ...] | None = None
    activations: JsonValue = None


class MaskSummary(Answer):
    """A mask the server holds; further fields of /masks/{name} are in `model_extra`.

    budget: fraction of all neurons the mask was allowed to take; experts_off: how many experts routers may not choose.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    digest: str
    neurons: int
    experts_off: int = 0
    language: str | None = None
    method: str | None = None
    budget: float | None = None


class LayerNeurons(Answer):
    """Neurons of one layer that a mask changes; scales: the factors, None if it switches all of them off; offsets: what
    is added then, None for nothing."""

    layer: int
    neurons: tuple[int, ...]
    scales: tuple[float, ...] | None = None
    offsets: tuple[float, ...] | None = None


class LayerDimensions(Answer):
    """Dimensions of one layer's MLP output that a mask scales; scales: the factors, None if it removes all of them."""

    layer: int
    dimensions: tuple[int, ...]
    scales: tuple[float, ...] | None = None


class LayerExperts(Answer):
    """Experts of one layer that its router may not choose."""

    layer: int
    experts: tuple[int, ...]


class MaskNeurons(Answer):
    """Answer of /masks/{name}/neurons: all that a mask scales. output: None if it does not change the MLPs' output;
    router: None if routers may choose all experts."""

    name: str
    digest: str
    layers: tuple[LayerNeurons, ...]
    output: tuple[LayerDimensions, ...] | None = None
    router: tuple[LayerExperts, ...] | None = None


class InvalidMask(Answer):
    """A mask file the server cannot use, and why."""

    name: str
    reason: str


class MaskListing(Answer):
    """Answer of /masks. `default_method`: the method whose masks bare language names mean."""

    masks: tuple[MaskSummary, ...]
    invalid: tuple[InvalidMask, ...] = ()
    default_method: str | None = None


class Readiness(Answer):
    """Answer of /ready: the model, its fingerprint (which masks must match) and the server's version.

    kv_cache_tokens: how many its KV cache holds; prompt_start: token ids before a prompt or a context by default,
    text_start: the one before a text that is scored from its start; None for a server that does not say.
    """

    status: str
    model: str
    fingerprint: dict[str, JsonValue]
    version: str | None = None
    kv_cache_tokens: int | None = None
    prompt_start: tuple[int, ...] | None = None
    text_start: int | None = None


class Health(Answer):
    """Answer of /health: the process is up, ready or not."""

    status: str
