"""Networks of the paper's size: what everything but the lookup kernels costs."""

from __future__ import annotations

import numpy as np
import pytest

import workloads

CHAINS = [(12, 128, 128, 1), (32, 256, 256, 1), (64, 64, 64, 10)]
BATCHES = [256, 1024]
CASES = [(widths, batch) for widths in CHAINS for batch in BATCHES]
IDS = [f"{'-'.join(map(str, widths))}-B{batch}" for widths, batch in CASES]


@pytest.mark.parametrize(("widths", "batch"), CASES, ids=IDS)
def test_chains(benchmark, widths: tuple[int, ...], batch: int) -> None:
    """The whole network, in turns with its layers, each in a session of its own."""
    rng = np.random.default_rng(0)
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    tables = [workloads.random_table(rng, n_in, n_out, 12) for n_in, n_out in pairs]
    inputs = [rng.standard_normal((batch, n_in), dtype=np.float32) for n_in, _ in pairs]
    network = workloads.lookup(inputs[0], tables)
    layers = [workloads.lookup(x, [table]) for x, table in zip(inputs, tables, strict=True)]
    benchmark.extra_info |= {"kind": "chain", "widths": list(widths), "batch": batch}
    benchmark(network)
    benchmark.extra_info["ratios"] = workloads.paired_ratios(network, lambda: [layer() for layer in layers])
