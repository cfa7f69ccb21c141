"""What the benchmarks time: lookup layers in three forms, a dense layer, and whole networks."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

import lmkan_deploy
from lmkan_deploy.converters.onnx_function import function_proto
from lmkan_deploy.converters.quantize import quantize_table
from lmkan_deploy.reference import dequantize_table, lookup2d
from lmkan_deploy.runtime.native import CpuTable, Dtype
from lmkan_deploy.spec import DOMAIN, OP_TYPE, QUANTIZED_OP_TYPE

OPSET = 20

Run = Callable[[], object]

Reference = Callable[[np.ndarray], np.ndarray]
"""Some rows of the input -> those of the output."""

CHECKED_ROWS = 8
ALLOWED_ERROR = 1e-3

PAIRED_SECONDS = 1.0
SHORTEST_TURN = 2e-3
FEWEST_TURNS = 15
WARM_UPS = 10  # lookups have learned the session's threads then


class Workload(NamedTuple):
    """What is timed, and the largest error of the rows that were checked."""

    run: Run
    error: float


def random_table(rng: np.random.Generator, n_in: int, n_out: int, num_grids: int) -> np.ndarray:
    """A table whose outputs have about unit variance."""
    shape = (n_in // 2, num_grids + 1, num_grids + 1, n_out)
    return (rng.standard_normal(shape, dtype=np.float32) * (n_in / 2) ** -0.5).astype(np.float32)


Layer = np.ndarray | tuple[np.ndarray, np.ndarray]
"""A table, or int8 integers and their scales."""


def in_type(table: np.ndarray, form: str) -> Layer:
    """A float32 table in another type: float32, float16, bfloat16 or int8."""
    if form == "int8":
        return quantize_table(table)
    return table.astype(ml_dtypes.bfloat16 if form == "bfloat16" else form)


def _values(layer: Layer) -> np.ndarray:
    return layer if isinstance(layer, np.ndarray) else dequantize_table(*layer)


def lookup_model(layers: Sequence[Layer]) -> onnx.ModelProto:
    """A chain of lookup layers, with the functions that define them."""
    names = ["x", *(f"h{i}" for i in range(1, len(layers))), "y"]
    nodes, weights = [], {}
    for i, layer in enumerate(layers):
        arrays = [layer] if isinstance(layer, np.ndarray) else list(layer)
        inputs = {f"{name}{i}": array for name, array in zip(("table", "scale"), arrays, strict=False)}
        weights |= inputs
        op_type = OP_TYPE if len(arrays) == 1 else QUANTIZED_OP_TYPE
        node = helper.make_node(op_type, [names[i], *inputs], [names[i + 1]], f"layer{i}", domain=DOMAIN)
        nodes.append(node)
    return _model(nodes, weights, 2 * _values(layers[0]).shape[0], _values(layers[-1]).shape[3])


def dense_model(n_in: int, n_out: int) -> onnx.ModelProto:
    """One MatMul."""
    weight = np.random.default_rng(0).standard_normal((n_in, n_out), dtype=np.float32)
    return _model([helper.make_node("MatMul", ["x", "weight"], ["y"])], {"weight": weight}, n_in, n_out)


def identity_model(n_in: int) -> onnx.ModelProto:
    """A graph that does nothing: what a call costs before any work."""
    return _model([helper.make_node("Identity", ["x"], ["y"])], {}, n_in, n_in)


def _model(
    nodes: Sequence[onnx.NodeProto], weights: dict[str, np.ndarray], n_in: int, n_out: int
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "benchmark",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", n_in])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", n_out])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("lmkan", 1)]
    functions = [function_proto(OPSET, op_type) for op_type in (OP_TYPE, QUANTIZED_OP_TYPE)]
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)


def new_session(
    model: onnx.ModelProto, *, library: Path | None = None, threads: int = 1
) -> ort.InferenceSession:
    """A session on the CPU, with the compiled operators where `library` is their library."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def batch_last_model(widths: Sequence[int], num_grids: int) -> tuple[onnx.ModelProto, Reference]:
    """Exported from PyTorch: a BatchNorm and one of upstream's layers for each step, [N_in, B] -> [N_out, B].

    The first BatchNorm has no table before it to go into, and transposes stay at both ends.
    """
    import torch

    from lmkan_deploy.converters.torch_to_onnx import to_onnx
    from lmkan_deploy.runtime.tensors import TensorSpec
    from lmkan_deploy.upstream import LMKAN2DLayer

    class Step(torch.nn.Module):
        def __init__(self, n_in: int, n_out: int) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(n_in)
            self.lmkan = LMKAN2DLayer(num_grids, n_in, n_out)
            self.norm.running_mean.normal_(std=0.1)
            self.norm.running_var.uniform_(0.5, 2.0)
            torch.nn.init.normal_(self.lmkan.func_parameter, std=(n_in / 2) ** -0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lmkan(self.norm(x.T).T)

    torch.manual_seed(0)
    network = torch.nn.Sequential(*(Step(*pair) for pair in zip(widths[:-1], widths[1:], strict=True))).eval()
    model = ir.to_proto(to_onnx(network, [TensorSpec("x", (widths[0], "batch"), "float32")]))
    network.double()  # which the compiled kernel does not take

    def reference(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(x).double()).numpy()

    return model, reference


def lookup(
    x: np.ndarray,
    layers: Sequence[Layer],
    *,
    custom_ops: bool = True,
    threads: int = 1,
) -> Workload:
    """A chain of lookup layers in ONNX Runtime."""
    library = lmkan_deploy.get_library_path("onnxruntime") if custom_ops else None
    session = new_session(lookup_model(layers), library=library, threads=threads)

    def reference(rows: np.ndarray) -> np.ndarray:
        for layer in layers:
            rows = lookup2d(rows, _values(layer))
        return rows

    return checked(session, x, reference)


def dense(x: np.ndarray, n_out: int, *, threads: int = 1) -> Workload:
    """A MatMul of the same shape in ONNX Runtime."""
    model = dense_model(x.shape[1], n_out)
    weight = numpy_helper.to_array(model.graph.initializer[0]).astype(np.float64)
    return checked(new_session(model, threads=threads), x, lambda rows: rows @ weight)


def identity(x: np.ndarray) -> Workload:
    """A graph that does nothing: what a call costs before any work."""
    return checked(new_session(identity_model(x.shape[1])), x, lambda rows: rows)


def embedding_bag(x: np.ndarray, table: np.ndarray) -> Workload:
    """The layer as a PyTorch user would write it: a weighted embedding_bag over the table's rows."""
    import torch

    from lmkan_deploy.torch_op import _lookup2d_torch

    torch.set_num_threads(1)
    features, weights = torch.from_numpy(x), torch.from_numpy(table)
    rows = _spread_rows(len(x))
    error = _largest_error(_lookup2d_torch(features, weights).numpy()[rows], lookup2d(x[rows], table))

    def run() -> object:
        with torch.inference_mode():
            return _lookup2d_torch(features, weights)

    return Workload(run, error)


def checked(
    session: ort.InferenceSession, x: np.ndarray, reference: Reference, *, batch_axis: int = 0
) -> Workload:
    """A call of a session, checked on rows from the first to the last."""
    rows = _spread_rows(x.shape[batch_axis])
    y = session.run(None, {"x": x})[0]
    error = _largest_error(y.take(rows, batch_axis), reference(x.take(rows, batch_axis)))
    return Workload(lambda: session.run(None, {"x": x}), error)


def _spread_rows(batch: int) -> np.ndarray:
    return np.unique(np.linspace(0, batch - 1, CHECKED_ROWS).astype(int))


def _largest_error(y: np.ndarray, want: np.ndarray) -> float:
    """Relative to 1 + |want|, since outputs have about unit variance."""
    error = float((np.abs(y - want) / (1.0 + np.abs(want))).max())
    assert error <= ALLOWED_ERROR, f"expected a largest error of {ALLOWED_ERROR}, found {error}"
    return error


def kernels(model: onnx.ModelProto, x: np.ndarray) -> tuple[Run, Run]:
    """A network's lookups through the C interface, on what reaches each of them there; the same on no rows.

    The difference of both is the kernels' time, since a call from Python takes microseconds itself.
    """
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    weights = {weight.name: numpy_helper.to_array(weight) for weight in model.graph.initializer}
    values = {"x": ort.OrtValue.ortvalue_from_numpy(x)}
    names = [*dict.fromkeys(name for node in nodes for name in (node.input[0], node.output[0]))]
    names = [name for name in names if name not in values]
    found = _with_outputs(model, names).run_with_ort_values(names, values)
    values |= dict(zip(names, found, strict=True))
    calls = [
        (_native_table(weights[node.input[1]]), values[node.input[0]], values[node.output[0]])
        for node in nodes
    ]
    batch = calls[0][1].shape()[0]

    def run(rows: int) -> None:
        for table, source, target in calls:
            table.lookup(source.data_ptr(), target.data_ptr(), Dtype.FLOAT32, rows)

    targets = [target for _, _, target in calls]
    want = [target.numpy().copy() for target in targets]
    for target, array in zip(targets, want, strict=True):
        target.update_inplace(np.zeros_like(array))
    run(batch)
    for target, array in zip(targets, want, strict=True):
        np.testing.assert_array_equal(target.numpy(), array)
    return functools.partial(run, batch), functools.partial(run, 0)


def _with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> ort.InferenceSession:
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    known = {value.name for value in whole.graph.output}
    more = [name for name in names if name not in known]
    whole.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in more)
    return new_session(whole, library=lmkan_deploy.get_library_path("onnxruntime"))


def _native_table(table: np.ndarray) -> CpuTable:
    pairs, points, _, outputs = table.shape
    return CpuTable(table.ctypes.data, Dtype.FLOAT32, pairs, points - 1, outputs)


def in_turns(*runs: Run) -> list[list[float]]:
    """Seconds a call, for each of the runs one number a round.

    They take turns, so that a machine that is slower for a while is slower for all.
    """
    for run in runs:
        _seconds(run, WARM_UPS)
    calls = [max(1, round(SHORTEST_TURN / _seconds(run, 1))) for run in runs]
    seconds: list[list[float]] = [[] for _ in runs]
    started = time.perf_counter()
    while len(seconds[0]) < FEWEST_TURNS or time.perf_counter() - started < PAIRED_SECONDS:
        order = list(range(len(runs)))
        for index in order if len(seconds[0]) % 2 == 0 else order[::-1]:
            seconds[index].append(_seconds(runs[index], calls[index]) / calls[index])
    return seconds


def ratios(seconds: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Of two that took turns, one ratio a round."""
    return [a / b for a, b in zip(seconds, baseline, strict=True)]


def _seconds(call: Run, calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - started
