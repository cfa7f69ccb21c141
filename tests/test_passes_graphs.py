"""The passes on graphs that other tools write: they stay valid and give the same, and what stays has a reason."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

import lmkan_deploy
from lmkan_deploy.converters.passes import noted_outcomes, optimize, run_passes
from lmkan_deploy.errors import ExportError
from networks import needs_opset
from rewritten import op_types


def hand_made(
    body: str,
    outputs: str,
    *,
    inputs: str = "float[n, 4] x",
    opset: int = 20,
    functions: str = "",
    imports: str = '"lmkan" : 1',
) -> onnx.ModelProto:
    """A model around `h = LMKAN2D(x, table)`, without the shapes of intermediate values."""
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : {opset}, {imports}]>
        g ({inputs}) => ({outputs}) {{ h = lmkan.LMKAN2D (x, table)  {body} }} {functions}"""
    )
    for name, shape in (
        ("table", (2, 7, 7, 6)),
        ("parameter", (7, 7, 6, 2)),
        ("c", (6,)),
        ("w", (4, 6)),
        ("column", (6, 1)),
    ):
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


def value_names(graph: onnx.GraphProto) -> list[str]:
    """Every name that a graph and those inside it define, as often as it is defined."""
    names = [value.name for value in graph.input]
    names += [tensor.name for tensor in graph.initializer if tensor.name not in names]
    for node in graph.node:
        names += [name for name in node.output if name]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                names += value_names(attribute.g)
    return names


def check_hand_made(proto: onnx.ModelProto) -> ir.Model:
    """Runs the passes; the model stays valid and gives the same, with the compiled operator and without."""
    model = ir.serde.deserialize_model(proto)
    optimize(model)
    rewritten = ir.serde.serialize_model(model)
    onnx.checker.check_model(rewritten, full_check=True)
    names, nodes = value_names(rewritten.graph), [node.name for node in rewritten.graph.node if node.name]
    assert len(names) == len(set(names))
    if len({node.name for node in proto.graph.node}) == len(proto.graph.node):
        assert len(nodes) == len(set(nodes))
    assert [value.name for value in rewritten.graph.output] == [value.name for value in proto.graph.output]
    feeds = {"x": np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)}
    if any(value.name == "condition" for value in proto.graph.input):
        feeds["condition"] = np.array(True)

    def run(m: onnx.ModelProto, *, library: bool = True) -> list[np.ndarray]:
        options = ort.SessionOptions()
        if library:
            lmkan_deploy.register_custom_ops(options)
        return ort.InferenceSession(m.SerializeToString(), options).run(None, feeds)

    wanted = run(proto)
    for got in (run(rewritten), run(rewritten, library=False)):
        for one, want in zip(got, wanted, strict=True):
            np.testing.assert_allclose(one, want, rtol=1e-5, atol=1e-5)
    return model


@pytest.mark.parametrize(
    ("body", "outputs", "left"),
    [
        ("y = Sub (c, h)", "float[n, 6] y", ["LMKAN2D"]),
        ("a = Mul (h, c)  b = Add (a, c)  y = Sub (b, c)", "float[n, 6] y", ["LMKAN2D"]),
        ("g = Gemm <alpha = 0.5, beta = 2.0> (x, w, c)  y = Add (g, h)", "float[n, 6] y", ["LMKAN2D"]),
        ("y = Mul (h, c)  z = Identity (y)", "float[n, 6] y, float[n, 6] z", ["LMKAN2D", "Identity"]),
        ("y = Mul (h, c)", "float[n, 6] h, float[n, 6] y", ["LMKAN2D", "Mul"]),
        ("y = Div (c, h)", "float[n, 6] y", ["LMKAN2D", "Div"]),
        ("y = Mul (h, c)", "float[n, 6] y, float[2, 7, 7, 6] table", ["LMKAN2D"]),
        ("t = Transpose <perm = [1, 0]> (h)  y = Mul (t, column)", "float[6, n] y", None),
        ("k = lmkan.LMKAN2D (x, table)  m = Mul (k, c)  y = Add (h, m)", "float[n, 6] y", None),
        ("s = ReduceSum <keepdims = 0> (table)  m = Mul (h, c)  y = Add (m, s)", "float[n, 6] y", None),
    ],
)
def test_hand_made_graphs(body: str, outputs: str, left: list[str] | None) -> None:
    model = check_hand_made(hand_made(body, outputs))
    if left is not None:
        assert op_types(model) == left


TRANSPOSED = "[3, 0, 1, 2]"


@pytest.mark.parametrize(
    "body",
    [
        # One initializer, transposed alike twice
        f"""t = Transpose <perm = {TRANSPOSED}> (parameter)  a = lmkan.LMKAN2D (x, t)
        s = Transpose <perm = {TRANSPOSED}> (parameter)  b = lmkan.LMKAN2D (x, s)
        m = Sin (a)  y = Add (m, b)""",
        # ... and in two ways
        f"""t = Transpose <perm = {TRANSPOSED}> (parameter)  a = lmkan.LMKAN2D (x, t)
        s = Transpose <perm = [3, 1, 0, 2]> (parameter)  b = lmkan.LMKAN2D (x, s)
        m = Sin (a)  y = Add (m, b)""",
        # One transpose for two layers
        f"""t = Transpose <perm = {TRANSPOSED}> (parameter)  a = lmkan.LMKAN2D (x, t)
        b = lmkan.LMKAN2D (x, t)  m = Sin (a)  y = Add (m, b)""",
    ],
)
def test_transposed_tables(body: str) -> None:
    model = check_hand_made(hand_made(body, "float[n, 6] y"))
    assert "Transpose" not in op_types(model)
    tables = {node.inputs[1] for node in model.graph if node.op_type == "LMKAN2D"}
    assert len(tables) == (2 if "3, 1, 0, 2" in body else 1)


@pytest.mark.parametrize(
    "body",
    [
        # What fold-table-transpose would call its result is there: as a node's output, or in a branch
        f"""t = Transpose <perm = {TRANSPOSED}> (parameter)  p = lmkan.LMKAN2D (x, t)
        "parameter.table" = Sin (x)  s = ReduceSum <keepdims = 0> ("parameter.table")
        y = Add (p, s)""",
        f"""t = Transpose <perm = {TRANSPOSED}> (parameter)  p = lmkan.LMKAN2D (x, t)
        y = If (condition) <then_branch = a () => (float[n, 6] ya) {{
            "parameter.table" = Sin (p)  ya = Identity ("parameter.table") }},
          else_branch = b () => (float[n, 6] yb) {{ yb = Identity (p) }}>""",
        # A layer that shares its table gets another one, "table_"
        """table_ = Sin (x)  s = ReduceSum <keepdims = 0> (table_)  k = lmkan.LMKAN2D (x, table)
        m = Mul (k, c)  a = Sin (h)  b = Add (a, m)  y = Add (b, s)""",
        # The table is a node's output
        """t = Constant <value = float[1, 4, 4, 1] {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6}> ()
        z = Slice (x, zero, two, one)  k = lmkan.LMKAN2D (z, t)  m = Mul (k, three)
        l = lmkan.LMKAN2D (z, t)  a = Sin (l)  b = Add (a, m)  y = Add (h, b)""",
        # simplify-layout: two chains that end in nodes without names
        """u = Unsqueeze (h, one)  a = Sin (u)  b = Cos (u)
        d = Transpose <perm = [0, 2, 1]> (a)  e = Transpose <perm = [1, 2, 0]> (d)
        f = Transpose <perm = [0, 2, 1]> (b)  g = Transpose <perm = [1, 2, 0]> (f)
        "Transpose.0.output" = Add (e, g)  r = Sin ("Transpose.0.output")
        s = Transpose <perm = [2, 1, 0]> (r)  y = Squeeze (s, one)""",
        # drop-constant-pairs: the table has a constant pair
        """"LMKAN2D.features" = Sin (x)  k = lmkan.LMKAN2D ("LMKAN2D.features", constant_pair)
        l = lmkan.LMKAN2D (x, constant_pair)  m = Add (k, l)  "LMKAN2D.features.kept" = Sin (m)
        y = Add (h, "LMKAN2D.features.kept")""",
    ],
)
def test_new_names_are_new(body: str) -> None:
    proto = hand_made(body, "float[n, 6] y", inputs="float[n, 4] x, bool condition")
    pair = np.random.default_rng(0).standard_normal((2, 7, 7, 6)).astype(np.float32)
    pair[1] = 0.5
    arrays = {"zero": [0], "one": [1], "two": [2], "three": np.float32(3), "constant_pair": pair}
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(array), name))
    applied = json.loads(check_hand_made(proto).metadata_props["lmkan_deploy.passes_applied"])
    assert set(applied) - {"clean-up"}


@pytest.mark.parametrize(
    ("body", "default", "stays"),
    [
        (
            f"t = Transpose <perm = {TRANSPOSED}> (parameter)  y = lmkan.LMKAN2D (x, t)",
            "parameter",
            "Transpose",
        ),
        ("y = Mul (h, c)", "table", "Mul"),
        ("y = Mul (h, c)", "c", "Mul"),
        ("r = Relu (x)  g = MatMul (r, w)  y = Add (g, h)", "w", "MatMul"),
        ("g = Gemm (x, w, c)  y = Add (g, h)", "c", "Gemm"),
    ],
)
def test_defaults_of_inputs_are_not_constants(body: str, default: str, stays: str) -> None:
    proto = hand_made(body, "float[n, 6] y")
    tensor = next(item for item in proto.graph.initializer if item.name == default)
    proto.graph.input.append(
        onnx.helper.make_tensor_value_info(default, onnx.TensorProto.FLOAT, list(tensor.dims))
    )
    model = check_hand_made(proto)
    assert stays in op_types(model)
    refused = json.loads(model.metadata_props["lmkan_deploy.passes_refused"])
    if stays == "Transpose":
        assert refused["fold-table-transpose"] == [
            "LMKAN2D: Transpose stays: parameter is an input of the model, whose value a caller may override"
        ]

    other = {default: np.ones(tuple(tensor.dims), np.float32), "x": np.ones((3, 4), np.float32)}
    options = ort.SessionOptions()
    lmkan_deploy.register_custom_ops(options)
    models = (ir.serde.serialize_model(model), proto)
    got, want = (ort.InferenceSession(m.SerializeToString(), options).run(None, other)[0] for m in models)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def branch(then: str) -> str:
    """An If that runs nodes on values of the graph around it."""
    return f"""y = If (condition) <then_branch = a () => (float[n, 6] ya) {{ {then} }},
        else_branch = b () => (float[n, 6] yb) {{ yb = Identity (h) }}>"""


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("m = Mul (h, c)" + branch("ya = Add (h, m)"), "float[n, 6] y"),
        ("m = Mul (h, c)" + branch("ya = Sin (m)"), "float[n, 6] y, float[n, 6] m"),
        ("k = lmkan.LMKAN2D (x, table)  m = Mul (k, c)" + branch("ya = Add (c, m)"), "float[n, 6] y"),
        ("g = MatMul (x, w)  m = Add (g, h)" + branch("ya = Add (g, m)"), "float[n, 6] y"),
        ("i = Identity (x)" + branch("ya = lmkan.LMKAN2D (i, table)"), "float[n, 6] y"),
        ("k = Identity (h)" + branch("m = Mul (k, c)  ya = Identity (m)"), "float[n, 6] y"),
        (
            "s = Transpose <perm = [1, 0]> (h)  t = Transpose <perm = [1, 0]> (s)"
            + branch("i = ReduceMax <keepdims = 0> (s)  ya = Mul (t, i)"),
            "float[n, 6] y",
        ),
        (
            "s = Transpose <perm = [1, 0]> (h)  t = Transpose <perm = [1, 0]> (s)" + branch("ya = Sin (t)"),
            "float[n, 6] y, float[n, 6] t",
        ),
        (branch("t = ReduceMax <keepdims = 0> (table)  ya = Mul (h, t)"), "float[n, 6] y"),
        (
            f"t = Transpose <perm = {TRANSPOSED}> (parameter)" + branch("ya = lmkan.LMKAN2D (x, t)"),
            "float[n, 6] y",
        ),
    ],
)
def test_branches_that_use_values_around_them(body: str, outputs: str) -> None:
    check_hand_made(hand_made(body, outputs, inputs="float[n, 4] x, bool condition"))


def test_loops_that_use_values_around_them() -> None:
    body = """k = lmkan.LMKAN2D (x, table)  m = Mul (k, c)
        y = Loop (count, condition, h) <
            body = b (int64 i, bool c_in, float[n, 6] v) => (bool c_out, float[n, 6] w_out) {
            c_out = Identity (c_in)  s = Sin (v)  w_out = Add (s, m) }>"""
    proto = hand_made(body, "float[n, 6] y", inputs="float[n, 4] x, bool condition")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(3), "count"))
    check_hand_made(proto)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        # An output that is used besides
        ("m = Mul (h, c)  y = Add (m, c)", "float[n, 6] y, float[n, 6] m"),
        ("a = Relu (h)  y = Identity (a)  z = Sin (a)", "float[n, 6] y, float[n, 6] z"),
        ("y = Identity (h)  z = Identity (h)", "float[n, 6] h, float[n, 6] y, float[n, 6] z"),
        ("g = MatMul (x, w)  y = Add (g, h)", "float[n, 6] y, float[n, 6] g"),
        ("r = Relu (x)  g = MatMul (r, w)  y = Add (h, g)", "float[n, 4] r, float[n, 6] y"),
        ("s = Sin (x)  y = lmkan.LMKAN2D (s, pair)", "float[n, 4] s, float[n, 6] y"),
        (
            "t = Transpose <perm = [1, 0]> (h)  y = Transpose <perm = [1, 0]> (t)",
            "float[6, n] t, float[n, 6] y",
        ),
        ("s = Sin (h)  t = Transpose (s)  y = Transpose <perm = [1, 0]> (t)", "float[n, 6] y, float[n, 6] s"),
        ("y = Transpose <perm = [0, 1]> (x)  z = Identity (x)", "float[n, 4] y, float[n, 4] z"),
        # Inputs that are left out
        ("m = Clip (h, , high)  g = Gemm (x, w, )  y = Add (g, m)", "float[n, 6] y"),
        ("g = Gemm (x, w, )  y = Add (g, h)", "float[n, 6] y"),
        ("a = Squeeze (lifted, )  y = Add (h, a)", "float[n, 6] y"),
    ],
)
@pytest.mark.parametrize("opset", [18, 23, 25])
def test_awkward_graphs(body: str, outputs: str, opset: int) -> None:
    needs_opset(opset)
    pair = np.random.default_rng(0).standard_normal((2, 7, 7, 6)).astype(np.float32)
    pair[1] = 0.5
    proto = hand_made(body, outputs, opset=opset)
    for name, array in {"pair": pair, "high": np.float32(0.5), "lifted": pair[:1, 0, 0]}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(array), name))
    check_hand_made(proto)


def test_opsets_without_what_the_function_uses() -> None:
    model = ir.serde.deserialize_model(hand_made("y = Mul (h, c)", "float[n, 6] y", opset=17))
    with pytest.raises(ExportError, match="expected ONNX opset 18 or later, found 17"):
        optimize(model)


def test_operators_in_other_functions_keep_their_own() -> None:
    functions = """<domain: "other", opset_import: ["" : 20, "lmkan" : 1]>
        Twice (v, t) => (w) { s = lmkan.LMKAN2D (v, t)  w = Add (s, s) }"""
    proto = hand_made(
        "y = other.Twice (x, table)", "float[n, 6] y", functions=functions, imports='"lmkan" : 1, "other" : 1'
    )
    model = check_hand_made(proto)
    assert op_types(model) == ["Twice"]
    assert ("lmkan", "LMKAN2D", "") in model.functions
    assert model.functions["other", "Twice", ""].opset_imports["lmkan"] == 1


def test_transposes_that_sink_have_names_of_their_own() -> None:
    body = "t = Transpose <perm = [1, 0]> (h)  a = Mul (t, column)  b = Mul (t, t)  y = Sin (a)  z = Sin (b)"
    model = check_hand_made(hand_made(body, "float[6, n] y, float[6, n] z"))
    names = [node.name for node in model.graph if node.op_type == "Transpose"]
    assert len(names) == len(set(names)) == 2


def test_constants_without_axes_keep_their_shape() -> None:
    proto = hand_made("t = Transpose <perm = [1, 0]> (h)  a = Mul (half, t)  y = Sin (a)", "float[6, n] y")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.5, np.float32), "half"))
    # Behind a layer whose table can't take it.
    proto.graph.node.append(onnx.helper.make_node("Cos", ["h"], ["z"]))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["n", 6]))
    model = check_hand_made(proto)
    shapes = [value.const_value.shape for value in model.graph.initializers.values()]
    assert [] in shapes


@pytest.mark.parametrize(
    "text",
    [
        """<ir_version: 10, opset_import: ["ai.onnx" : 20, "lmkan" : 1]>
        g (float[n, 4] x) => (float[n, 6] y) {
            h = lmkan.LMKAN2D (x, table)  a = ai.onnx.Sin (h)  y = Cos (a) }""",
        """<ir_version: 10, opset_import: ["lmkan" : 1]>
        g (float[n, 4] x) => (float[n, 6] y) { y = lmkan.LMKAN2D (x, table) }""",
        """<ir_version: 10, opset_import: ["other" : 1]>
        g (float[n, 4] x) => (float[n, 6] y) { y = other.F (x, table) }
        <domain: "other", opset_import: ["" : 20, "lmkan" : 1]>
        F (v, t) => (w) { s = lmkan.LMKAN2D (v, t)  w = Sin (s) }""",
    ],
)
def test_standard_operators_under_another_name_or_none(text: str) -> None:
    proto = onnx.parser.parse_model(text)
    table = np.random.default_rng(0).standard_normal((2, 7, 7, 6)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(table, "table"))
    check_hand_made(proto)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("s = Mul (h, big)  y = Mul (s, big)", "Mul stays: the table would not be finite"),
        ("y = Div (h, zero)", "Div stays: its scale or shift is not finite"),
        ("g = MatMul (x, infinite)  y = Add (g, h)", "Linear(x) stays: the table would not be finite"),
    ],
)
def test_what_leaves_float32_stays(body: str, reason: str) -> None:
    proto = hand_made(body, "float[n, 6] y")
    arrays = {"big": 1e30, "zero": np.zeros(6), "infinite": np.full((4, 6), np.inf)}
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(array, np.float32), name))
    model = ir.serde.deserialize_model(proto)
    optimize(model)
    assert reason in model.metadata_props["lmkan_deploy.passes_refused"]


def test_layers_without_a_valid_table_are_left_to_the_runtime() -> None:
    proto = hand_made(
        "m = Mul (h, c)  k = lmkan.LMKAN2D (x)  n = lmkan.LMKAN2D (x, w)  y = Mul (n, c)", "float[n, 6] y"
    )
    optimize(ir.serde.deserialize_model(proto))


@pytest.mark.parametrize(
    ("body", "shape", "name", "reason"),
    [
        ("z = Add(x, x)  p = MatMul(z, w)  y = Add(h, p)", "n", "fold-linear-branch", "other features"),
        ("y = Mul(h, column)", "n, 6", "fold-scale-shift", "does not go along the outputs"),
        ("y = Add(square, h)", "n, 6", "fold-scale-shift", "LMKAN2D: Add stays: its constant does not go"),
        (
            "m = Neg(h)  y = Add(m, h)",
            "n",
            "fold-scale-shift",
            "Neg stays: the layer's output is used elsewhere",
        ),
        ("r = Reshape(h, flat)  y = Reshape(r, wide)", "n, k", "simplify-layout", "several free axes"),
    ],
)
def test_reasons_are_given(body: str, shape: str, name: str, reason: str) -> None:
    proto = hand_made(body, f"float[{shape}, 6] y", inputs=f"float[{shape}, 4] x")
    for value, numbers in (("flat", [-1, 6]), ("wide", [1, -1, 6])):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(numbers), value))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((6, 6), np.float32), "square"))
    model = ir.serde.deserialize_model(proto)
    optimize(model)
    assert reason in " ".join(noted_outcomes(model.metadata_props)[1][name])


@pytest.mark.parametrize(("pairs", "dtype"), [(3, "float16"), (3, "float32"), (1, "float32")])
def test_constant_pairs_that_stay(pairs: int, dtype: str) -> None:
    table = np.ones((pairs, 7, 7, 6), dtype)
    proto = hand_made(
        "y = Relu(h)", f"{dtype.replace('32', '')}[n, 6] y", inputs=f"{dtype.replace('32', '')}[n, 4] x"
    )
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 2 * pairs
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(table, "table"))
    model = ir.serde.deserialize_model(proto)
    outcome = run_passes(model)["drop-constant-pairs"]
    left = {"float16": f"{pairs} constant pairs stay: the table is not of float32"}.get(
        dtype, "a constant pair stays: it is the last one"
    )
    assert [line.partition(": ")[2] for line in outcome.refused] == [left]
    assert len(outcome.applied) == (dtype == "float32" and pairs > 1)


@pytest.mark.parametrize("is_named", [True, False])
def test_axes_without_names_may_differ(is_named: bool) -> None:
    """[n, 2, 4] comes back as [n, 2, 3]; what has no names may come back as [2, n, 3]."""
    before, after = ("n, 2, 4", "n, 2, 3") if is_named else ("?, ?, 4", "?, ?, 3")
    given_back = [-1, 2, 3] if is_named else [2, -1, 3]
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 20, "lmkan" : 1]> g (float[{before}] x) => (float[{after}] y) '
        "{ f = Reshape (x, flat)  h = lmkan.LMKAN2D (f, table)  y = Reshape (h, back) }"
    )
    constants = {
        "flat": np.array([-1, 4]), "back": np.array(given_back),
        "table": np.random.default_rng(0).standard_normal((2, 5, 5, 3)).astype(np.float32),
    }  # fmt: skip
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in constants.items())
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    run_passes(model)
    assert op_types(model).count("Reshape") == (0 if is_named else 2)


def test_a_lookup_without_inputs_is_left_to_the_runtime() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20, "lmkan" : 1]> g (float[n, 4] x) => (float[n, 3] y) '
        "{ y = lmkan.LMKAN2D () }"
    )
    model = ir.from_proto(proto)
    run_passes(model)
    assert op_types(model) == ["LMKAN2D"]
