"""Networks of the paper's size: what everything but the lookup kernels costs."""

from __future__ import annotations

import numpy as np
import pytest

import workloads

CHAINS = [(12, 128, 128, 1), (32, 256, 256, 1), (64, 64, 64, 10)]
BATCHES = [256, 1024]
CASES = [(widths, batch) for widths in CHAINS for batch in BATCHES]
IDS = [f"{'-'.join(map(str, widths))}-B{batch}" for widths, batch in CASES]


@pytest.mark.parametrize("part", ["network", 0, 1, 2])
@pytest.mark.parametrize(("widths", "batch"), CASES, ids=IDS)
def test_chains(benchmark, widths: tuple[int, ...], batch: int, part: str | int) -> None:
    """The whole network, and each of its layers alone."""
    rng = np.random.default_rng(0)
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    tables = [workloads.random_table(rng, n_in, n_out, 12) for n_in, n_out in pairs]
    first = 0 if part == "network" else int(part)
    x = rng.standard_normal((batch, widths[first]), dtype=np.float32)
    run = workloads.lookup(x, tables if part == "network" else [tables[first]])
    benchmark.extra_info |= {"kind": "chain", "widths": list(widths), "batch": batch, "part": part}
    benchmark(run)
