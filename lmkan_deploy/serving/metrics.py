"""Prometheus metrics of the server, and what statistics and the status page read from them."""

from __future__ import annotations

import asyncio
import collections
import os
from bisect import bisect_left
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_ROWS = tuple(2**i for i in range(15))

SUCCESS = ("200", "OK")
"""Statuses of answers with outputs, in HTTP and gRPC."""

MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus-client's environment variable: worker processes add up their metrics through files in it."""


_FLUSH_SECONDS = 0.05
"""How long counts of requests may wait. One by one they would take a twentieth of a request's time where
several processes share them through files."""


class _Histogram(Histogram):
    """A histogram that takes many values at once."""

    def observe_all(self, values: list[float]) -> None:
        """Like `observe` for each of them."""
        self._sum.inc(sum(values))
        buckets = collections.Counter(bisect_left(self._upper_bounds, value) for value in values)
        for bucket, count in buckets.items():
            self._buckets[bucket].inc(count)


class Metrics:
    """All metrics of one process; one instance a process, since their names are global.

    Everything has the labels `model` and `version`.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._models: dict[tuple[str, str], ModelMetrics] = {}
        labels = ("model", "version")

        def options(name: str, what: str, *more: str) -> dict[str, Any]:
            return {
                "name": f"lmkan_{name}",
                "documentation": what,
                "labelnames": (*labels, *more),
                "registry": self.registry,
            }

        self.requests = Counter(
            **options("requests_total", "Answered requests, by protocol and status.", "protocol", "status")
        )
        what = "From the complete request to its answer, where it has one with outputs."
        self.latency = _Histogram(**options("request_seconds", what), buckets=_SECONDS)
        self.rows = Counter(**options("rows_total", "Rows that the model ran."))
        self.batch_rows = Histogram(**options("batch_rows", "Rows of one run of the model."), buckets=_ROWS)
        self.batch_requests = Histogram(
            **options("batch_requests", "Requests that one run served."), buckets=_ROWS
        )
        self.run_seconds = Histogram(**options("run_seconds", "One run of the model."), buckets=_SECONDS)
        self.queue_rows = Gauge(
            **options("queue_rows", "Rows that wait for a run."), multiprocess_mode="livesum"
        )
        self.loads = Counter(**options("loads_total", "Loads of a model, by result.", "result"))

    def of_model(self, model: str, version: str) -> ModelMetrics:
        """What one version of a model counts, over all its loads."""
        if (model, version) not in self._models:
            self._models[model, version] = ModelMetrics(self, model, version)
        return self._models[model, version]

    def text(self) -> bytes:
        """The page that Prometheus reads: all worker processes together."""
        self.flush()
        return generate_latest(self._collectors())

    def samples(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Sample name -> values of its labels in alphabetical order -> value, over all worker processes."""
        self.flush()
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for metric in self._collectors().collect():
            for sample in metric.samples:
                key = tuple(value for _, value in sorted(sample.labels.items()))
                found.setdefault(sample.name, {})[key] = sample.value
        return found

    def flush(self) -> None:
        """Counts what waits to be counted."""
        for model in self._models.values():
            model.flush()

    def _collectors(self) -> CollectorRegistry:
        if MULTIPROCESS_FOLDER not in os.environ:
            return self.registry
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return registry


class ModelMetrics:
    """Implements `BatchObserver`."""

    def __init__(self, metrics: Metrics, model: str, version: str) -> None:
        self._requests = metrics.requests
        self._labels = (model, version)
        self._latency = metrics.latency.labels(model, version)
        self._rows = metrics.rows.labels(model, version)
        self._batch_rows = metrics.batch_rows.labels(model, version)
        self._batch_requests = metrics.batch_requests.labels(model, version)
        self._run_seconds = metrics.run_seconds.labels(model, version)
        self._queue_rows = metrics.queue_rows.labels(model, version)
        self._last_queue_rows = 0
        # What was answered since the last flush.
        self._counts: dict[tuple[str, str], int] = {}
        self._seconds: list[float] = []

    def queued(self, rows: int) -> None:
        """See `BatchObserver.queued`."""
        if rows != self._last_queue_rows:
            self._last_queue_rows = rows
            self._queue_rows.set(rows)

    def ran(self, rows: int, requests: int, seconds: float) -> None:
        """See `BatchObserver.ran`."""
        self._rows.inc(rows)
        self._batch_rows.observe(rows)
        self._batch_requests.observe(requests)
        self._run_seconds.observe(seconds)

    def answered(self, protocol: str, status: str, seconds: float) -> None:
        """A request was answered, well or not."""
        if not self._counts:
            asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self.flush)
        key = (protocol, status)
        self._counts[key] = self._counts.get(key, 0) + 1
        if status in SUCCESS:
            self._seconds.append(seconds)

    def flush(self) -> None:
        """See `Metrics.flush`."""
        counts, self._counts = self._counts, {}
        seconds, self._seconds = self._seconds, []
        for key, count in counts.items():
            self._requests.labels(*self._labels, *key).inc(count)
        if seconds:
            self._latency.observe_all(seconds)


def forget_process(pid: int) -> None:
    """Takes a dead worker process out of the sums of gauges."""
    if MULTIPROCESS_FOLDER in os.environ:
        mark_process_dead(pid)  # type: ignore[no-untyped-call]
