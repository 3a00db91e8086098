"""What the server counts, in Prometheus' words, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters and gauges of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "specstream_requests",
            "Requests answered, by endpoint and HTTP status; 499: the client left.",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = self._counter("cached_tokens", "Tokens of prompts a KV cache held.")
        self.tokens = self._counter("generated_tokens", "Tokens generated.")
        self.passes = self._counter("passes", "Passes of the model that generated them.")
        self.drafted = self._counter("drafted_tokens", "Draft tokens verified.")
        self.accepted = self._counter("accepted_tokens", "Generated tokens a stream had proposed.")
        self.first_token = self._histogram(
            "first_token_seconds", "From a request's arrival to its first token."
        )
        self.duration = self._histogram("answer_seconds", "From a request's arrival to its end.")
        self.watch("memory_bytes", "Memory that MLX uses.", mx.get_active_memory)

    def watch(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        """Report what `value` returns at the time of asking."""
        gauge = Gauge(f"specstream_{name}", meaning, registry=self.registry)
        gauge.set_function(value)

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, meaning: str) -> Counter:
        return Counter(f"specstream_{name}", meaning, registry=self.registry)

    def _histogram(self, name: str, meaning: str) -> Histogram:
        return Histogram(f"specstream_{name}", meaning, buckets=_SECONDS, registry=self.registry)
