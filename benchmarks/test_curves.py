"""Time over the number of grid cells, the batch and the width."""

from __future__ import annotations

import numpy as np
import pytest

import workloads


@pytest.mark.parametrize("num_grids", [3, 5, 8, 12, 16, 20, 26, 32, 40, 52])
def test_over_grids(benchmark, num_grids: int) -> None:
    time_point(benchmark, "G", num_grids=num_grids)


@pytest.mark.parametrize("batch", [4**power for power in range(9)])
def test_over_batch(benchmark, batch: int) -> None:
    time_point(benchmark, "batch", batch=batch)


@pytest.mark.parametrize("width", [16, 32, 64, 128, 256, 512, 1024, 2048])
def test_over_width(benchmark, width: int) -> None:
    time_point(benchmark, "width", width=width)


def time_point(benchmark, curve: str, *, width: int = 128, num_grids: int = 12, batch: int = 1024) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, width), dtype=np.float32)
    workload = workloads.lookup(x, [workloads.random_table(rng, width, width, num_grids)])
    benchmark.extra_info |= {
        "kind": "curve",
        "curve": curve,
        "width": width,
        "num_grids": num_grids,
        "batch": batch,
        "evaluations": batch * width // 2 * width,
        "error": workload.error,
    }
    benchmark(workload.run)
