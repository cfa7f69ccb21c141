"""Time over the number of grid cells, the batch and the width."""

from __future__ import annotations

import numpy as np
import pytest

import workloads

POINTS = [
    *(("G", 128, grids, 1024) for grids in (3, 5, 8, 12, 16, 20, 26, 32, 40, 52)),
    *(("batch", 128, 12, 4**power) for power in range(9)),
    *(("width", width, 12, 1024) for width in (16, 32, 64, 128, 256, 512, 1024, 2048)),
]


@pytest.mark.parametrize(
    ("curve", "width", "num_grids", "batch"),
    POINTS,
    ids=[f"{c}-{w}-G{g}-B{b}" for c, w, g, b in POINTS],
)
def test_curves(benchmark, curve: str, width: int, num_grids: int, batch: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, width), dtype=np.float32)
    run = workloads.lookup(x, [workloads.random_table(rng, width, width, num_grids)])
    benchmark.extra_info |= {
        "kind": "curve",
        "curve": curve,
        "width": width,
        "num_grids": num_grids,
        "batch": batch,
        "evaluations": batch * width // 2 * width,
    }
    benchmark(run)
