"""Runs the network in PyTorch and in ONNX Runtime: answers and latencies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import lmkan_deploy

Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Positions [B, 5, 3] -> energies [B]."""

CALLS = {1: 1_000, 1024: 200}
"""Timed calls by batch size."""

_WARM_UP_CALLS = 20


@dataclass(frozen=True)
class Latency:
    """Microseconds for each row over all timed calls: quartiles."""

    lower: float
    median: float
    upper: float


def predictors(network: nn.Module, onnx_file: Path) -> dict[str, Predict]:
    """The same network three ways, each on one thread."""
    torch.set_num_threads(1)
    return {
        "PyTorch": _pytorch(network),
        "ONNX Runtime alone": _onnx_runtime(
            lmkan_deploy.load_runner(onnx_file, "onnxruntime-function", threads=1)
        ),
        "ONNX Runtime + library": _onnx_runtime(lmkan_deploy.load_runner(onnx_file, threads=1)),
    }


def _pytorch(network: nn.Module) -> Predict:
    def predict(positions: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return network(torch.from_numpy(positions)).numpy()

    return predict


def _onnx_runtime(runner: lmkan_deploy.Runner) -> Predict:
    (source,), (target,) = runner.inputs, runner.outputs

    def predict(positions: NDArray[np.float32]) -> NDArray[np.float32]:
        return runner.run({source.name: positions})[target.name]

    return predict


def latencies(
    ways: dict[str, Predict], positions: NDArray[np.float32], advance: Callable[[], None] = lambda: None
) -> dict[str, dict[int, Latency]]:
    """Latency by way and batch size.

    Args:
        ways: What to time.
        positions: Inputs; each batch is a window of them, the same for all ways.
        advance: Called after each round of calls.
    """
    seconds: dict[str, dict[int, list[float]]] = {name: {size: [] for size in CALLS} for name in ways}
    for size, calls in CALLS.items():
        for call in range(_WARM_UP_CALLS + calls):
            start = call * size % (len(positions) - size + 1)
            batch = positions[start : start + size]
            # In turn, so that another load of the machine meets all of them alike.
            for name, predict in ways.items():
                begin = time.perf_counter()
                predict(batch)
                elapsed = time.perf_counter() - begin
                if call >= _WARM_UP_CALLS:
                    seconds[name][size].append(elapsed)
            advance()
    return {name: {size: _latency(t, size) for size, t in sizes.items()} for name, sizes in seconds.items()}


def rounds() -> int:
    """How often `latencies` calls `advance`."""
    return sum(_WARM_UP_CALLS + calls for calls in CALLS.values())


def _latency(seconds: Sequence[float], size: int) -> Latency:
    lower, median, upper = np.quantile(seconds, (0.25, 0.5, 0.75)) * (1e6 / size)
    return Latency(float(lower), float(median), float(upper))
