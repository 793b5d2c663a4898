"""What Prometheus reads at /metrics: every server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_NEXT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters of one server; times are in seconds."""

    CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self):
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Answered requests", "route", "status")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts of finished sequences")
        self._cached = self._counter("cached_tokens", "Tokens of those prompts that were not read again")
        self._generated = self._counter("generated_tokens", "Tokens generated")
        self._sequences = self._counter("sequences", "Sequences finished")
        self._first = self._histogram("time_to_first_token_seconds", "From acceptance to first token", _FIRST)
        self._next = self._histogram(
            "time_per_token_seconds", "Between two tokens, the mean of each piece", _NEXT
        )

    def watch(self, slots: int, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Gauges that are read when asked for."""
        for name, text, value in (
            ("slots", "Sequences that the cache has room for", lambda: slots),
            ("sequences_running", "Sequences that hold a slot of the cache", running),
            ("sequences_waiting", "Sequences accepted that wait for a slot", waiting),
        ):
            Gauge(f"nemojax_{name}", text, registry=self._registry).set_function(value)

    def answered(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def tokens(self, num: int, seconds: float, first: bool) -> None:
        """`num` tokens of a sequence came `seconds` after the last ones, or after it was accepted."""
        self._generated.inc(num)
        if first:
            self._first.observe(seconds)
        else:
            self._next.observe(seconds / num)

    def finished(self, prompt_tokens: int, cached_tokens: int) -> None:
        self._prompt.inc(prompt_tokens)
        self._cached.inc(cached_tokens)
        self._sequences.inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"nemojax_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"nemojax_{name}", text, buckets=buckets, registry=self._registry)
