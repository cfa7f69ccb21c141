"""What the benchmarks time: lookup layers in three forms, a dense layer, and whole networks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

import lmkan_deploy
from lmkan_deploy.converters.onnx_function import function_proto
from lmkan_deploy.converters.quantize import quantize_table
from lmkan_deploy.reference import dequantize_table, lookup2d
from lmkan_deploy.spec import DOMAIN, OP_TYPE, QUANTIZED_OP_TYPE

OPSET = 20

Run = Callable[[], object]

PAIRED_SECONDS = 1.0
SHORTEST_TURN = 2e-3
FEWEST_TURNS = 15
WARM_UPS = 10  # lookups have learned the session's threads then


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


def lookup(
    x: np.ndarray,
    layers: Sequence[Layer],
    *,
    custom_ops: bool = True,
    threads: int = 1,
) -> Run:
    """A chain of lookup layers in ONNX Runtime, checked on the first rows."""
    library = lmkan_deploy.get_library_path("onnxruntime") if custom_ops else None
    session = new_session(lookup_model(layers), library=library, threads=threads)
    want = x[:8]
    for layer in layers:
        want = lookup2d(want, _values(layer))
    y = session.run(None, {"x": x})[0]
    np.testing.assert_allclose(y[:8], want, rtol=1e-3, atol=1e-3)
    return lambda: session.run(None, {"x": x})


def dense(x: np.ndarray, n_out: int, *, threads: int = 1) -> Run:
    """A MatMul of the same shape in ONNX Runtime."""
    model = dense_model(x.shape[1], n_out)
    weight = numpy_helper.to_array(model.graph.initializer[0])
    session = new_session(model, threads=threads)
    np.testing.assert_allclose(session.run(None, {"x": x})[0][:8], x[:8] @ weight, rtol=1e-3, atol=1e-3)
    return lambda: session.run(None, {"x": x})


def identity(x: np.ndarray) -> Run:
    """A graph that does nothing: what a call costs before any work."""
    session = new_session(identity_model(x.shape[1]))
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x)
    return lambda: session.run(None, {"x": x})


def embedding_bag(x: np.ndarray, table: np.ndarray) -> Run:
    """The layer as a PyTorch user would write it: a weighted embedding_bag over the table's rows."""
    import torch

    from lmkan_deploy.torch_op import _lookup2d_torch

    torch.set_num_threads(1)
    features, weights = torch.from_numpy(x), torch.from_numpy(table)
    y = _lookup2d_torch(features, weights).numpy()
    np.testing.assert_allclose(y[:8], lookup2d(x[:8], table), rtol=1e-3, atol=1e-3)

    def run() -> object:
        with torch.inference_mode():
            return _lookup2d_torch(features, weights)

    return run


def paired_ratios(run: Run, baseline: Run) -> list[float]:
    """Time of `run` by that of `baseline`, one ratio a turn.

    They take turns, so that a machine that is slower for a while is slower for both.
    """
    pair = (run, baseline)
    for call in pair:
        _seconds(call, WARM_UPS)
    calls = {call: max(1, round(SHORTEST_TURN / _seconds(call, 1))) for call in pair}
    ratios: list[float] = []
    started = time.perf_counter()
    while len(ratios) < FEWEST_TURNS or time.perf_counter() - started < PAIRED_SECONDS:
        order = pair if len(ratios) % 2 == 0 else pair[::-1]
        seconds = {call: _seconds(call, calls[call]) / calls[call] for call in order}
        ratios.append(seconds[run] / seconds[baseline])
    return ratios


def _seconds(call: Run, calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - started
