"""The compiled operator and the function inside ONNX Runtime: types, shapes, errors, threads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import lmkan_deploy
from lmkan_deploy.converters.onnx_function import PLUGIN_ATTRIBUTES, function_proto
from lmkan_deploy.errors import InputError, ModelError
from lmkan_deploy.reference import lookup2d
from lmkan_deploy.runtime.runner import load_runner

FLOATS = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
TOLERANCE = {TensorProto.FLOAT: 1e-5, TensorProto.FLOAT16: 2e-3, TensorProto.BFLOAT16: 2e-2}
NAMES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}


def hand_made(
    table: np.ndarray | None,
    *,
    x_type: int = TensorProto.FLOAT,
    x_shape: tuple = ("batch", "features"),
    function: bool = True,
    table_shape: tuple = ("p", "g", "h", "o"),
) -> onnx.ModelProto:
    """A model of one node, as somebody might write it; the table is an input when None is given."""
    node = helper.make_node("LMKAN2D", ["x", "table"], ["y"], "layer7", domain="lmkan", **PLUGIN_ATTRIBUTES)
    inputs = [helper.make_tensor_value_info("x", x_type, x_shape)]
    initializers = []
    if table is None:
        inputs.append(helper.make_tensor_value_info("table", TensorProto.FLOAT, table_shape))
    else:
        initializers.append(numpy_helper.from_array(table, "table"))
    y_shape = [*x_shape[:-1], "outputs"]
    graph = helper.make_graph(
        [node], "one", inputs, [helper.make_tensor_value_info("y", x_type, y_shape)], initializers
    )
    return helper.make_model(
        graph,
        functions=[function_proto(20)] if function else [],
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("lmkan", 1)],
        ir_version=10,
    )


def session(
    model: onnx.ModelProto, *, custom_ops: bool = True, threads: int = 1, spin: bool = True
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    if custom_ops:
        lmkan_deploy.register_custom_ops(options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-function"])
@pytest.mark.parametrize("table_type", FLOATS, ids=NAMES.get)
@pytest.mark.parametrize("x_type", FLOATS, ids=NAMES.get)
def test_every_pair_of_types(x_type: int, table_type: int, runtime: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((5, 8, 8, 21)).astype(FLOATS[table_type])
    x = rng.standard_normal((9, 10)).astype(FLOATS[x_type])
    onnx.save(hand_made(table, x_type=x_type), tmp_path / "model.onnx")
    runner = load_runner(tmp_path / "model.onnx", runtime)
    y = runner.run({"x": x})["y"]
    assert y.dtype == x.dtype
    want = lookup2d(x, table)
    np.testing.assert_allclose(y.astype(np.float64), want, rtol=TOLERANCE[x_type], atol=TOLERANCE[x_type] * 5)


@pytest.mark.parametrize("custom_ops", [True, False])
@pytest.mark.parametrize("shape", [(0, 10), (1, 10), (10,), (2, 3, 10), (2, 0, 10), (2, 1, 3, 1, 10)])
def test_ranks_and_empty_batches(shape: tuple, custom_ops: bool) -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((5, 8, 8, 3)).astype(np.float32)
    x = rng.standard_normal(shape).astype(np.float32)
    names = tuple(f"d{i}" for i in range(len(shape)))
    y = session(hand_made(table, x_shape=names), custom_ops=custom_ops).run(None, {"x": x})[0]
    np.testing.assert_allclose(y, lookup2d(x, table), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grids", [12, 28, 40])
def test_the_functions_grid_is_as_exact_as_the_operators(grids: int) -> None:
    """A table that counts cells from the middle shows where each feature was found to lie."""
    table = np.broadcast_to(np.arange(grids + 1)[:, None, None] - grids / 2, (1, grids + 1, grids + 1, 1))
    table = np.ascontiguousarray(table, np.float32)
    for side in (-1, 1):
        x = np.zeros((4000, 2), np.float32)
        x[:, 0] = side * np.linspace(0, np.log(grids / 2), 4000)
        want = lookup2d(x, table)
        operator, function = (
            np.sqrt(
                np.mean((session(hand_made(table), custom_ops=custom_ops).run(None, {"x": x})[0] - want) ** 2)
            )
            for custom_ops in (True, False)
        )
        assert function <= 1.4 * operator


def test_shapes_are_inferred() -> None:
    table = np.zeros((5, 8, 8, 3), np.float32)
    model = hand_made(table, x_shape=("batch", 4, 10))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert session(model).get_outputs()[0].shape == ["batch", 4, 3]


@pytest.mark.parametrize("x_type", FLOATS, ids=NAMES.get)
@pytest.mark.parametrize(
    "after",
    [
        [helper.make_node("Shape", ["y"], ["z"])],
        [helper.make_node("Shape", ["y"], ["s"]), helper.make_node("Expand", ["one", "s"], ["z"])],
        [  # ONNX Runtime joins such slices by the size of what they cut
            helper.make_node("Slice", ["y", "zero", "one", "zero"], ["a"]),
            helper.make_node("Slice", ["y", "one", "two", "zero"], ["b"]),
            helper.make_node("Concat", ["a", "b"], ["z"], axis=0),
        ],
    ],
    ids=["Shape", "Expand", "Slice"],
)
def test_free_axes_without_a_name(after: list[onnx.NodeProto], x_type: int) -> None:
    """What a Reshape of rows leaves, in a file that does not name the sizes between its nodes."""
    table = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    model = hand_made(table, x_type=x_type, x_shape=("n", 3, 4))
    model.graph.node[0].input[0] = "rows"
    model.graph.node.insert(0, helper.make_node("Reshape", ["x", "minus_1_4"], ["rows"]))
    model.graph.node.extend(after)
    constants = {"minus_1_4": [-1, 4], "zero": [0], "one": [1], "two": [2]}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.array(values), name) for name, values in constants.items()
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    z_type = x_type if after[-1].op_type == "Concat" else TensorProto.INT64
    model.graph.output.append(helper.make_tensor_value_info("z", z_type, None))
    x = np.ones((5, 3, 4), FLOATS[x_type])
    sessions = [session(model, custom_ops=custom_ops) for custom_ops in (True, False)]
    if (
        x_type == TensorProto.BFLOAT16
    ):  # NumPy has none, so sessions don't run: that they are made is the test
        return
    for got, want in zip(*(made.run(["y", "z"], {"x": x}) for made in sessions), strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    pairs=st.integers(1, 9),
    grids=st.integers(3, 12),
    outputs=st.integers(1, 70),
    rows=st.integers(0, 40),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_operator_function_and_reference_agree(
    pairs: int, grids: int, outputs: int, rows: int, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((pairs, grids + 1, grids + 1, outputs)).astype(np.float32)
    x = (rng.standard_normal((rows, 2 * pairs)) * scale).astype(np.float32)
    want, model = lookup2d(x, table), hand_made(table)
    unit = (1 + grids * np.abs(x).max(initial=0)) ** 2 * pairs
    for custom_ops in (True, False):
        y = session(model, custom_ops=custom_ops).run(None, {"x": x})[0]
        assert np.abs(y - want).max(initial=0) <= 2e-6 * unit


@pytest.mark.parametrize("custom_ops", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_features_spoil_their_row_alone(value: float, custom_ops: bool) -> None:
    rng = np.random.default_rng(0)
    run = session(hand_made(rng.standard_normal((4, 6, 6, 20)).astype(np.float32)), custom_ops=custom_ops).run
    x = rng.standard_normal((30, 8)).astype(np.float32)
    want = run(None, {"x": x})[0]
    x[7, 2] = value
    y = run(None, {"x": x})[0]
    assert not np.isfinite(y[7]).any()
    np.testing.assert_array_equal(np.delete(y, 7, 0), np.delete(want, 7, 0))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_non_finite_tables_are_refused(value: float, dtype: str) -> None:
    table = np.random.default_rng(0).standard_normal((4, 6, 6, 21)).astype(np.dtype(dtype))
    table[0, 0, 0, 0] = np.finfo(np.float32).tiny if dtype == "float32" else 0  # subnormal numbers are fine
    session(hand_made(table))
    table[-1, -1, -1, -1] = table[1, 2, 3, 4] = value
    with pytest.raises(
        Exception,
        match=r'LMKAN2D node "layer7": expected finite values in table, found 2 NaN or infinite ones; export',
    ):
        session(hand_made(table))


def test_thread_counts_agree_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    model = hand_made(rng.standard_normal((32, 9, 9, 96)).astype(np.float32))
    for rows in (1, 3, 64, 5000):
        x = rng.standard_normal((rows, 64)).astype(np.float32)
        want = session(model).run(None, {"x": x})[0]
        for threads in (1, 2):
            shared = session(model, threads=threads)
            # The first calls are split for all threads of the machine, later ones for those of the session.
            for _ in range(12):
                np.testing.assert_array_equal(shared.run(None, {"x": x})[0], want)


def cpu_ticks() -> dict[str, int]:
    """Processor time of every thread of this process."""
    ticks = {}
    for file in Path("/proc/self/task").glob("*/stat"):
        fields = file.read_text().rpartition(")")[2].split()
        ticks[file.parent.name] = int(fields[11]) + int(fields[12])
    return ticks


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("threads", [1, 2])
def test_sessions_use_all_their_threads(threads: int) -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((64, 9, 9, 128)).astype(np.float32)
    # A thread that waits for work takes no time then.
    run = session(hand_made(table), threads=threads, spin=False).run
    x = rng.standard_normal((4096, 128)).astype(np.float32)
    for _ in range(10):
        run(None, {"x": x})
    found = []
    while threads not in found and len(found) < 5:  # a busy machine may have no time for one of them
        before = cpu_ticks()
        for _ in range(100):
            run(None, {"x": x})
        spent = [ticks - before.get(thread, 0) for thread, ticks in cpu_ticks().items()]
        found.append(sum(ticks > sum(spent) / 10 for ticks in spent))
    assert found[-1] == threads


def test_one_session_serves_many_threads() -> None:
    rng = np.random.default_rng(0)
    shared = session(hand_made(rng.standard_normal((8, 9, 9, 40)).astype(np.float32)), threads=2)
    batches = [rng.standard_normal((int(n), 16)).astype(np.float32) for n in rng.integers(0, 400, 60)]
    want = [shared.run(None, {"x": x})[0] for x in batches]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda x: shared.run(None, {"x": x})[0], batches))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_table_that_is_an_input() -> None:
    rng = np.random.default_rng(0)
    run = session(hand_made(None)).run
    for outputs in (5, 64):
        table = rng.standard_normal((3, 6, 6, outputs)).astype(np.float32)
        x = rng.standard_normal((7, 6)).astype(np.float32)
        y = run(None, {"x": x, "table": table})[0]
        np.testing.assert_allclose(y, lookup2d(x, table), rtol=1e-5, atol=1e-5)
    for shape in ((3, 3, 3, 5), (3, 6, 5, 5), (0, 6, 6, 5), (3, 6, 6, 0)):
        with pytest.raises(Exception, match=r'LMKAN2D node "layer7": expected table \[pairs'):
            run(None, {"x": x, "table": np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    "shape", [(5, 3, 3, 8), (5, 8, 7, 8), (5, 8, 8), (5, 8, 8, 8, 1), (0, 8, 8, 8), (5, 8, 8, 0)]
)
def test_bad_tables_are_refused_when_the_session_is_made(shape: tuple) -> None:
    with pytest.raises(
        Exception, match=r'LMKAN2D node "layer7": expected table \[pairs.*found \[5|found \[0'
    ):
        session(hand_made(np.zeros(shape, np.float32)))


@pytest.mark.parametrize("name", ["x" + "é" * 100, "日本" * 200, "x" * 500])
def test_long_names_are_cut_between_characters(name: str) -> None:
    model = hand_made(np.zeros((5, 3, 3, 8), np.float32))
    model.graph.node[0].name = name
    with pytest.raises(Exception, match="expected table") as caught:
        session(model)
    found = str(caught.value).split('node "')[1].split('"')[0]
    assert name.startswith(found)
    assert 157 < len(found.encode()) <= 160


@pytest.mark.parametrize("shape", [(3, 9), (3, 11), (3, 0), (10, 3), (3, 2)])
def test_bad_features_are_refused_at_run_time(shape: tuple) -> None:
    shared = session(hand_made(np.zeros((5, 8, 8, 4), np.float32)))
    with pytest.raises(
        Exception,
        match=rf'"layer7": expected x \[..., 10\].*found \[{shape[0]}, {shape[1]}\]; give x 10 features, or',
    ):
        shared.run(None, {"x": np.zeros(shape, np.float32)})
    assert shared.run(None, {"x": np.zeros((2, 10), np.float32)})[0].shape == (2, 4)  # it still works


def test_a_scalar_is_refused() -> None:
    shared = session(hand_made(np.zeros((5, 8, 8, 4), np.float32), x_shape=()))
    with pytest.raises(Exception, match=r"expected x \[..., 10\].*found \[\]"):
        shared.run(None, {"x": np.zeros((), np.float32)})


def test_types_that_the_operator_lacks_are_refused() -> None:
    with pytest.raises(Exception, match="LMKAN2D"):
        session(hand_made(np.zeros((5, 8, 8, 4), np.float64), x_type=TensorProto.DOUBLE))


def test_without_the_function_the_library_is_needed() -> None:
    model = hand_made(np.zeros((5, 8, 8, 4), np.float32), function=False)
    assert session(model).run(None, {"x": np.zeros((2, 10), np.float32)})[0].shape == (2, 4)
    with pytest.raises(Exception, match="LMKAN2D"):
        session(model, custom_ops=False)


def test_registration_is_repeatable_and_outlives_its_options() -> None:
    model = hand_made(np.ones((5, 8, 8, 4), np.float32))
    sessions = [session(model) for _ in range(20)]
    x = np.zeros((2, 10), np.float32)
    assert all((s.run(None, {"x": x})[0] == 5).all() for s in sessions)


class TestRunner:
    def test_inputs_are_checked(self, tmp_path: Path) -> None:
        onnx.save(hand_made(np.zeros((5, 8, 8, 4), np.float32), x_shape=("n", 10)), tmp_path / "m.onnx")
        runner = load_runner(tmp_path / "m.onnx")
        x = np.zeros((2, 10), np.float32)
        for feeds, message in (
            ({}, "expected the inputs x, found none"),
            ({"z": x}, "expected the inputs x, found z"),
            ({"x": x, "z": x}, "found x, z"),
            ({"x": x.astype(np.float64)}, r"expected input x float32\[n, 10\], found float64.*astype"),
            ({"x": x[:, :9]}, r"expected input x float32\[n, 10\], found shape \[2, 9\]"),
            ({"x": x[0]}, r"found shape \[10\]"),
        ):
            with pytest.raises(InputError, match=message):
                runner.run(feeds)

    @pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-function", "onnx-reference"])
    @pytest.mark.parametrize("content", [None, b"", b"not onnx at all", b"\x08\x0a"])
    def test_files_that_are_not_models(self, content: bytes | None, runtime: str, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ModelError, match=r"m\.onnx"):
            load_runner(path, runtime)

    def test_unknown_runtimes(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="expected a runtime of onnxruntime, .*found 'magic'"):
            load_runner(tmp_path / "m.onnx", "magic")
