"""Metrics: the service's own counts, in a Prometheus registry separate from vLLM's."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from crane_serve.common.masks.library import UNMASKED
from crane_serve.engine.service import EngineService
from crane_serve.service.api.gate import Gate

UNMATCHED = "unmatched"
"""The label of a request that matches no route."""

MAX_MASKS = 1000
"""How many mask names become labels; each costs memory here and in Prometheus."""

_COMBINED = "combined"
_OTHER = "other"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """Counts of requests and tokens; gauges whose values are read at each scrape.

    gate: counts the sequences; max_sequences: its limit. The engine is known only after `watch`.
    """

    def __init__(self, gate: Gate, max_sequences: int) -> None:
        self.registry = CollectorRegistry()
        self._gate = gate
        self._engine: EngineService | None = None
        self._masks: set[str] = set()
        self._requests = Counter(
            "crane_requests", "Requests answered", ["route", "mask", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "crane_request_seconds",
            "From the head of a request to the end of its answer",
            ["route", "mask"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._tokens = Counter("crane_tokens", "Tokens through the engine", ["mask", "kind"], registry=self.registry)
        self._in_flight = Gauge("crane_requests_in_flight", "Requests under way", registry=self.registry)
        self._gauge("crane_sequences", "Prompts running or waiting", lambda: gate.sequences)
        self._gauge(
            "crane_sequences_limit",
            "Most prompts running or waiting; more get 429",
            lambda: max_sequences,
        )
        self._gauge(
            "crane_mask_rows", "Different masks that can be resident", self._of_engine(lambda engine: engine.mask_rows)
        )
        self._gauge(
            "crane_mask_rows_used",
            "Different masks that requests use now",
            self._of_engine(lambda engine: engine.mask_rows_used),
        )
        self._gauge(
            "crane_masks", "Masks that requests can name", self._of_engine(lambda engine: len(engine.library.masks))
        )
        self._gauge("crane_ready", "1 while requests are served", self._ready)

    def watch(self, engine: EngineService) -> None:
        """Show this engine, and count the tokens of what it runs."""
        self._engine = engine
        engine.on_tokens = self.on_tokens

    def on_request(self, route: str, mask: str | None, status: int, seconds: float) -> None:
        """Count a request that has ended. route: the template of its path; mask: the name of its mask."""
        label = self._label(mask)
        self._requests.labels(route, label, str(status)).inc()
        self._seconds.labels(route, label).observe(seconds)

    def on_tokens(self, mask: str | None, prompt: int, completion: int) -> None:
        """Count the tokens of a prompt that the engine has run under the mask of this name."""
        label = self._label(mask)
        self._tokens.labels(label, "prompt").inc(prompt)
        self._tokens.labels(label, "completion").inc(completion)

    def enter(self) -> None:
        """A request has arrived."""
        self._in_flight.inc()

    def leave(self) -> None:
        """A request has ended."""
        self._in_flight.dec()

    def text(self) -> bytes:
        """Everything in the Prometheus text format, version 0.0.4: ours, then vLLM's once there is an engine."""
        return generate_latest(self.registry) + (b"" if self._engine is None else self._engine.metrics())

    def _label(self, mask: str | None) -> str:
        if mask is None:
            return UNMASKED
        if "," in mask or "@" in mask:
            return _COMBINED
        if mask not in self._masks:
            if len(self._masks) >= MAX_MASKS:
                return _OTHER
            self._masks.add(mask)
        return mask

    def _gauge(self, name: str, description: str, value: Callable[[], float]) -> None:
        Gauge(name, description, registry=self.registry).set_function(value)

    def _of_engine(self, value: Callable[[EngineService], float]) -> Callable[[], float]:
        return lambda: 0 if self._engine is None else value(self._engine)

    def _ready(self) -> float:
        return float(self._engine is not None and not self._engine.is_dead and not self._gate.closed)
