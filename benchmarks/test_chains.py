"""Networks of the paper's size: what everything but the lookup kernels costs."""

from __future__ import annotations

import numpy as np
import pytest

import lmkan_deploy
import workloads

NUM_GRIDS = 12
CHAINS = [
    ("chain", (12, 128, 128, 1)),
    ("chain", (32, 256, 256, 1)),
    ("chain", (64, 64, 64, 10)),
    ("batch-last", (32, 256, 256, 1)),
]
BATCHES = [256, 1024]
CASES = [(form, widths, batch) for form, widths in CHAINS for batch in BATCHES]
IDS = [f"{form}-{'-'.join(map(str, widths))}-B{batch}" for form, widths, batch in CASES]


@pytest.mark.parametrize(("form", "widths", "batch"), CASES, ids=IDS)
def test_chains(benchmark, form: str, widths: tuple[int, ...], batch: int) -> None:
    """The whole network, in turns with the kernels of its layers."""
    rng = np.random.default_rng(0)
    if form == "batch-last":
        x = rng.standard_normal((widths[0], batch), dtype=np.float32)
        model, reference = workloads.batch_last_model(widths, NUM_GRIDS)
        session = workloads.new_session(model, library=lmkan_deploy.get_library_path("onnxruntime"))
        network = workloads.checked(session, x, reference, batch_axis=1)
    else:
        x = rng.standard_normal((batch, widths[0]), dtype=np.float32)
        pairs = zip(widths[:-1], widths[1:], strict=True)
        tables = [workloads.random_table(rng, n_in, n_out, NUM_GRIDS) for n_in, n_out in pairs]
        model = workloads.lookup_model(tables)
        network = workloads.lookup(x, tables)
    kernels, calls = workloads.kernels(model, x)
    benchmark.extra_info |= {"kind": "chain", "form": form, "widths": list(widths), "batch": batch}
    benchmark.extra_info["error"] = network.error
    benchmark(network.run)
    rounds = zip(*workloads.in_turns(network.run, kernels, calls), strict=True)
    benchmark.extra_info["lost"] = [(whole - (alone - empty)) / whole for whole, alone, empty in rounds]
