"""One layer, one thread: against a dense layer, the inlined function, and embedding_bag."""

from __future__ import annotations

import numpy as np
import pytest

import workloads

# N_in, N_out, G, batch; the last of the list is latency.
SHAPES = [
    (128, 128, 8, 1024),
    (128, 128, 26, 1024),
    (512, 512, 8, 4096),
    (512, 512, 26, 1024),
    (64, 64, 12, 8192),
    (128, 128, 26, 1),
]
FORMS = ["dense", "float32", "float16", "bfloat16", "int8"]
OTHER_FORMS = ["function", "embedding_bag", "identity"]
OTHER_SHAPES = [(128, 128, 26, 1024), (128, 128, 26, 1)]

CASES = [(shape, form) for shape in SHAPES for form in FORMS + (OTHER_FORMS if shape in OTHER_SHAPES else [])]


def name(shape: tuple[int, ...]) -> str:
    return "{}x{}-G{}-B{}".format(*shape)


@pytest.mark.parametrize(("shape", "form"), CASES, ids=[f"{name(shape)}-{form}" for shape, form in CASES])
def test_shapes(benchmark, shape: tuple[int, int, int, int], form: str) -> None:
    n_in, n_out, num_grids, batch = shape
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, n_in), dtype=np.float32)
    dense = workloads.dense(x, n_out)
    if form == "dense":
        workload = workloads.dense(x, n_out)
    else:
        table = workloads.random_table(rng, n_in, n_out, num_grids)
        workload = {
            **{
                dtype: lambda dtype=dtype: workloads.lookup(x, [workloads.in_type(table, dtype)])
                for dtype in ("float32", "float16", "bfloat16", "int8")
            },
            "function": lambda: workloads.lookup(x, [table], custom_ops=False),
            "embedding_bag": lambda: workloads.embedding_bag(x, table),
            "identity": lambda: workloads.identity(x),
        }[form]()
    benchmark.extra_info |= {"kind": "shapes", "shape": name(shape), "form": form}
    benchmark.extra_info |= {"evaluations": batch * n_in // 2 * n_out, "error": workload.error}
    benchmark(workload.run)
    others = {"ratios": dense}
    if form in ("function", "embedding_bag"):
        others["float32_ratios"] = workloads.lookup(x, [table])
    own, *baselines = workloads.in_turns(workload.run, *(other.run for other in others.values()))
    for key, seconds in zip(others, baselines, strict=True):
        benchmark.extra_info[key] = workloads.ratios(own, seconds)
