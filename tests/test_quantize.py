"""int8 tables: rounding, scales, the operator in every runtime, and what calibration does."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import lmkan_deploy
from lmkan_deploy.converters.onnx_function import function_proto, operator_schema
from lmkan_deploy.converters.quantize import corner_importance, quantize_table
from lmkan_deploy.reference import dequantize_table, lookup2d
from lmkan_deploy.spec import QUANTIZED_OP_TYPE

OPSET = 20


def random_table(seed: int, pairs: int, num_grids: int, outputs: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.01, 10, (pairs, 1, 1, outputs))
    shape = (pairs, num_grids + 1, num_grids + 1, outputs)
    return (rng.standard_normal(shape) * spread).astype(np.float32)


@given(st.integers(0, 99), st.integers(1, 4), st.integers(3, 7), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_rounding_is_to_the_nearest_step(seed: int, pairs: int, num_grids: int, outputs: int) -> None:
    table = random_table(seed, pairs, num_grids, outputs)
    quantized, scale = quantize_table(table)
    assert quantized.dtype == np.int8
    assert scale.dtype == np.float32
    error = np.abs(dequantize_table(quantized, scale) - table)
    assert (error <= 0.5001 * scale[:, None, None, :]).all()
    # Every pair and output uses the whole range, and a table's negative rounds alike.
    assert (np.abs(quantized).max(axis=(1, 2)) == 127).all()
    np.testing.assert_array_equal(quantize_table(-table)[0], -quantized)


@pytest.mark.parametrize("value", [0.0, 1e-44, 3e38])
def test_tables_without_range_or_at_its_ends(value: float) -> None:
    table = np.full((2, 4, 4, 3), value, np.float32)
    quantized, scale = quantize_table(table)
    assert np.isfinite(scale).all()
    np.testing.assert_allclose(dequantize_table(quantized, scale), table, rtol=1e-6, atol=1e-40)


def test_importance_is_the_squared_weights() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 3, 4)) * 2
    importance = corner_importance(x, 5)
    assert importance.shape == (2, 6, 6)
    # The lookup of a table that is 1 at one entry gives that entry's weight.
    for pair, i1, i2 in [(0, 0, 0), (0, 2, 3), (1, 5, 1), (1, 4, 4)]:
        table = np.zeros((2, 6, 6, 1))
        table[pair, i1, i2] = 1
        np.testing.assert_allclose(importance[pair, i1, i2], np.square(lookup2d(x, table)).sum())


def test_rows_that_are_not_finite_count_for_nothing() -> None:
    x = np.random.default_rng(0).standard_normal((5, 2))
    spoiled = np.concatenate([x, [[np.nan, 0], [0, np.inf]]])
    np.testing.assert_array_equal(corner_importance(spoiled, 4), corner_importance(x, 4))
    assert (corner_importance(spoiled[5:], 4) == 0).all()


def test_calibration_clips_what_the_data_never_meets() -> None:
    rng = np.random.default_rng(1)
    table = rng.standard_normal((2, 9, 9, 3)).astype(np.float32)
    table[:, 0, 0] = 20  # far in the corner, where no data is
    x = rng.uniform(-0.5, 0.5, (60_000, 4))
    want = lookup2d(x[50_000:], table)

    def error(importance: np.ndarray | None) -> float:
        y = lookup2d(x[50_000:], dequantize_table(*quantize_table(table, importance)))
        return float(np.sqrt(np.mean((y - want) ** 2)))

    assert error(corner_importance(x[:50_000], 8)) < 0.5 * error(None)


def test_calibration_on_few_rows_does_no_harm() -> None:
    rng = np.random.default_rng(2)
    table = random_table(3, 4, 12, 8)
    x = rng.standard_normal((2000, 8))
    want = lookup2d(x, table)

    def error(importance: np.ndarray | None) -> float:
        y = lookup2d(x, dequantize_table(*quantize_table(table, importance)))
        return float(np.sqrt(np.mean((y - want) ** 2)))

    assert error(corner_importance(x[:5], 12)) < 1.05 * error(None)


def quantized_model(
    quantized: np.ndarray, scale: np.ndarray, dtype: int, *, constant: bool = True
) -> onnx.ModelProto:
    """One node; the table and its scales as initializers or as inputs."""
    n_in, n_out = 2 * quantized.shape[0], quantized.shape[3]
    info = helper.make_tensor_value_info
    inputs = [info("x", dtype, [None, n_in])]
    if not constant:
        inputs += [
            info("table", TensorProto.INT8, [None, None, None, None]),
            info("scale", TensorProto.FLOAT, [None, None]),
        ]
    weights = [numpy_helper.from_array(quantized, "table"), numpy_helper.from_array(scale, "scale")]
    graph = helper.make_graph(
        [helper.make_node(QUANTIZED_OP_TYPE, ["x", "table", "scale"], ["y"], "layer", domain="lmkan")],
        "model",
        inputs,
        [info("y", dtype, [None, n_out])],
        weights if constant else [],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("lmkan", 1)]
    functions = [function_proto(OPSET, QUANTIZED_OP_TYPE)]
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)


def session(model: onnx.ModelProto, *, custom_ops: bool, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if custom_ops:
        lmkan_deploy.register_custom_ops(options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_non_finite_scales_are_refused() -> None:
    quantized, scale = quantize_table(random_table(0, 3, 4, 7))
    scale[2, 6] = np.inf
    with pytest.raises(
        Exception, match='node "layer": expected finite values in scale, found 1 NaN or infinite'
    ):
        session(quantized_model(quantized, scale, TensorProto.FLOAT), custom_ops=True)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("shape", [(1, 3, 1), (3, 4, 7), (19, 8, 33), (5, 26, 129)], ids=str)
def test_runtimes_agree(shape: tuple[int, int, int], constant: bool) -> None:
    quantized, scale = quantize_table(random_table(0, *shape))
    model = quantized_model(quantized, scale, TensorProto.FLOAT, constant=constant)
    operator_schema(QUANTIZED_OP_TYPE)
    onnx.checker.check_model(model, full_check=True)
    rng = np.random.default_rng(1)
    for rows in (0, 1, 3, 19, 111):
        x = (rng.standard_normal((rows, 2 * shape[0])) * 2).astype(np.float32)
        feeds = {"x": x} | ({} if constant else {"table": quantized, "scale": scale})
        want = lookup2d(x, dequantize_table(quantized, scale))
        # The kernel's weights are multiples of 2^-14, or of 2^-11 beyond the grid.
        steps = np.sqrt(np.square(scale.astype(np.float64)).sum(axis=0))
        # Far outside of the grid float32 itself cancels, in every runtime.
        rounding = 1e-5 * np.abs(want).max(initial=0)
        for custom_ops, allowed in ((True, 0.05 * steps), (False, 2e-4 * steps)):
            y = session(model, custom_ops=custom_ops).run(None, feeds)[0]
            assert y.shape == want.shape
            assert (np.abs(y - want) <= allowed + rounding).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_features(dtype: str) -> None:
    quantized, scale = quantize_table(random_table(0, 3, 8, 17))
    code = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[dtype]
    rng = np.random.default_rng(1)
    x = rng.standard_normal((20, 6)).astype(np.float16 if dtype == "float16" else ml_dtypes.bfloat16)
    # bfloat16 does not pass through NumPy: casts around the node.
    model = quantized_model(quantized, scale, code)
    graph = model.graph
    graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
    graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    graph.node[0].input[0], graph.node[0].output[0] = "narrow_x", "narrow_y"
    graph.node.insert(0, helper.make_node("Cast", ["x"], ["narrow_x"], to=code))
    graph.node.append(helper.make_node("Cast", ["narrow_y"], ["y"], to=TensorProto.FLOAT))
    want = lookup2d(x, dequantize_table(quantized, scale))
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    for custom_ops in (True, False):
        y = session(model, custom_ops=custom_ops).run(None, {"x": x.astype(np.float32)})[0]
        # The kernel's weights are multiples of 2^-14, or of 2^-11 beyond the grid.
        near = np.abs(x.astype(np.float32)).max(axis=1) < 2.3
        for rows, atol in ((near, 1e-2), (~near, 8e-2)):
            assert rows.any()
            np.testing.assert_allclose(y[rows], want[rows], rtol=1.01 * unit, atol=atol * scale.max())


def test_threads_agree_bit_for_bit() -> None:
    quantized, scale = quantize_table(random_table(0, 16, 8, 65))
    model = quantized_model(quantized, scale, TensorProto.FLOAT)
    x = np.random.default_rng(0).standard_normal((1500, 32), dtype=np.float32) * 3
    one, two = (session(model, custom_ops=True, threads=n).run(None, {"x": x})[0] for n in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_rows_that_are_not_finite_stay_alone() -> None:
    quantized, scale = quantize_table(random_table(0, 4, 8, 33))
    model = quantized_model(quantized, scale, TensorProto.FLOAT)
    x = np.random.default_rng(0).standard_normal((12, 8), dtype=np.float32)
    clean = session(model, custom_ops=True).run(None, {"x": x})[0]
    x[3, 5], x[7, 0], x[8, 2] = np.nan, np.inf, -np.inf
    y = session(model, custom_ops=True).run(None, {"x": x})[0]
    bad = np.array([3, 7, 8])
    assert not np.isfinite(y[bad]).any()
    good = np.delete(np.arange(12), bad)
    np.testing.assert_array_equal(y[good], clean[good])


def test_shapes_that_contradict_each_other_are_refused() -> None:
    quantized, scale = quantize_table(random_table(0, 4, 8, 3))
    x = np.zeros((2, 8), np.float32)
    run = session(quantized_model(quantized, scale, TensorProto.FLOAT, constant=False), custom_ops=True).run
    with pytest.raises(Exception, match=r"expected scale \[4, 3\].*found \[4, 2\]"):
        run(None, {"x": x, "table": quantized, "scale": scale[:, :2]})
    with pytest.raises(Exception, match=r"LMKAN2DQuantized node \"layer\": expected x \[\.\.\., 6\]"):
        run(None, {"x": x, "table": quantized[:3], "scale": scale[:3]})
    bad = quantized_model(quantized, scale[:2], TensorProto.FLOAT)
    with pytest.raises(Exception, match=r"expected scale \[4, 3\].*found \[2, 3\]"):
        session(bad, custom_ops=True)
