"""Figures for Prometheus. They have counts and times, and no texts, keys or names of sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from anymamba.generation.engine import EngineStatistics

try:
    from prometheus_client import CollectorRegistry, Counter, Histogram
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
except ImportError as error:
    raise ImportError(f'prometheus-client is needed here ({error}); pip install "anymamba[serve]"') from error

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("anymamba_requests", "HTTP requests", ["endpoint", "status"], registry=self._registry)
        self.first_token = Histogram(
            "anymamba_first_token_seconds",
            "From a request to its first token",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.answer = Histogram(
            "anymamba_answer_seconds",
            "From a request to the end of its answer",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.cancelled = Counter("anymamba_cancelled", "Requests whose client left", registry=self._registry)
        self.sessions_saved = Counter("anymamba_sessions_saved", "States of sessions written", registry=self._registry)

    def watch(self, statistics: Callable[[], EngineStatistics]) -> None:
        """Report an engine's statistics, too."""
        self._registry.register(_EngineCollector(statistics))

    def text(self) -> bytes:
        """All figures in Prometheus' format."""
        return generate_latest(self._registry)


class _EngineCollector:
    def __init__(self, statistics: Callable[[], EngineStatistics]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        """The engine's statistics now."""
        now = self._statistics()
        yield GaugeMetricFamily("anymamba_rows", "Answers that are being generated", now.n_rows)
        yield GaugeMetricFamily("anymamba_reading", "Requests whose prompts are being read", now.n_reading)
        yield GaugeMetricFamily("anymamba_queued", "Requests that wait for a row", now.n_queued)
        yield GaugeMetricFamily("anymamba_step_seconds", "Mean seconds of a step", now.seconds_per_step)
        yield CounterMetricFamily("anymamba_prompt_tokens", "Tokens of prompts", now.prompt_tokens)
        yield CounterMetricFamily("anymamba_cached_tokens", "Tokens of prompts not read again", now.cached_tokens)
        yield CounterMetricFamily("anymamba_new_tokens", "Tokens generated", now.new_tokens)
