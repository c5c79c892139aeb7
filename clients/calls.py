"""Call: one request to the server and the type of its answer; both clients send these."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypedDict, TypeVar
from urllib.parse import quote

import httpx
from pydantic import ValidationError

from clients.answers import Answer, Generation, Health, MaskListing, MaskSummary, Readiness, Scores
from clients.errors import CraneError

AnswerType = TypeVar("AnswerType", bound=Answer)


class Sampling(TypedDict, total=False):
    """Sampling options of /generate; what is left out is the server's default."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: str | list[str]
    logprobs: int
    positions: str  # which tokens the mask is for: all, prompt or generated


@dataclass(frozen=True)
class Call(Generic[AnswerType]):
    """A request: method, path, the type of its answer, query parameters and JSON body."""

    method: str
    path: str
    answer: type[AnswerType]
    query: dict[str, str] | None = None
    body: dict[str, Any] | None = None

    def parse(self, response: httpx.Response) -> AnswerType:
        """The typed answer in a response whose body has been read. Raises CraneError for anything else."""
        if response.status_code >= 400:
            raise CraneError.of_response(response)
        try:
            return self.answer.model_validate_json(response.content)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "body"
            raise CraneError(
                response.status_code,
                "invalid_answer",
                f"{self.path} did not answer as a crane server does: {where}: {problem['msg']}",
            ) from error


def generate(
    prompt: str | Sequence[str], mask: str | None, sampling: Sampling, *, stream: bool = False
) -> Call[Generation]:
    """Complete one prompt or several."""
    prompts = prompt if isinstance(prompt, str) else list(prompt)
    body: dict[str, Any] = {"prompt": prompts, **sampling}
    if stream:
        body["stream"] = True
    return Call("POST", "generate", Generation, _mask_query(mask), body)


def score_text(texts: str | Sequence[str], mask: str | None) -> Call[Scores]:
    """Score whole texts."""
    return Call("POST", "score", Scores, _mask_query(mask), {"text": _as_list(texts)})


def score_continuations(context: str, continuations: Sequence[str], mask: str | None) -> Call[Scores]:
    """Score continuations of one context."""
    body = {"context": context, "continuations": _as_list(continuations)}
    return Call("POST", "score", Scores, _mask_query(mask), body)


def masks() -> Call[MaskListing]:
    """List the server's masks."""
    return Call("GET", "masks", MaskListing)


def mask(name: str) -> Call[MaskSummary]:
    """Describe one mask."""
    return Call("GET", f"masks/{quote(name, safe='')}", MaskSummary)


def ready() -> Call[Readiness]:
    """Ask whether the engine takes requests."""
    return Call("GET", "ready", Readiness)


def health() -> Call[Health]:
    """Ask whether the process is up."""
    return Call("GET", "health", Health)


def _mask_query(name: str | None) -> dict[str, str] | None:
    return None if name is None else {"mask": name}


def _as_list(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)
