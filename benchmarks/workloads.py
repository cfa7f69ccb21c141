"""What the benchmarks time: lookup layers in three forms, a dense layer, and whole networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

import lmkan_deploy
from lmkan_deploy.converters.onnx_function import function_proto
from lmkan_deploy.reference import lookup2d

OPSET = 20
Run = Callable[[], object]


def random_table(rng: np.random.Generator, n_in: int, n_out: int, num_grids: int) -> np.ndarray:
    """A table whose outputs have about unit variance."""
    shape = (n_in // 2, num_grids + 1, num_grids + 1, n_out)
    return (rng.standard_normal(shape, dtype=np.float32) * (n_in / 2) ** -0.5).astype(np.float32)


def _session(
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    n_in: int,
    n_out: int,
    *,
    custom_ops: bool,
    threads: int,
) -> ort.InferenceSession:
    graph = helper.make_graph(
        nodes,
        "benchmark",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", n_in])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", n_out])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("lmkan", 1)]
    model = helper.make_model(graph, functions=[function_proto(OPSET)], opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if custom_ops:
        lmkan_deploy.register_custom_ops(options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def lookup(x: np.ndarray, tables: Sequence[np.ndarray], *, custom_ops: bool = True, threads: int = 1) -> Run:
    """A chain of lookup layers in ONNX Runtime, checked on the first rows."""
    names = ["x", *(f"h{i}" for i in range(1, len(tables))), "y"]
    nodes = [
        helper.make_node("LMKAN2D", [names[i], f"table{i}"], [names[i + 1]], f"layer{i}", domain="lmkan")
        for i in range(len(tables))
    ]
    session = _session(
        nodes,
        {f"table{i}": table for i, table in enumerate(tables)},
        x.shape[1],
        tables[-1].shape[3],
        custom_ops=custom_ops,
        threads=threads,
    )
    want = x[:8]
    for table in tables:
        want = lookup2d(want, table)
    y = session.run(None, {"x": x})[0]
    np.testing.assert_allclose(y[:8], want, rtol=1e-3, atol=1e-3)
    return lambda: session.run(None, {"x": x})


def dense(x: np.ndarray, n_out: int, *, threads: int = 1) -> Run:
    """A MatMul of the same shape in ONNX Runtime."""
    weight = np.random.default_rng(0).standard_normal((x.shape[1], n_out), dtype=np.float32)
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    session = _session([node], {"weight": weight}, x.shape[1], n_out, custom_ops=False, threads=threads)
    np.testing.assert_allclose(session.run(None, {"x": x})[0][:8], x[:8] @ weight, rtol=1e-3, atol=1e-3)
    return lambda: session.run(None, {"x": x})


def identity(x: np.ndarray) -> Run:
    """A graph that does nothing: what a call costs before any work."""
    node = helper.make_node("Identity", ["x"], ["y"])
    session = _session([node], {}, x.shape[1], x.shape[1], custom_ops=False, threads=1)
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
