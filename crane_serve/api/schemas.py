"""Request and answer bodies. Log-probabilities are in nats."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from crane_serve.masks import Fingerprint, Positions, ResolvedMask, StoredMask

MAX_ITEMS = 1024
_Text = Annotated[str, Field(min_length=1)]
_TextOrEmpty = Annotated[str, Field(min_length=0)]  # a length makes pydantic refuse what UTF-8 cannot encode


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    mask: str | None = Field(None, description="Mask name, or names joined with commas; 'none' for no mask")


class GenerateRequest(_Request):
    prompt: _Text | Annotated[list[_Text], Field(min_length=1, max_length=MAX_ITEMS)]
    max_tokens: int = Field(128, ge=1, lt=2**31)
    temperature: float = Field(1.0, ge=0, le=10, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: _Text | Annotated[list[_Text], Field(max_length=16)] | None = None
    logprobs: int | None = Field(None, ge=0, le=20, description="Alternatives to return per generated token")
    stream: bool = False
    positions: Annotated[Positions, Field(strict=False)] | None = Field(
        None, description="The tokens to be masked: all (default), prompt or generated"
    )

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ScoreRequest(_Request):
    """Either `text`, scored from its start, or `continuations`, each scored after `context`."""

    text: Annotated[list[_TextOrEmpty], Field(min_length=1, max_length=MAX_ITEMS)] | None = None
    context: _TextOrEmpty | None = None
    continuations: Annotated[list[_Text], Field(min_length=1, max_length=MAX_ITEMS)] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        texts, pairs = self.text is not None, self.context is not None or self.continuations is not None
        if texts == pairs or (pairs and (self.context is None or self.continuations is None)):
            raise ValueError("expected either 'text', or 'context' and 'continuations'")
        return self


class MaskUsed(BaseModel):
    """The mask that an answer was computed under."""

    name: str
    digest: str
    neurons: int = Field(description="How many neurons it scales")
    positions: Positions = Field(description="The tokens that were masked")

    @classmethod
    def of(cls, resolved: ResolvedMask | None) -> Self | None:
        if resolved is None:
            return None
        return cls(
            name=resolved.name,
            digest=resolved.mask.digest,
            neurons=resolved.mask.neurons,
            positions=resolved.positions,
        )


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int) -> Self:
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )


class Token(BaseModel):
    token_id: int
    token: str
    logprob: float


class GeneratedToken(Token):
    top: list[Token] = Field(description="The most likely tokens at this position")


class Output(BaseModel):
    index: int
    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    logprobs: list[GeneratedToken] | None = None


class GenerateAnswer(BaseModel):
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
    logprob: float = Field(description="Sum over the scored tokens, in nats")
    tokens: int
    bytes: int = Field(description="UTF-8 length of the scored text")


class ContinuationScore(Score):
    is_greedy: bool = Field(description="Whether greedy decoding would produce this continuation")


class ScoreAnswer(BaseModel):
    model: str
    mask: MaskUsed | None
    scores: list[ContinuationScore | Score]
    usage: Usage


class MaskSummary(BaseModel):
    name: str
    digest: str
    neurons: int
    language: str
    method: str
    budget: float | None

    @classmethod
    def of(cls, stored: StoredMask) -> Self:
        return cls(name=stored.name, digest=stored.mask.digest, neurons=stored.mask.neurons, **cls._provenance(stored))

    @staticmethod
    def _provenance(stored: StoredMask) -> dict[str, Any]:
        return stored.info.model_dump(include={"language", "method", "budget"})


class MaskDetails(MaskSummary):
    neurons_per_layer: list[int]
    corpus_digest: str | None
    parameters: dict[str, Any]
    created_by: str
    fingerprint: Fingerprint
    transferred_from: Fingerprint | None = Field(description="The model that the neurons were found in, if another")

    @staticmethod
    def _provenance(stored: StoredMask) -> dict[str, Any]:
        return {**stored.info.model_dump(), "neurons_per_layer": stored.mask.neurons_per_layer()}


class InvalidMaskFile(BaseModel):
    name: str
    reason: str


class MaskList(BaseModel):
    masks: list[MaskSummary]
    invalid: list[InvalidMaskFile] = Field(description="Mask files that cannot be used, and why")
    default_method: str | None


class Health(BaseModel):
    status: str = "ok"


class Ready(BaseModel):
    status: str = "ready"
    model: str
    version: str
    fingerprint: Fingerprint
    max_model_tokens: int


class ErrorBody(BaseModel):
    message: str
    type: str = Field(description="Kind of error, as OpenAI names them")
    param: str | None = Field(description="The parameter that the error is about")
    code: str = Field(description="What programs may rely on")


class ErrorAnswer(BaseModel):
    error: ErrorBody
