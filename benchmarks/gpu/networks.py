"""Times whole networks: ONNX Runtime's CUDA provider against upstream's layers in PyTorch and dense layers.

Usage: networks.py LIBLMKAN_ONNXRUNTIME_CUDA OUTPUT.json [--upstream]

Wall time of calls that wait for the GPU, inputs and outputs in its memory: what a server pays for a batch. Needs
onnxruntime-gpu and PyTorch with CUDA. Exits with 1 where values are wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from cases import Case
from compare import TABLES, checked_rows, expected, narrow, random_tables
from forms import QuantizedTable, upstream_form
from onnx import TensorProto, helper, numpy_helper

from lmkan_deploy.converters.onnx_function import PLUGIN_ATTRIBUTES
from lmkan_deploy.spec import DOMAIN, OP_TYPE, OPSET_VERSION, QUANTIZED_OP_TYPE

NETWORKS = [
    Case((n_in, 256, 256, 1), grids, batch, (8,))
    for n_in, grids in ((32, 12), (32, 28), (12, 12))
    for batch in (1, 64, 1024, 1 << 16)
]
WARM_UPS, RUNS = 20, 50
TOLERANCE = 1e-3


def lookup_model(tables: list[QuantizedTable], batch: int) -> onnx.ModelProto:
    """A chain of lookups."""
    nodes, weights, value = [], [], "x"
    for index, arrays in enumerate(tables):
        names = ["table", "scale"][: 2 if arrays[1] is not None else 1]
        weights += [
            numpy_helper.from_array(array.cpu().numpy(), f"{name}{index}")
            for array, name in zip(arrays, names, strict=False)
        ]
        result = "y" if index == len(tables) - 1 else f"y{index}"
        op_type = OP_TYPE if arrays[1] is None else QUANTIZED_OP_TYPE
        inputs = [value, *(f"{name}{index}" for name in names)]
        nodes.append(helper.make_node(op_type, inputs, [result], domain=DOMAIN, **PLUGIN_ATTRIBUTES))
        value = result
    return _model(nodes, weights, batch, 2 * len(tables[0][0]), tables[-1][0].shape[3])


def dense_model(widths: tuple[int, ...], batch: int) -> onnx.ModelProto:
    """Products and ReLUs of the same widths."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for index, shape in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        weights.append(numpy_helper.from_array(rng.standard_normal(shape, np.float32), f"w{index}"))
        is_last = index == len(widths) - 2
        result = "y" if is_last else f"h{index}"
        nodes.append(helper.make_node("MatMul", [value, f"w{index}"], [result]))
        value = result
        if not is_last:
            nodes.append(helper.make_node("Relu", [value], [f"r{index}"]))
            value = f"r{index}"
    return _model(nodes, weights, batch, widths[0], widths[-1])


def _model(nodes: list, weights: list, batch: int, n_in: int, n_out: int) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, n_in])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, n_out])
    graph = helper.make_graph(nodes, "network", [x], [y], weights)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, OPSET_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def in_onnxruntime(
    model: onnx.ModelProto, library: str, x: torch.Tensor, outputs: int, *, graphs: bool
) -> tuple[Callable[[], object], torch.Tensor]:
    """A call with x and y bound, and y."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.register_custom_ops_library(library)
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options = {"enable_cuda_graph": "1" if graphs else "0", "use_tf32": "0"}
    session = ort.InferenceSession(
        model.SerializeToString(), settings, providers=[("CUDAExecutionProvider", options)]
    )
    y = torch.full((len(x), outputs), torch.nan, device="cuda")
    binding = session.io_binding()
    binding.bind_input("x", "cuda", 0, np.float32, tuple(x.shape), x.data_ptr())
    binding.bind_output("y", "cuda", 0, np.float32, tuple(y.shape), y.data_ptr())
    return lambda: session.run_with_iobinding(binding), y


def in_upstream(case: Case, tables: list[torch.Tensor], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    form = upstream_form(case, case.tiles[0], tables, [x])

    def run() -> torch.Tensor:
        y = form.run(0)
        torch.cuda.synchronize()
        return form.view(y)

    return run


def microseconds(run: Callable[[], object]) -> dict[str, float]:
    for _ in range(WARM_UPS):
        run()
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - began))
    low, median, high = statistics.quantiles(times, n=4)
    return {"median_us": median, "q1_us": low, "q3_us": high}


def error_of(y: torch.Tensor, want: np.ndarray) -> float:
    found = y[checked_rows(len(y))].double().cpu().numpy()
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


def measure(case: Case, library: str, with_upstream: bool) -> dict[str, Any]:
    """Form -> times and error."""
    torch.manual_seed(0)
    x = torch.randn((case.batch, case.widths[0]), device="cuda")
    tables = random_tables(case)
    result: dict[str, Any] = {}
    for name, dtype in TABLES.items():
        narrowed = narrow(tables, dtype)
        want = expected([x], narrowed)[0]
        for graphs in (False, True):
            run, y = in_onnxruntime(
                lookup_model(narrowed, case.batch), library, x, case.widths[-1], graphs=graphs
            )
            times = microseconds(run)
            result[f"{name}{', CUDA graph' if graphs else ''}"] = {**times, "error": error_of(y, want)}
    for graphs in (False, True):
        run, _ = in_onnxruntime(
            dense_model(case.widths, case.batch), library, x, case.widths[-1], graphs=graphs
        )
        result[f"dense{', CUDA graph' if graphs else ''}"] = microseconds(run)
    if with_upstream:
        run = in_upstream(case, tables, x)
        result["upstream"] = {
            **microseconds(run),
            "error": error_of(run(), expected([x], narrow(tables, torch.float32))[0]),
        }
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library")
    parser.add_argument("output", type=Path)
    parser.add_argument("--upstream", action="store_true")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    results, wrong = {}, False
    for case in NETWORKS:
        results[case.name] = found = measure(case, arguments.library, arguments.upstream)
        arguments.output.write_text(json.dumps(results, indent=1))
        print(f"\n{case.name}")
        base = found.get("upstream", {}).get("median_us")
        for name, form in found.items():
            ratio = f"{base / form['median_us']:8.2f} x upstream" if base else ""
            error = f"{form['error']:10.1e}" if "error" in form else ""
            wrong |= not form.get("error", 0.0) < TOLERANCE
            spread = f"({form['q1_us']:.1f} to {form['q3_us']:.1f})"
            print(f"{name:22} {form['median_us']:10.1f} us {spread:20}{ratio}{error}")
        sys.stdout.flush()
    sys.exit(int(wrong))


if __name__ == "__main__":
    main()
