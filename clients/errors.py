"""CraneError and EvaluationError: the errors of clients and evaluations."""

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

_TRANSIENT_STATUS = frozenset({429, 503})


class EvaluationError(ValueError):
    """An evaluation cannot start or continue; the message names the problem and what was expected."""


class CraneError(Exception):
    """A request that the server refused, or that got no answer.

    status: the HTTP status, None if no answer came or it broke off; code, message, param, type: from the server's error
    body, or for a missing answer the code `connection_failed`, `read_timeout` or `connection_lost`; retry_after_s: the
    server's Retry-After.
    """

    def __init__(
        self,
        status: int | None,
        code: str,
        message: str,
        param: str | None = None,
        retry_after_s: float | None = None,
        kind: str | None = None,
    ) -> None:
        super().__init__(message if status is None else f"{message} ({code}, status {status})")
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.type = kind

    @property
    def transient(self) -> bool:
        """Whether the same request may succeed later: 429, 503, or a connection that failed."""
        if self.status is None:
            return self.code != "read_timeout"
        return self.status in _TRANSIENT_STATUS

    @classmethod
    def of_response(cls, response: "httpx.Response") -> "CraneError":
        """The error in an answer that is no success (2xx), whose body has been read."""
        retry_after_s = _retry_after_s(response.headers.get("retry-after"))
        try:
            body = response.json()
        except ValueError:
            body = None
        if isinstance(body, dict) and isinstance(body.get("error"), dict):
            return cls.of_body(body["error"], response.status_code, retry_after_s)
        if response.has_redirect_location:
            place = response.headers["location"]
            message = f"redirected to {place!r}, which is not followed; expected the address of the server itself"
            return cls(response.status_code, f"http_{response.status_code}", message)
        detail = body.get("detail", body) if isinstance(body, dict) else response.text
        message = str(detail)[:500] or response.reason_phrase
        return cls(response.status_code, f"http_{response.status_code}", message, retry_after_s=retry_after_s)

    @classmethod
    def of_body(cls, error: Mapping[str, Any], status: int | None, retry_after_s: float | None = None) -> "CraneError":
        """The error described by the server's `{"code", "message", "param", "type"}`."""
        param, kind = error.get("param"), error.get("type")
        return cls(
            status,
            str(error.get("code", f"http_{status}")),
            str(error.get("message", "the server gave no message")),
            None if param is None else str(param),
            retry_after_s,
            None if kind is None else str(kind),
        )

    @classmethod
    def of_transport(cls, error: "httpx.TransportError", server: str) -> "CraneError":
        """The error of a request to `server` that got no answer."""
        import httpx

        if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
            return cls(None, "read_timeout", f"{server} did not answer within the read timeout")
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            reason = str(error) or "the connection timed out"
            return cls(None, "connection_failed", f"cannot connect to {server}: {reason}")
        return cls(None, "connection_lost", f"the connection to {server} broke: {str(error) or type(error).__name__}")


def _retry_after_s(header: str | None) -> float | None:
    """Seconds to wait according to a Retry-After header, whose value is seconds or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(header)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
