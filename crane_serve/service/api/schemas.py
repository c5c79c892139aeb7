"""Request and answer bodies. Log-probabilities are in nats."""

import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from torch import Tensor

from crane_serve.common.masks import Fingerprint, NeuronMask, Positions, ResolvedMask, StoredMask
from crane_serve.common.masks.mask import MAX_SCALE
from crane_serve.common.masks.positions import PATTERN
from crane_serve.common.models.prefix import AddBos, Join

MAX_ITEMS = 1024
MAX_REPEATED = 2**24
"""Most characters of a context, counted once for each of its continuations."""

_Text = Annotated[str, Field(min_length=1)]
_TextOrEmpty = Annotated[str, Field(min_length=0)]  # a length makes pydantic refuse what UTF-8 cannot encode


def _integer(value: Any) -> Any:
    """Reads 3.0 as an integer: JSON has only one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _canonical(text: str) -> str:
    return str(Positions.parse(text))


POSITIONS_MEAN = (
    "The tokens to be masked: all (default), prompt or generated; a window of either, as in prompt[-4:] or "
    "generated[:16], or one of each, joined with a plus; with +until=ID,ID at the end no token after the first masked "
    "one of these ids"
)
PositionsText = Annotated[str, AfterValidator(_canonical), WithJsonSchema({"type": "string", "pattern": PATTERN})]
"""In canonical form."""
_Integer = Annotated[int, BeforeValidator(_integer)]
_LARGEST_SEED = 9 * 10**18  # vLLM takes less than 2**63; the description holds it as a float, where this is exact


_NUMBER = {"type": "number", "minimum": -MAX_SCALE, "maximum": MAX_SCALE, "default": 0}
MASK_IN_BODY: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "required": ["neurons"],
            "additionalProperties": False,
            "properties": {
                "neurons": {
                    "type": "object",
                    "description": "By layer: which of its neurons are changed",
                    "minProperties": 1,
                    "propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"},
                    "additionalProperties": {
                        "type": "array",
                        "items": {"type": "integer", "minimum": 0},
                        "uniqueItems": True,
                    },
                },
                "scale": {**_NUMBER, "description": "What each is multiplied by"},
                "offset": {**_NUMBER, "description": "What is then added to each"},
            },
        },
        {"type": "null"},
    ],
}
"""JSON schema of `mask` in a body. What is an object there is checked by `InlineMask.read` alone."""

MASK_DESCRIPTION = (
    "Mask name, or names joined with commas; 'none' for no mask; or a mask itself, if the server allows it"
)


_Index = Annotated[int, Field(ge=0, lt=2**31), BeforeValidator(_integer)]  # bounds first, for the description
_Reduce = Literal["none", "mean", "mean_abs", "max", "positive", "act_positive", "up_mean_abs"]


class ActivationsWanted(BaseModel):
    """The neurons whose values a request asks to see, before its mask: of one prompt, text or context."""

    model_config = ConfigDict(extra="forbid", strict=True)

    layers: Annotated[list[_Index], Field(max_length=MAX_ITEMS, fail_fast=True)] = Field(
        default=[], description="Layers of which all neurons are shown"
    )
    neurons: dict[str, Annotated[list[_Index], Field(min_length=1, fail_fast=True)]] = Field(
        default={},
        description="By the number of a layer, the neurons that are shown",
    )
    reduce: _Reduce | Annotated[list[_Reduce], Field(min_length=1, max_length=7, fail_fast=True)] = Field(
        "none",
        description="What becomes of a neuron's values: none for one per token; the mean over tokens, the mean of "
        "absolute values, the largest, the share above 0; with --gates the share of tokens at which act(gate) is above "
        "0, and the mean of absolute values of up; or a list of these",
    )
    first: _Index = Field(0, description="Position of the first token that counts, 0 for the start token, if any")
    end: _Index | None = Field(None, description="Position behind the last token that counts; null for all")
    encoding: Literal["lists", "base64"] = Field(
        "lists", description="base64: little-endian float32, token by token, neurons in their order"
    )


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    mask: Annotated[str | dict[str, Any] | None, WithJsonSchema(MASK_IN_BODY)] = Field(
        None, description=MASK_DESCRIPTION
    )
    add_bos: AddBos = Field(
        "auto",
        description="What is put before a text that does not begin with it: true the model's start token, false "
        "nothing, auto what lm-evaluation-harness puts there",
    )


class GenerateRequest(_Request):
    """Prompts to be continued under one mask, and how."""

    prompt: _Text | Annotated[list[_Text], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    max_tokens: _Integer = Field(128, ge=1, lt=2**31)
    temperature: float = Field(1.0, ge=0, le=10, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    seed: Annotated[int, Field(ge=0, le=_LARGEST_SEED), BeforeValidator(_integer)] | None = None
    stop: _Text | Annotated[list[_Text], Field(max_length=16, fail_fast=True)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), BeforeValidator(_integer)] | None = Field(
        None, description="Alternatives to return per generated token"
    )
    repetition_penalty: float = Field(
        1.0,
        ge=0.01,
        le=10,
        allow_inf_nan=False,
        description="Above 1, tokens of the prompt and of the text so far become less likely; 1 for none",
    )
    stream: bool = False
    positions: PositionsText | None = Field(None, description=POSITIONS_MEAN)
    activations: ActivationsWanted | None = Field(
        None, description="Values of neurons to return: of all tokens but the last one generated"
    )

    @property
    def prompts(self) -> list[str]:
        """One prompt or several, as a list."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def stops(self) -> tuple[str, ...]:
        """One stop string or several, or none."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def _form(optional: frozenset[str] = frozenset(), **kinds: str) -> dict[str, Any]:
    """JSON schema of a body with some of the fields, each of a kind, and without the others but `optional` ones."""
    others = {"text", "context", "continuations", "questions", "truncate"} - kinds.keys() - optional
    properties = {**kinds, **dict.fromkeys(sorted(others), "null")}
    return {"required": list(kinds), "properties": {name: {"type": kind} for name, kind in properties.items()}}


_ONE_FORM: dict[str, Any] = {
    "oneOf": [
        _form(frozenset({"truncate"}), text="array"),
        _form(context="string", continuations="array"),
        _form(questions="array"),
    ]
}
_Continuations = Annotated[list[_Text], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]


class ScoreQuestion(BaseModel):
    """A context with continuations of its own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    context: _TextOrEmpty
    continuations: _Continuations


class ScoreRequest(_Request):
    """`text`, scored from its start; or `continuations`, each scored after `context`; or `questions` with both."""

    model_config = ConfigDict(json_schema_extra=_ONE_FORM)

    text: Annotated[list[_TextOrEmpty], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)] | None = None
    context: _TextOrEmpty | None = None
    continuations: _Continuations | None = None
    questions: Annotated[list[ScoreQuestion], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)] | None = None
    join: Join = Field(
        "shared",
        description="Where a continuation's tokens begin: after those that the context has alone, too (shared), or "
        "after as many as it has alone (length), as in lm-evaluation-harness",
    )
    truncate: Annotated[int, Field(ge=1, lt=2**31), BeforeValidator(_integer)] | None = Field(
        None,
        description="Most tokens of a text, with what is put before it; more are cut off, and `bytes` is of whole "
        "characters",
    )
    return_tokens: bool = Field(False, description="Whether each score has its `token_logprobs`")
    return_prompts: bool = Field(False, description="Whether the answer has its `prompts`")
    activations: ActivationsWanted | None = Field(
        None,
        description="Values of neurons to return: of all tokens of a text, or of all but the last of a context "
        "with its continuation",
    )

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        pair = self.context is not None or self.continuations is not None
        if [self.text is not None, pair, self.questions is not None].count(True) != 1 or (
            pair and (self.context is None or self.continuations is None)
        ):
            raise ValueError("expected one of 'text', 'context' with 'continuations', and 'questions'")
        if self.truncate is not None and self.text is None:
            raise ValueError("'truncate' is for 'text' alone")
        if self.sequences > MAX_ITEMS:
            raise ValueError(f"{self.sequences} continuations in all; at most {MAX_ITEMS} are read")
        characters = sum(len(question.context) * len(question.continuations) for question in self.asked)
        if characters > MAX_REPEATED:
            raise ValueError(
                f"context times continuations has {characters} characters; at most {MAX_REPEATED} are read"
            )
        return self

    @property
    def asked(self) -> list[ScoreQuestion]:
        """The contexts with their continuations, one or several; none for `text`."""
        if self.context is not None and self.continuations is not None:
            return [ScoreQuestion(context=self.context, continuations=self.continuations)]
        return self.questions or []

    @property
    def sequences(self) -> int:
        """How many sequences the engine runs for it."""
        return len(self.text or ()) + sum(len(question.continuations) for question in self.asked)

    @property
    def texts(self) -> list[str]:
        """The texts to encode: the given texts; or each context alone, then with each of its continuations."""
        if self.text is not None:
            return self.text
        return [
            text
            for question in self.asked
            for text in (question.context.rstrip(), *(question.context + end for end in question.continuations))
        ]


_ExpertsOff = Annotated[
    int,
    Field(
        description="How many experts routers may not choose; left out for none", exclude_if=lambda count: count == 0
    ),
]


class MaskUsed(BaseModel):
    """The mask that an answer was computed under."""

    name: str
    digest: str
    neurons: int = Field(description="How many neurons it scales")
    experts_off: _ExpertsOff = 0
    positions: str = Field(description="The tokens that were masked", pattern=PATTERN)

    @classmethod
    def of(cls, resolved: ResolvedMask | None) -> Self | None:
        """The description of a resolved mask; None for unmasked."""
        if resolved is None:
            return None
        return cls(
            name=resolved.name,
            digest=resolved.mask.digest,
            neurons=resolved.mask.neurons,
            experts_off=resolved.mask.experts_off,
            positions=str(resolved.positions),
        )


class Usage(BaseModel):
    """Tokens that the model read and wrote."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int) -> Self:
        """Usage with the total of both counts."""
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )


class ScoreUsage(Usage):
    """Tokens of all scored sequences, and how many of them the model read for it.

    What sequences share is read once, so both numbers together may be less than `prompt_tokens`.
    """

    computed_tokens: int = Field(description="Tokens that were computed now")
    cached_tokens: int = Field(description="Tokens that came from the prefix cache")

    @classmethod
    def of_scored(cls, prompt_tokens: int, computed_tokens: int, cached_tokens: int) -> Self:
        """Usage without a completion."""
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=0,
            total_tokens=prompt_tokens,
            computed_tokens=computed_tokens,
            cached_tokens=cached_tokens,
        )


class Token(BaseModel):
    """A token with its log-probability in nats."""

    token_id: int
    token: str
    logprob: float


class GeneratedToken(Token):
    """A generated token, and the most likely alternatives at its position."""

    top: list[Token] = Field(description="The most likely tokens at this position")


_Encoded = list[float] | list[list[float]] | str | None


def _values(description: str) -> Any:
    return Field(None, description=description, exclude_if=lambda values: values is None)


class LayerActivations(BaseModel):
    """The values of one layer's neurons, as lists or as base64 of little-endian float32."""

    layer: int
    neurons: list[int] | None = Field(description="Those asked for, in their order; null for all of the layer")
    values: _Encoded = _values("Of each token, of each neuron; without a reduction")
    mean: _Encoded = _values("Of each neuron, over tokens")
    mean_abs: _Encoded = _values("Of each neuron, the mean of absolute values over tokens")
    max: _Encoded = _values("Of each neuron, the largest value")
    positive: _Encoded = _values("Of each neuron, the share of tokens at which it is above 0")
    act_positive: _Encoded = _values("Of each neuron, the share of tokens at which act(gate) is above 0")
    up_mean_abs: _Encoded = _values("Of each neuron, the mean of absolute values of up over tokens")


class ActivationsSeen(BaseModel):
    """The values of the neurons that were asked for, before the mask."""

    first: int = Field(description="Position of the first token that counts")
    tokens: int = Field(description="How many tokens count")
    layers: list[LayerActivations]


_Seen = Annotated[
    ActivationsSeen | None,
    Field(description="With `activations`; otherwise left out", exclude_if=lambda seen: seen is None),
]


class Output(BaseModel):
    """One continuation; `index` is that of its prompt."""

    index: int
    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    logprobs: list[GeneratedToken] | None = None
    activations: _Seen = None


class GenerateAnswer(BaseModel):
    """The continuations of all prompts, in their order."""

    model: str
    mask: MaskUsed | None
    outputs: list[Output]
    usage: Usage


class Delta(BaseModel):
    """One server-sent event of a streamed generation."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: list[GeneratedToken] | None = None


class Score(BaseModel):
    """The log-probability of a text."""

    logprob: float = Field(description="Sum over the scored tokens, in nats")
    tokens: int
    bytes: int = Field(description="UTF-8 length of the scored text")
    token_logprobs: list[Token] | None = Field(
        None, description="Of each scored token, with `return_tokens`; a token that ends within a character has no text"
    )


class ContinuationScore(Score):
    """The log-probability of a continuation, given its context."""

    is_greedy: bool = Field(description="Whether greedy decoding would produce this continuation")
    question: int | None = Field(None, description="With `questions`: which of them it belongs to, from 0")


class ScoreAnswer(BaseModel):
    """The scores of all texts or continuations, in their order."""

    model: str
    mask: MaskUsed | None
    scores: list[ContinuationScore | Score]
    usage: ScoreUsage
    activations: _Seen = None
    prompts: list[list[int]] | None = Field(
        default=None,
        description="With `return_prompts`: the token ids that the model read, each sequence without its last; a text "
        "with it, if `activations` of it are asked for",
    )

    def pieces(self) -> Iterator[bytes]:
        """The answer as JSON, in pieces of a score or a prompt each."""
        head = self.model_dump_json(exclude={"scores", "prompts"}, exclude_unset=True)
        yield head.removesuffix("}").encode() + b', "scores": '
        yield from _array(score.model_dump_json(exclude_unset=True) for score in self.scores)
        if self.prompts is not None:
            yield b', "prompts": '
            yield from _array(json.dumps(prompt) for prompt in self.prompts)
        yield b"}"


class LanguagesRequest(BaseModel):
    """Texts whose languages are asked for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: Annotated[list[_TextOrEmpty], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]


class LanguagesAnswer(BaseModel):
    """The languages of all texts, in their order."""

    languages: list[str | None] = Field(description="Codes as `en`; null where a text is too short or mixed to tell")


class MaskSummary(BaseModel):
    """A mask in a list. neurons: how many it scales; budget: their share of all neurons, if chosen by one."""

    name: str
    digest: str
    neurons: int
    experts_off: _ExpertsOff = 0
    language: str
    method: str
    budget: float | None

    @classmethod
    def of(cls, stored: StoredMask) -> Self:
        """The summary of a stored mask."""
        return cls(
            name=stored.name,
            digest=stored.mask.digest,
            neurons=stored.mask.neurons,
            experts_off=stored.mask.experts_off,
            **cls._provenance(stored),
        )

    @staticmethod
    def _provenance(stored: StoredMask) -> dict[str, Any]:
        return stored.info.model_dump(include={"language", "method", "budget"})


class MaskDetails(MaskSummary):
    """A mask with the whole provenance that its file has."""

    neurons_per_layer: list[int]
    corpus_digest: str | None
    parameters: dict[str, Any]
    created_by: str
    fingerprint: Fingerprint
    transferred_from: Fingerprint | None = Field(description="The model that the neurons were found in, if another")

    @staticmethod
    def _provenance(stored: StoredMask) -> dict[str, Any]:
        return {**stored.info.model_dump(), "neurons_per_layer": stored.mask.neurons_per_layer()}


class LayerNeurons(BaseModel):
    """The neurons of one layer that a mask changes."""

    layer: int
    neurons: list[int]
    scales: list[float] | None = Field(description="Of each neuron; null if all are 0")
    offsets: list[float] | None = Field(
        None,
        description="What is added to each neuron; left out if nothing is",
        exclude_if=lambda offsets: offsets is None,
    )


class LayerDimensions(BaseModel):
    """The dimensions of one layer's MLP output whose scale is not 1."""

    layer: int
    dimensions: list[int]
    scales: list[float] | None = Field(description="Of each dimension; null if all are 0")


class LayerExperts(BaseModel):
    """The experts of one layer that its router may not choose."""

    layer: int
    experts: list[int]


class MaskNeurons(BaseModel):
    """What is in a mask, layer by layer."""

    name: str
    digest: str
    layers: list[LayerNeurons]
    output: list[LayerDimensions] | None = Field(description="Null if the mask leaves the MLPs' output alone")
    router: list[LayerExperts] | None = Field(
        None, description="Left out if routers may choose all experts", exclude_if=lambda of_layers: of_layers is None
    )

    @classmethod
    def pieces(cls, stored: StoredMask) -> Iterator[bytes]:
        """What is in a stored mask, as JSON in pieces of a layer each."""
        head = json.dumps({"name": stored.name, "digest": stored.mask.digest})
        yield head.removesuffix("}").encode() + b', "layers": '
        yield from _array(_of_layer(layer, stored.mask).model_dump_json() for layer in range(stored.mask.layers))
        yield b', "output": '
        if stored.mask.output is None:
            yield b"null"
        else:
            yield from _array(
                LayerDimensions(layer=layer, dimensions=changed, scales=scales).model_dump_json()
                for layer, (changed, scales) in enumerate(map(_changed, stored.mask.output))
            )
        if stored.mask.router is not None:
            yield b', "router": '
            yield from _array(
                LayerExperts(layer=layer, experts=off).model_dump_json()
                for layer, (off, _) in enumerate(map(_changed, stored.mask.router))
            )
        yield b"}"


def _of_layer(layer: int, mask: NeuronMask) -> LayerNeurons:
    scales = mask.intermediate[layer]
    if mask.offset is None:
        changed, own = _changed(scales)
        return LayerNeurons(layer=layer, neurons=changed, scales=own, offsets=None)
    neurons = torch.nonzero((scales != 1) | (mask.offset[layer] != 0)).flatten()
    there, added = scales[neurons], mask.offset[layer][neurons]
    return LayerNeurons(
        layer=layer,
        neurons=neurons.tolist(),
        scales=there.tolist() if bool(there.any()) else None,
        offsets=added.tolist() if bool(added.any()) else None,
    )


def _array(items: Iterable[str]) -> Iterator[bytes]:
    """A JSON array of what is JSON already, an item at a time."""
    yield b"["
    for number, item in enumerate(items):
        yield (f", {item}" if number else item).encode()
    yield b"]"


def _changed(scales: Tensor) -> tuple[list[int], list[float] | None]:
    """The indices where `scales` [n] are not 1, and the scales there: None if all are 0."""
    indices = torch.nonzero(scales != 1).flatten()
    there = scales[indices]
    return indices.tolist(), there.tolist() if bool(there.any()) else None


class InvalidMaskFile(BaseModel):
    """A mask file that cannot be used; requests that name it get 409."""

    name: str
    reason: str


class MaskList(BaseModel):
    """All masks of the server."""

    masks: list[MaskSummary]
    invalid: list[InvalidMaskFile] = Field(description="Mask files that cannot be used, and why")
    default_method: str | None


class Health(BaseModel):
    """The process answers."""

    status: str = "ok"


class Ready(BaseModel):
    """The engine serves this model."""

    status: str = "ready"
    model: str
    version: str
    fingerprint: Fingerprint
    max_model_tokens: int
    kv_cache_tokens: int | None = Field(description="How many tokens the KV cache holds; null if vLLM does not say")
    prompt_start: list[int] = Field(description="Token ids that add_bos=auto puts before a prompt or a context")
    text_start: int | None = Field(description="The one that it puts before a text scored from its start")


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str = Field(description="Kind of error, as OpenAI names them")
    param: str | None = Field(description="The parameter that the error is about")
    code: str = Field(description="A fixed code for programs")


class ErrorAnswer(BaseModel):
    """The answer of every request that fails, in OpenAI's shape."""

    error: ErrorBody


class ErrorEvent(ErrorAnswer):
    """An error in a stream of server-sent events that have a type."""

    type: Literal["error"] = "error"
