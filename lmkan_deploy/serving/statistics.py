"""What models did since the server started, from its metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from lmkan_deploy.serving.context import Context
from lmkan_deploy.serving.metrics import SUCCESS, Metrics
from lmkan_deploy.serving.models import ServedModel
from lmkan_deploy.version import __version__

Samples = dict[str, dict[tuple[str, ...], float]]

_NANOSECONDS = 1e9


def model_statistics(models: Sequence[ServedModel], metrics: Metrics) -> list[dict[str, Any]]:
    """In the fields of Triton's `ModelStatistics`; `inference_count` counts rows, as there."""
    samples = metrics.samples()
    result = []
    for model in models:
        key = (model.name, model.version)
        done, failed = _answered(samples, key)
        runs = _value(samples, "lmkan_run_seconds_count", key)
        result.append(
            {
                "name": model.name,
                "version": model.version,
                "inference_count": round(_value(samples, "lmkan_rows_total", key)),
                "execution_count": round(runs),
                "inference_stats": {
                    "success": _duration(done, _value(samples, "lmkan_request_seconds_sum", key)),
                    "fail": _duration(failed, 0.0),
                    "compute_infer": _duration(runs, _value(samples, "lmkan_run_seconds_sum", key)),
                },
            }
        )
    return result


def server_status(context: Context) -> dict[str, Any]:
    """What the status page shows: counters since the start; histograms as bounds and counts below them."""
    samples = context.metrics.samples()
    models = []
    for name in context.store.names:
        versions = context.store.versions(name)
        for model in versions:
            key = (model.name, model.version)
            done, failed = _answered(samples, key)
            models.append(
                {
                    "name": name,
                    "version": model.version,
                    "state": "ready" if model.health.problem is None else "failing",
                    "problem": model.health.problem or context.store.problem(name),
                    "file": model.file.name,
                    "requests": done,
                    "failed": failed,
                    "rows": _value(samples, "lmkan_rows_total", key),
                    "queue_rows": _value(samples, "lmkan_queue_rows", key),
                    "request_seconds": _histogram(samples, "lmkan_request_seconds", key),
                    "batch_rows": _histogram(samples, "lmkan_batch_rows", key),
                }
            )
        if not versions:
            problem = context.store.problem(name)
            state = "unloaded" if problem is None else "failed"
            models.append({"name": name, "version": "", "state": state, "problem": problem})
    return {
        "server": __version__,
        "time": time.time(),
        "ready": context.ready,
        "draining": context.draining,
        "models": models,
    }


def _value(samples: Samples, name: str, key: tuple[str, ...]) -> float:
    return samples.get(name, {}).get(key, 0.0)


def _answered(samples: Samples, key: tuple[str, str]) -> tuple[float, float]:
    """Requests that were answered well, and others."""
    done = failed = 0.0
    for (model, _, status, version), value in samples.get("lmkan_requests_total", {}).items():
        if (model, version) == key:
            if status in SUCCESS:
                done += value
            else:
                failed += value
    return done, failed


def _duration(count: float, seconds: float) -> dict[str, int]:
    return {"count": round(count), "ns": round(seconds * _NANOSECONDS)}


def _histogram(samples: Samples, name: str, key: tuple[str, ...]) -> list[tuple[float | None, float]]:
    """(upper bound, observations up to it), ascending; the last bound is None for infinity."""
    model, version = key
    found = []
    # Labels in alphabetical order: le, model, version.
    for (bound, *labels), value in samples.get(f"{name}_bucket", {}).items():
        if labels == [model, version]:
            found.append((float(bound), value))
    return [(None if math.isinf(bound) else bound, value) for bound, value in sorted(found)]
