"""Call: one request to the server and the type of its answer; both clients send these."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypedDict, TypeVar
from urllib.parse import quote

import httpx
from pydantic import ValidationError

from clients.answers import Generation, Health, MaskListing, MaskNeurons, MaskSummary, Readiness, Scores
from clients.errors import CraneError
from crane_serve.common.models.prefix import AddBos, Join

AnswerType = TypeVar("AnswerType")
_DEFAULTS = {"add_bos": "auto", "join": "shared", "return_tokens": False, "return_prompts": False}  # the server's


Mask = str | Mapping[str, Any]
"""A name, names joined with commas, or, if the server allows it, a mask itself: {"neurons": {"12": [3, 17]}}."""


class Sampling(TypedDict, total=False):
    """Sampling options of /generate; an option that is left out has the server's default."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: str | list[str]
    logprobs: int
    repetition_penalty: float  # above 1, tokens of the prompt and of the text so far become less likely
    positions: str  # the tokens that the mask applies to: all, prompt, generated, or windows of them: docs/api.md
    activations: dict[str, Any]  # the neurons whose values the answer is to have, of one prompt
    add_bos: AddBos  # whether the model's start token stands before the prompt; "auto" is as the tokenizer does


class _ScoreOptions(TypedDict, total=False):
    add_bos: AddBos  # whether the model's start token stands before the text; False leaves out the first token
    return_tokens: bool  # whether each score has its `token_logprobs`
    return_prompts: bool  # whether the answer has its `prompts`
    activations: dict[str, Any]  # the neurons whose values the answer is to have, of one text or context


class TextOptions(_ScoreOptions, total=False):
    """Options of /score for whole texts; an option that is left out has the server's default."""

    truncate: int  # texts are cut to so many tokens, with what is put before them


class ContinuationOptions(_ScoreOptions, total=False):
    """Options of /score for continuations; an option that is left out has the server's default."""

    join: Join  # where the tokens of a continuation begin


@dataclass(frozen=True)
class Call(Generic[AnswerType]):
    """A request: method, path, a function that reads its answer, query parameters, and a body as JSON or as bytes."""

    method: str
    path: str
    read: Callable[[bytes], AnswerType]
    query: dict[str, str] | None = None
    body: dict[str, Any] | None = None
    content: bytes | None = None
    media_type: str | None = None  # of `content`

    @property
    def request(self) -> dict[str, Any]:
        """The arguments for httpx."""
        headers = None if self.media_type is None else {"Content-Type": self.media_type}
        return {
            "method": self.method,
            "url": self.path,
            "params": self.query,
            "json": self.body,
            "content": self.content,
            "headers": headers,
        }

    def parse(self, response: httpx.Response) -> AnswerType:
        """The typed answer in a response whose body has been read. Raises CraneError for anything else."""
        if not response.is_success:
            raise CraneError.of_response(response)
        try:
            return self.read(response.content)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "body"
            raise CraneError(
                response.status_code,
                "invalid_answer",
                f"{self.path} did not answer as a crane server does: {where}: {problem['msg']}",
            ) from error


def chosen(**options: Any) -> dict[str, Any]:
    """The options without `add_bos` and `join` at their defaults, so that requests look as they did before these
    options existed."""
    return {name: value for name, value in options.items() if name not in _DEFAULTS or value != _DEFAULTS[name]}


def generate(
    prompt: str | Sequence[str], mask: Mask | None, sampling: Sampling, *, stream: bool = False
) -> Call[Generation]:
    """Complete one prompt or several."""
    prompts = prompt if isinstance(prompt, str) else list(prompt)
    body: dict[str, Any] = {"prompt": prompts, **chosen(**sampling)}
    if stream:
        body["stream"] = True
    return Call("POST", "generate", Generation.model_validate_json, _in_query(mask), body | _in_body(mask))


def score_text(texts: str | Sequence[str], mask: Mask | None, options: TextOptions) -> Call[Scores]:
    """Score whole texts."""
    return _score(mask, options, text=_as_list(texts))


def score_continuations(
    context: str, continuations: Sequence[str], mask: Mask | None, options: ContinuationOptions
) -> Call[Scores]:
    """Score continuations of one context."""
    return _score(mask, options, context=context, continuations=_as_list(continuations))


def score_questions(
    questions: Sequence[tuple[str, Sequence[str]]], mask: Mask | None, options: ContinuationOptions
) -> Call[Scores]:
    """Score continuations of several contexts."""
    asked = [{"context": context, "continuations": list(continuations)} for context, continuations in questions]
    return _score(mask, options, questions=asked)


def _score(mask: Mask | None, options: _ScoreOptions, **body: Any) -> Call[Scores]:
    whole = {**body, **chosen(**options), **_in_body(mask)}
    return Call("POST", "score", Scores.model_validate_json, _in_query(mask), whole)


def masks() -> Call[MaskListing]:
    """List the server's masks."""
    return Call("GET", "masks", MaskListing.model_validate_json)


def mask(name: str) -> Call[MaskSummary]:
    """Describe one mask."""
    return Call("GET", _mask_path(name), MaskSummary.model_validate_json)


def mask_neurons(name: str) -> Call[MaskNeurons]:
    """List the neurons of one mask."""
    return Call("GET", f"{_mask_path(name)}/neurons", MaskNeurons.model_validate_json)


def mask_file(name: str) -> Call[bytes]:
    """Read the file of one mask."""
    return Call("GET", f"{_mask_path(name)}/file", bytes)


def put_mask(name: str, content: bytes) -> Call[MaskSummary]:
    """Add or replace a mask."""
    media_type = "application/octet-stream"
    return Call("PUT", _mask_path(name), MaskSummary.model_validate_json, content=content, media_type=media_type)


def delete_mask(name: str) -> Call[None]:
    """Remove a mask."""
    return Call("DELETE", _mask_path(name), lambda _: None)


def ready() -> Call[Readiness]:
    """Ask whether the engine takes requests."""
    return Call("GET", "ready", Readiness.model_validate_json)


def health() -> Call[Health]:
    """Ask whether the process is up."""
    return Call("GET", "health", Health.model_validate_json)


def _mask_path(name: str) -> str:
    return f"masks/{quote(name, safe='')}"


def _in_query(mask: Mask | None) -> dict[str, str] | None:
    return {"mask": mask} if isinstance(mask, str) else None


def _in_body(mask: Mask | None) -> dict[str, Any]:
    return {} if mask is None or isinstance(mask, str) else {"mask": dict(mask)}


def _as_list(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)
