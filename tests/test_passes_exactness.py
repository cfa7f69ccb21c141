"""What the passes do to tables and to chains of layouts: exact, before anything is rounded to float32."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkan_deploy.converters.passes import run_passes
from lmkan_deploy.converters.passes.drop_constant_pairs import constant_pairs, without_pairs
from lmkan_deploy.converters.passes.fold_linear_branch import Linear, _with_branch
from lmkan_deploy.converters.passes.fold_scale_shift import _scaled
from lmkan_deploy.converters.passes.simplify_layout import simplify_layout
from lmkan_deploy.reference import lookup2d

# --- Tables ------------------------------------------------------------------------------------------

SHAPES = {"pairs": st.integers(1, 5), "grids": st.integers(3, 13), "outputs": st.integers(1, 6)}


def case(
    pairs: int, grids: int, outputs: int, seed: int
) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((pairs, grids + 1, grids + 1, outputs))
    x = rng.standard_normal((40, 2 * pairs)) * rng.choice([0.1, 1.0, 60.0], (40, 1))
    return rng, table, x


@given(**SHAPES, seed=st.integers(0, 2**31))
def test_scale_and_shift_are_exact(pairs: int, grids: int, outputs: int, seed: int) -> None:
    rng, table, x = case(pairs, grids, outputs, seed)
    scale, shift = rng.standard_normal((2, outputs))
    want = lookup2d(x, table) * scale + shift
    got = lookup2d(x, _scaled(table, scale, shift))
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-7)


@given(**SHAPES, relu=st.booleans(), seed=st.integers(0, 2**31))
def test_linear_branches_are_exact(pairs: int, grids: int, outputs: int, relu: bool, seed: int) -> None:
    if relu:
        grids += grids % 2
    rng, table, x = case(pairs, grids, outputs, seed)
    weight, bias = rng.standard_normal((2 * pairs, outputs)), rng.standard_normal(outputs)
    branch = Linear(ir.Value(name="x"), relu, weight, bias)
    want = lookup2d(x, table) + (np.maximum(x, 0) if relu else x) @ weight + bias
    np.testing.assert_allclose(lookup2d(x, _with_branch(table, branch)), want, rtol=1e-9, atol=1e-7)


@given(**SHAPES, seed=st.integers(0, 2**31))
def test_dropping_constant_pairs_is_exact(pairs: int, grids: int, outputs: int, seed: int) -> None:
    rng, table, x = case(pairs, grids, outputs, seed)
    wanted = rng.random(pairs) < 0.5
    wanted[rng.integers(pairs)] = False
    table[wanted] = rng.standard_normal((int(wanted.sum()), 1, 1, outputs))
    is_constant = constant_pairs(table)
    np.testing.assert_array_equal(is_constant, wanted)
    kept = x.reshape(len(x), pairs, 2)[:, ~is_constant].reshape(len(x), -1)
    got = lookup2d(kept, without_pairs(table, is_constant))
    np.testing.assert_allclose(got, lookup2d(x, table), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize(("grids", "error"), [(3, 0.15), (5, 0.1), (13, 0.03)])
def test_relu_first_is_not_exact_for_odd_grids(grids: int, error: float) -> None:
    table = np.zeros((1, grids + 1, grids + 1, 1))
    branch = Linear(ir.Value(name="x"), True, np.array([[1.0], [0.0]]), np.zeros(1))
    x = np.stack([np.linspace(-1, 1, 1001), np.zeros(1001)], axis=1)
    got = lookup2d(x, _with_branch(table, branch))[:, 0]
    assert np.abs(got - np.maximum(x[:, 0], 0)).max() > error


# --- Layouts -----------------------------------------------------------------------------------------


@st.composite
def layout_chains(draw: st.DrawFn) -> tuple[list[int], list[tuple[str, list[int]]]]:
    """A static shape behind a free first axis, and valid reshapes and transposes of it."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    current, steps = [-1, *shape], []
    for _ in range(draw(st.integers(2, 6))):
        if draw(st.booleans()):
            permutation = draw(st.permutations(range(len(current))))
            current = [current[i] for i in permutation]
            steps.append(("Transpose", list(permutation)))
            continue
        target: list[int] = []
        for size in current:  # split an axis, or merge it with the one before
            divisors = [d for d in (2, 3) if size > 0 and size % d == 0]
            if divisors and draw(st.booleans()):
                target += [divisors[0], size // divisors[0]]
            elif target and draw(st.booleans()):
                merged = target.pop()
                target.append(-1 if -1 in (merged, size) else merged * size)
            else:
                target.append(size)
        current = target
        steps.append(("Reshape", current))
    return shape, steps


@settings(max_examples=150)
@given(chain=layout_chains(), batch=st.integers(0, 3))
def test_shorter_chains_are_equal(chain: tuple[list[int], list[tuple[str, list[int]]]], batch: int) -> None:
    shape, steps = chain
    nodes, initializers = [], []
    for index, (kind, numbers) in enumerate(steps):
        inputs, output = [f"v{index}"], [f"v{index + 1}"]
        if kind == "Transpose":
            nodes.append(onnx.helper.make_node(kind, inputs, output, perm=numbers))
        else:
            initializers.append(onnx.numpy_helper.from_array(np.array(numbers, np.int64), f"s{index}"))
            nodes.append(onnx.helper.make_node(kind, [*inputs, f"s{index}"], output))
    tensor = onnx.TensorProto.INT64
    graph = onnx.helper.make_graph(
        nodes,
        "chain",
        [onnx.helper.make_tensor_value_info("v0", tensor, ["n", *shape])],
        [onnx.helper.make_tensor_value_info(f"v{len(steps)}", tensor, None)],
        initializers,
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    model = ir.serde.deserialize_model(proto)
    outcome = simplify_layout(model)
    rewritten = ir.serde.serialize_model(model)
    left = [node.op_type for node in rewritten.graph.node if node.op_type != "Identity"]
    assert bool(outcome.applied) == (len(left) < len(proto.graph.node))
    assert not outcome.applied or len(left) <= 3
    x = np.arange(batch * int(np.prod(shape))).reshape(batch, *shape)
    if batch == 0:  # the original itself may not accept an empty batch
        return
    run = lambda m: ort.InferenceSession(m.SerializeToString()).run(None, {"v0": x})[0]  # noqa: E731
    np.testing.assert_array_equal(run(rewritten), run(proto))


@pytest.mark.parametrize(
    "body",
    [
        "m = MatMul (w, t)  s = Add (m, column)  y = Transpose (s)",
        "r = Relu (t)  m = MatMul (w, r)  n = Neg (m)  d = Div (n, column)  y = Transpose (d)",
        "a = Sub (row, t)  b = Mul (t, a)  c = Tanh (b)  m = MatMul (w, c)  y = Transpose (m)",
        "u = Transpose (t)  v = Transpose (u)  m = MatMul (w, v)  z = Sub (one, m)  y = Transpose (z)",
        "m = MatMul (w, t)  s = Sigmoid (m)  y = Div (s, column)",
    ],
)
def test_sinking_transposes_is_exact_in_float64(body: str) -> None:
    rng = np.random.default_rng(0)
    rows, n_in, n_out = 5, 3, 4
    constants = {
        "w": rng.standard_normal((n_out, n_in)),
        "column": rng.standard_normal((n_out, 1)),
        "row": rng.standard_normal(rows),  # of the transposed matrix: a number for each row of x
        "one": np.ones((1, 1)),
    }
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (double[{rows}, {n_in}] x) => (double[a, b] y)'
    proto = onnx.parser.parse_model(f"{text} {{ t = Transpose <perm = [1, 0]> (x)  {body} }}")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in constants.items())
    proto = onnx.shape_inference.infer_shapes(proto)
    model = ir.from_proto(proto)
    run_passes(model)
    left = sum(node.op_type == "Transpose" for node in model.graph)
    assert left == (0 if "y = Transpose" in body else 1)
    x = rng.standard_normal((rows, n_in))
    options = ort.SessionOptions()
    # Some of its rewrites are for float32 alone.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL

    def run(proto: onnx.ModelProto) -> np.ndarray:
        return ort.InferenceSession(proto.SerializeToString(), options).run(None, {"x": x})[0]

    np.testing.assert_allclose(run(ir.to_proto(model)), run(proto), rtol=1e-12, atol=1e-12)
