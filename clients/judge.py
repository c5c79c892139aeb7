"""Judge: a language model that marks answers, behind any server with OpenAI's /chat/completions."""

import hashlib
import json
import math
import os
import re
from functools import cache
from ssl import SSLContext
from typing import Annotated, Any, Self

import httpx
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from clients.bounded import BoundedError, first_groups
from clients.errors import CraneError, EvaluationError
from clients.retries import RetryPolicy
from clients.templates import Template

_TEMPLATE = Template("""\
Below are a question and the answer that an assistant gave to it. Mark the answer from 1 (useless) to 10 (could not be \
better). Look at whether it is correct, whether it answers what was asked, whether it is fluent, and whether it is in \
the language of the question (ISO code: {{ language }}). Length alone is no merit. An empty answer gets 1.

<question>
{{ question }}
</question>

<answer>
{{ answer }}
</answer>

Give your reasons in one or two sentences. Then end with the mark, exactly in this form: Rating: [[5]]""")
_KEY_VARIABLE = r"CRANE_JUDGE_KEY(_[A-Z0-9_]+)?"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PATTERN = r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]"


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message


class _Completion(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1)]


class Judge(BaseModel):
    """Settings of a judge, as a plan gives them.

    base_url: the address before `/chat/completions`; template: of the prompt, with `question`, `answer` and `language`;
    lowest, highest: of the marks; pattern: a regular expression whose first group is the mark; key_variable: the
    environment variable with the API key, CRANE_JUDGE_KEY or one whose name begins with CRANE_JUDGE_KEY_; the key is
    never written to a plan, result or message; temperature: None to send no temperature, for models that refuse it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str
    model: Annotated[str, Field(min_length=1)]
    template: Template = _TEMPLATE
    lowest: float = 1.0
    highest: float = 10.0
    pattern: str = _PATTERN
    key_variable: Annotated[str, Field(min_length=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 512
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = 0.0
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 300.0

    _retries: RetryPolicy = PrivateAttr(default_factory=RetryPolicy)

    @field_validator("base_url")
    @classmethod
    def _is_address(cls, value: str) -> str:
        try:
            url = httpx.URL(value)
        except httpx.InvalidURL:
            url = httpx.URL("")
        if url.scheme not in {"http", "https"} or not url.host or url.userinfo or url.query or url.fragment:
            raise ValueError("expected an address without credentials or query, such as https://example.org/v1")
        return value.rstrip("/")

    @field_validator("pattern")
    @classmethod
    def _has_group(cls, value: str) -> str:
        try:
            groups = re.compile(value).groups
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{value!r} is not a regular expression: {error}") from error
        if not groups:
            raise ValueError(f"{value!r} has no group; expected one that holds the mark")
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not -math.inf < self.lowest < self.highest < math.inf:
            raise ValueError(f"marks from {self.lowest} to {self.highest}; expected finite ones, the lowest first")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the settings that a reply depends on: model, prompt and sampling."""
        content = [self.model, str(self.template), self.max_tokens, self.temperature]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def host(self) -> str:
        """The host in its address, with the port if one is given that is not the scheme's own."""
        return httpx.URL(self.base_url).netloc.decode()

    def require_safe(self) -> None:
        """Raise EvaluationError for an address that others on the way could read, or a variable that is not meant for
        judges."""
        url = httpx.URL(self.base_url)
        if url.scheme != "https" and url.host not in _LOOPBACK:
            raise EvaluationError(f"judge {self.model} at {self.base_url}: expected https, as it is not this machine")
        if self.key_variable is not None and not re.fullmatch(_KEY_VARIABLE, self.key_variable):
            raise EvaluationError(
                f"judge {self.model}: key_variable is {self.key_variable!r}; expected CRANE_JUDGE_KEY, or a name that "
                "begins with CRANE_JUDGE_KEY_, so that a plan can name no other secret"
            )

    async def ask(self, question: str, answer: str, language: str) -> str:
        """The judge's reply, word for word; empty if the reply has no text.

        429, 503 and failed connections are retried; redirections are not followed. Raises CraneError naming the judge
        for a refusal or an answer that is not a chat completion; EvaluationError if `key_variable` is not set or does
        not contain a key, and as `require_safe` does.
        """
        self.require_safe()
        prompt = self.template.render({"question": question, "answer": answer, "language": language})
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.max_tokens,
        }
        if self.temperature is not None:
            body["temperature"] = self.temperature
        key = self._key()
        # A new client for each question, closed after it, so that none is bound to an old event loop. The costly part
        # of a client, its certificates, is shared; a connection costs little compared with a generation.
        async with httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(self.timeout_s, connect=min(self.timeout_s, 10.0)),
            verify=_certificates(),
            follow_redirects=False,  # to where nobody allowed it
            trust_env=httpx.URL(self.base_url).host not in _LOOPBACK,  # proxies cannot reach loopback addresses
        ) as client:
            try:
                reply: str = await self._retries.awaiting()(self._once, client, body)
            except CraneError as error:
                raise self._named(error, key) from None
        return reply

    def score(self, reply: str) -> float | None:
        """The mark in a reply; None if there is none, if there are different ones, or if it is out of range.

        Raises EvaluationError for a pattern that goes beyond the bounds of a plan's templates.
        """
        try:
            marks = {_number(mark) for mark in first_groups(self.pattern, reply)}
        except BoundedError as error:
            raise EvaluationError(f"judge {self.model}: pattern {self.pattern!r}: {error}") from error
        if len(marks) != 1:
            return None
        (mark,) = marks
        return mark if mark is not None and self.lowest <= mark <= self.highest else None

    def _key(self) -> str | None:
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "")
        if not key or not all("!" <= character <= "~" for character in key):
            raise EvaluationError(
                f"{self.key_variable} holds no API key; expected that of the judge {self.model} there"
            )
        return key

    async def _once(self, client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        try:
            response = await client.post(f"{self.base_url}/chat/completions", json=body)
        except httpx.TransportError as error:
            raise CraneError.of_transport(error, self.base_url) from error
        if not response.is_success:
            raise CraneError.of_response(response)
        try:
            completion = _Completion.model_validate_json(response.content)
        except ValidationError as error:
            problem = "its answer is not a chat completion; expected choices with a message"
            raise CraneError(response.status_code, "invalid_answer", problem) from error
        return completion.choices[0].message.content or ""

    def _named(self, error: CraneError, key: str | None) -> CraneError:
        """The error with the judge's name. The key is removed from the message, since servers may repeat a key that
        they refuse."""
        reason = error.message.replace(key, "***") if key else error.message
        message = f"judge {self.model} at {self.base_url}: {reason}"
        return CraneError(error.status, error.code, message, error.param, error.retry_after_s, error.type)


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


@cache
def _certificates() -> SSLContext:
    return httpx.create_ssl_context()
