"""One layer on two threads, in turns with one."""

from __future__ import annotations

import numpy as np
import pytest

import workloads

WIDTH, BATCH = 128, 4096


@pytest.mark.parametrize("num_grids", [8, 26])
def test_threads(benchmark, num_grids: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, WIDTH), dtype=np.float32)
    table = workloads.random_table(rng, WIDTH, WIDTH, num_grids)
    one, two = (workloads.lookup(x, [table], threads=threads) for threads in (1, 2))
    benchmark.extra_info |= {"kind": "threads", "width": WIDTH, "num_grids": num_grids, "batch": BATCH}
    benchmark.extra_info["error"] = two.error
    benchmark(two.run)
    benchmark.extra_info["ratios"] = workloads.ratios(*workloads.in_turns(one.run, two.run))
