"""Graph passes: exact in float64, on the graphs they are meant for, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkan_deploy
from lmkan_deploy.checkpoints.input_shapes import input_specs, parse_input_shape
from lmkan_deploy.converters.model_file import staged_model
from lmkan_deploy.converters.passes import PASSES, noted_outcomes, optimize, run_passes, select_passes
from lmkan_deploy.converters.passes.drop_constant_pairs import constant_pairs, without_pairs
from lmkan_deploy.converters.passes.fold_linear_branch import Linear, _with_branch
from lmkan_deploy.converters.passes.fold_scale_shift import _scaled
from lmkan_deploy.converters.passes.simplify_layout import simplify_layout
from lmkan_deploy.converters.torch_to_onnx import to_onnx
from lmkan_deploy.errors import ExportError
from lmkan_deploy.nn import LMKAN2DLayer, LMKANConv2d, PreconditionedLMKAN2D
from lmkan_deploy.reference import lookup2d
from lmkan_deploy.runtime.runner import load_runner
from lmkan_deploy.upstream import LMKAN2DLayer as BatchLastLayer
from networks import make_stack, needs_opset

# --- Proofs in float64 -------------------------------------------------------------------------------

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


# --- Graphs ------------------------------------------------------------------------------------------


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def allows_empty(model: ir.Model) -> bool:
    """Whether ONNX Runtime survives an empty batch: before 1.25 its Einsum does not."""
    release = tuple(map(int, ort.__version__.split(".")[:2]))
    return release >= (1, 25) or "Einsum" not in op_types(model)


def check(
    module: torch.nn.Module, shape: str, tmp_path: Path, *, rows: tuple[int, ...] = (0, 1, 5)
) -> ir.Model:
    """Exports with and without passes, compares both with PyTorch, and returns the rewritten model."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if name.endswith("func_parameter"):
            torch.nn.init.normal_(parameter)
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    specs = input_specs(module.eval(), [parse_input_shape(shape)])
    plain = to_onnx(module, specs, passes=select_passes(without=["all"]))
    model = to_onnx(module, specs)
    for kind, exported in (("plain", plain), ("rewritten", model)):
        with staged_model(exported, tmp_path / f"{kind}.onnx"):
            pass
        onnx.checker.check_model(tmp_path / f"{kind}.onnx", full_check=True)
        for custom_ops in ("onnxruntime", "onnxruntime-function"):
            runner = load_runner(tmp_path / f"{kind}.onnx", custom_ops)
            for size in rows if allows_empty(exported) else filter(None, rows):
                sizes = [size if isinstance(s, str) else s for s in specs[0].shape]
                x = torch.randn(sizes) * 2
                with torch.no_grad():
                    want = module.double()(x.double()).numpy() if size else None
                module.float()
                y = runner.run({specs[0].name: x.numpy()})["y"]
                if want is not None:
                    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    return model


class Affine(torch.nn.Module):
    """lookup, then an arithmetic operator."""

    def __init__(self, operation) -> None:
        super().__init__()
        self.lmkan = LMKAN2DLayer(5, 4, 6)
        self.operation = operation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.operation(self.lmkan(x))


C = torch.linspace(0.5, 2, 6)


@pytest.mark.parametrize(
    "operation",
    [
        lambda y: y * 0.3,
        lambda y: 0.3 * y + 1,
        lambda y: y * C,
        lambda y: C - y,
        lambda y: -y,
        lambda y: -(y * C).reshape(-1, 2, 3).reshape(-1, 6),
        lambda y: (y - C) / C,
        lambda y: y * C[None] + C,
        lambda y: y.reshape(-1, 2, 3).reshape(-1, 6) * C,
    ],
)
def test_arithmetic_goes_into_the_table(operation, tmp_path: Path) -> None:
    assert op_types(check(Affine(operation), "n,4", tmp_path)) == ["LMKAN2D"]


@pytest.mark.parametrize(
    ("operation", "left"),
    [
        (lambda y: 1 / y, "Reciprocal"),
        (lambda y: y * y, "Mul"),
        (lambda y: y.reshape(-1, 3, 2) * C[:2], "Mul"),  # varies along half an axis
        (lambda y: y.relu() * C, "Relu"),
    ],
)
def test_other_arithmetic_stays(operation, left: str, tmp_path: Path) -> None:
    types = op_types(check(Affine(operation), "n,4", tmp_path, rows=(1, 5)))
    assert left in types


def test_batch_norms(tmp_path: Path) -> None:
    module = torch.nn.Sequential(
        torch.nn.BatchNorm1d(4, affine=False),
        LMKAN2DLayer(5, 4, 6),
        torch.nn.BatchNorm1d(6),
        LMKAN2DLayer(5, 6, 3),
        torch.nn.BatchNorm1d(3, affine=False),
    )
    torch.nn.init.normal_(module[2].weight)
    torch.nn.init.normal_(module[2].bias)
    # The first one stays: it would move the grid.
    assert op_types(check(module, "n,4", tmp_path)) == ["BatchNormalization", "LMKAN2D", "LMKAN2D"]


@pytest.mark.parametrize(
    ("form", "grids", "left"),
    [
        ("relu_first", 6, []),
        ("linear", 6, []),
        ("linear", 5, []),
        ("relu_first", 5, ["Relu", "Gemm", "Add"]),
        ("relu_last", 6, ["Gemm", "Relu", "Add"]),
    ],
)
def test_preconditioned_networks(form: str, grids: int, left: list[str], tmp_path: Path) -> None:
    module = torch.nn.Sequential(
        PreconditionedLMKAN2D(grids, 4, 6, form),
        torch.nn.BatchNorm1d(6, affine=False),
        PreconditionedLMKAN2D(grids, 6, 3, form),
    )
    model = check(module, "n,4", tmp_path)
    types = op_types(model)
    assert types.count("LMKAN2D") == 2
    if not left:
        assert set(types) == {"LMKAN2D"}
    for op_type in left:
        assert types.count(op_type) == 2
    refused = json.loads(model.metadata_props["lmkan_deploy.passes_refused"])
    if form == "relu_first" and grids == 5:
        assert "0.lmkan: Linear(ReLU(x)) stays: G = 5 is odd" in refused["fold-linear-branch"][0]
    elif form == "relu_last":
        assert "0.lmkan: ReLU(Linear(x)) stays: its kinks are not along" in refused["fold-linear-branch"][0]
    else:
        assert "fold-linear-branch" not in refused


def test_linear_branches_written_as_matmul(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lmkan = LMKAN2DLayer(6, 4, 6)
            self.linear = torch.nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.relu()) + self.lmkan(x)  # three axes: MatMul and Add

    assert op_types(check(Net(), "n,3,4", tmp_path)) == ["LMKAN2D"]


@pytest.mark.parametrize("form", ["none", "linear", "relu_first"])
def test_convolutional_networks(form: str, tmp_path: Path) -> None:
    module = torch.nn.Sequential(
        LMKANConv2d(6, 4, 8, 2, preconditioning=form),
        torch.nn.BatchNorm2d(8, affine=False),
        LMKANConv2d(6, 8, 6, 2, preconditioning=form),
        torch.nn.BatchNorm2d(6, affine=False),
        torch.nn.Flatten(),
        PreconditionedLMKAN2D(6, 6, 3, form),
    )
    types = op_types(check(module, "n,4,4,4", tmp_path))
    assert types.count("LMKAN2D") == 3
    assert set(types) <= {"LMKAN2D", "Reshape", "Transpose"}
    assert len(types) <= 3 + 3 + 3 + 1


def test_unfold_becomes_reshapes(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self, size: int, stride: int) -> None:
            super().__init__()
            self.size, self.stride = size, stride
            self.lmkan = LMKAN2DLayer(6, 2 * size * size, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lmkan(torch.nn.functional.unfold(x, self.size, stride=self.stride).transpose(1, 2))

    assert op_types(check(Net(2, 2), "n,2,4,6", tmp_path)) == ["Reshape", "Transpose", "Reshape", "LMKAN2D"]
    assert "Gather" in op_types(check(Net(2, 1), "n,2,4,6", tmp_path, rows=(1, 5)))


def test_batch_last_networks(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = BatchLastLayer(6, 4, 6), BatchLastLayer(6, 6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x.T.contiguous()) * 0.3).T

    assert op_types(check(Net(), "n,4", tmp_path)) == ["LMKAN2D", "LMKAN2D"]


def test_what_is_used_elsewhere_stays(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lmkan = LMKAN2DLayer(6, 4, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.lmkan(x)
            return (y * 0.3).sin() + y

    model = check(Net(), "n,4", tmp_path)
    assert "Mul" in op_types(model)
    refused = json.loads(model.metadata_props["lmkan_deploy.passes_refused"])
    assert refused["fold-scale-shift"] == ["lmkan: Mul stays: the layer's output is used elsewhere too"]


def test_layers_that_share_a_table_are_rewritten_apart(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lmkan = LMKAN2DLayer(6, 4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lmkan(self.lmkan(x) * 0.3)

    model = check(Net(), "n,4", tmp_path)
    assert op_types(model) == ["LMKAN2D", "LMKAN2D"]
    assert len({node.inputs[1].name for node in model.graph}) == 2


def test_half_precision_tables_are_left_alone(tmp_path: Path) -> None:
    module = torch.nn.Sequential(LMKAN2DLayer(6, 4, 6), torch.nn.BatchNorm1d(6)).half().eval()
    model = to_onnx(module, input_specs(module, [parse_input_shape("n,4:float16")]))
    assert "BatchNormalization" in op_types(model)
    assert "not a float32 constant" in model.metadata_props["lmkan_deploy.passes_refused"]


# --- Graphs that other tools write -------------------------------------------------------------------


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


def test_a_batch_norm_before_the_first_layer_stays(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(4), LMKAN2DLayer(6, 4, 6)).eval()
    refused = noted_outcomes(check(module, "n,4", tmp_path).metadata_props)[1]
    assert refused["fold-scale-shift"] == ["1: BatchNormalization before it stays: it would move the grid"]


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


# --- Constant pairs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("constant", "kept"), [([1], 2), ([0, 2], 1), ([0, 1, 2], 1)])
def test_constant_pairs_are_dropped(constant: list[int], kept: int, tmp_path: Path) -> None:
    module = make_stack(8, 6, 3)
    with torch.no_grad():
        for pair in constant:
            module[2].func_parameter[..., pair] = torch.randn(3)
        module[0].func_parameter[..., 3] = 1.5
    model = to_onnx(module, input_specs(module))
    assert op_types(model) == ["Gather", "LMKAN2D", "LMKAN2D"]
    first, second = (node for node in model.graph if node.op_type == "LMKAN2D")
    assert list(first.inputs[1].shape) == [3, 7, 7, 2 * kept]  # the first layer computes no more than needed
    assert list(second.inputs[1].shape) == [kept, 7, 7, 3]
    with staged_model(model, tmp_path / "model.onnx"):
        pass
    x = torch.randn(50, 8)
    y = load_runner(tmp_path / "model.onnx").run({"x": x.numpy()})["y"]
    np.testing.assert_allclose(y, module(x).detach().numpy(), rtol=1e-4, atol=1e-4)


# --- Layout ------------------------------------------------------------------------------------------


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


# --- Choice, files, idempotence ----------------------------------------------------------------------


def test_passes_are_chosen_by_name() -> None:
    names = [item.name for item in PASSES]
    assert [item.name for item in select_passes()] == names
    assert [item.name for item in select_passes(without=["all"])] == [
        "fold-table-transpose",
        "clean-up",
        "share-tables",
    ]
    assert "fold-scale-shift" not in [item.name for item in select_passes(without=["fold-scale-shift"])]
    assert "drop-constant-pairs" in [item.name for item in select_passes(["drop-constant-pairs"])]
    assert "fold-scale-shift" not in [item.name for item in select_passes(["drop-constant-pairs"])]
    with pytest.raises(ExportError, match="expected a pass of .*found 'magic'"):
        select_passes(["magic"])
    assert all(item.summary for item in PASSES)


def test_optimizing_a_file(tmp_path: Path) -> None:
    torch.save(make_stack(6, 8, 2).state_dict(), tmp_path / "model.pt")
    plain = lmkan_deploy.export(tmp_path / "model.pt", without_passes=["all"])
    assert plain.info.other_nodes == {"BatchNormalization": 1}
    result = lmkan_deploy.optimize(plain.path, tmp_path / "small.onnx")
    assert (result.nodes_before, result.nodes_after) == (3, 2)
    assert result.verification.passed
    assert {c.runner for c in result.verification.comparisons} == {"onnxruntime", "onnxruntime-function"}
    info = lmkan_deploy.inspect(tmp_path / "small.onnx")
    assert info.has_function
    assert info.metadata["lmkan_deploy.checkpoint"] == "model.pt"
    assert info.passes_applied["fold-scale-shift"] == ["0: BatchNormalization"]
    assert info.passes_not_run == []
    assert plain.info.passes_not_run == [
        item.name for item in PASSES if item.name not in plain.info.passes_applied
    ]
    assert "fold-scale-shift" in plain.info.passes_not_run
    again = lmkan_deploy.optimize(tmp_path / "small.onnx", tmp_path / "small.onnx", table_dtype="float16")
    assert [name for name, outcome in again.outcomes.items() if outcome.applied] == ["table-dtype"]
    # What was done before is still noted.
    info = lmkan_deploy.inspect(tmp_path / "small.onnx")
    assert info.passes_applied["fold-scale-shift"] == ["0: BatchNormalization"]
    assert info.passes_applied["table-dtype"] == ["0: float16", "2: float16"]


def test_running_the_passes_again_changes_nothing(tmp_path: Path) -> None:
    module = torch.nn.Sequential(LMKANConv2d(6, 2, 8, 2), torch.nn.BatchNorm2d(8), LMKANConv2d(6, 8, 4, 2))
    model = to_onnx(module.eval(), input_specs(module, [parse_input_shape("n,2,8,8")]))
    assert not any(outcome.applied for outcome in run_passes(model).values())


# --- Other spellings ---------------------------------------------------------------------------------

RELUS = {
    "relu": lambda x: torch.relu(x),
    "clamp": lambda x: x.clamp(min=0),
    "clamp_min": lambda x: torch.clamp_min(x, 0.0),
    "maximum": lambda x: torch.maximum(torch.zeros_like(x), x),
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "where, the other way round": lambda x: torch.where(x <= 0, torch.zeros_like(x), x),
    "mask": lambda x: (x >= 0) * x,
    "threshold": lambda x: torch.nn.functional.threshold(x, 0.0, 0.0),
}
NO_RELUS = {
    "clamp": lambda x: x.clamp(min=0.5),
    "clamp to a range": lambda x: x.clamp(min=0, max=1),
    "maximum": lambda x: torch.maximum(x, torch.ones_like(x)),
    "where": lambda x: torch.where(x > 0.5, x, torch.zeros_like(x)),
    "where with another value": lambda x: torch.where(x > 0, x, torch.ones_like(x)),
    "the negative part": lambda x: torch.where(x < 0, x, torch.zeros_like(x)),
    "mask of another value": lambda x: (x.flip(-1) > 0) * x,
    "threshold": lambda x: torch.nn.functional.threshold(x, 0.5, 0.0),
}
PRODUCTS = {
    "linear": lambda self, x: self.linear(x),
    "matmul": lambda self, x: x @ self.linear.weight.T + self.linear.bias,
    "einsum": lambda self, x: torch.einsum("bi,oi->bo", x, self.linear.weight) + self.linear.bias,
    "einsum, the other way round": lambda self, x: (
        torch.einsum("...i,io->...o", x, self.linear.weight.T.contiguous()) + self.linear.bias
    ),
    "batch-last": lambda self, x: (self.linear.weight @ x.T + self.linear.bias[:, None]).T,
}


class Branched(torch.nn.Module):
    """A lookup layer of a batch-last class, and a linear branch behind some function."""

    def __init__(self, function, product) -> None:
        super().__init__()
        self.layer, self.linear = BatchLastLayer(8, 6, 4), torch.nn.Linear(6, 4)
        self.function, self.product = function, product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.3 * self.layer(x.T).T + self.product(self, self.function(x))


@pytest.mark.parametrize(
    ("relu", "product"),
    [
        *((relu, "linear") for relu in RELUS),
        *(("where", product) for product in PRODUCTS if product != "linear"),
    ],
)
def test_relu_first_branches_in_other_words(relu: str, product: str, tmp_path: Path) -> None:
    model = check(Branched(RELUS[relu], PRODUCTS[product]), "batch,6", tmp_path)
    assert op_types(model) == ["LMKAN2D"]


SUMS = {
    "difference": lambda layer, branch, c: layer - branch,
    "difference, the other way round": lambda layer, branch, c: branch - layer,
    "multiple": lambda layer, branch, c: layer + 2 * branch,
    "multiple of each output": lambda layer, branch, c: layer + branch * c,
    "quotient": lambda layer, branch, c: 0.5 * layer - branch / 4,
    "quotients of each output": lambda layer, branch, c: branch / c + layer,
    "negative": lambda layer, branch, c: -branch + layer,
    "shift": lambda layer, branch, c: (branch + 3) * 0.5 + layer,
    "multiple of a difference": lambda layer, branch, c: -3 * (2 * branch - layer) + c,
}


class Summed(Branched):
    """The same of another sum."""

    def __init__(self, total) -> None:
        super().__init__(RELUS["relu"], PRODUCTS["linear"])
        self.total = total
        self.gain = torch.nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.total(self.layer(x.T).T, self.linear(torch.relu(x)), self.gain)


@pytest.mark.parametrize("total", SUMS)
def test_differences_and_multiples_of_branches(total: str, tmp_path: Path) -> None:
    assert op_types(check(Summed(SUMS[total]), "batch,6", tmp_path)) == ["LMKAN2D"]


def test_what_divides_by_a_branch_stays(tmp_path: Path) -> None:
    assert "Div" in op_types(check(Summed(lambda layer, branch, c: layer + c / branch), "batch,6", tmp_path))


def test_every_batch_norm_that_stays_has_a_reason(tmp_path: Path) -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = LMKANConv2d(5, 2, 8, kernel_size=2, preconditioning="relu_first")
            self.second = LMKANConv2d(6, 8, 6, kernel_size=1)
            self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(n) for n in (2, 8, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norms[1](self.first(self.norms[0](x)))
            return self.norms[2](torch.tanh(self.second(x))) + 1

    network = Network().eval()
    for norm in network.norms:
        norm.running_mean.normal_()
    model = check(network, "n,2,4,4", tmp_path)
    norms = [node.name for node in model.graph if node.op_type == "BatchNormalization"]
    reasons = noted_outcomes(model.metadata_props)[1]["fold-scale-shift"]
    assert len(norms) == len(reasons) == 3
    assert "no lookup layer is before it" in reasons[0] or "would move the grid" in reasons[0]
    assert "BatchNormalization stays: it follows Add, not a lookup layer alone" in reasons[1]
    assert "BatchNormalization stays: it follows Tanh, not a lookup layer alone" in reasons[2]


@pytest.mark.parametrize("other", NO_RELUS)
def test_what_is_no_relu_stays(other: str, tmp_path: Path) -> None:
    model = check(Branched(NO_RELUS[other], PRODUCTS["linear"]), "batch,6", tmp_path)
    assert "Gemm" in op_types(model)
    _, refused = noted_outcomes(model.metadata_props)
    assert "another function of them than ReLU" in refused["fold-linear-branch"][0]


class BatchLastNetwork(torch.nn.Module):
    """Batch-last from one end to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = BatchLastLayer(8, 6, 4), BatchLastLayer(8, 4, 2)
        self.linear = torch.nn.Linear(6, 4)
        self.gain = torch.nn.Parameter(torch.rand(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.T
        branch = self.linear.weight @ torch.relu(x) + self.linear.bias[:, None]
        h = (self.gain[:, None] * self.first(x) + branch - 0.5) / 2
        return self.second(h).T


def test_batch_last_networks_become_batch_first(tmp_path: Path) -> None:
    model = check(BatchLastNetwork(), "batch,6", tmp_path)
    assert op_types(model) == ["LMKAN2D", "LMKAN2D"]


@pytest.mark.parametrize(
    "function",
    [
        lambda layer, x: torch.tanh(-layer(x.T)).T * 2,
        lambda layer, x: (layer(x.T) + torch.arange(4.0)[:, None]).T.sigmoid(),
        lambda layer, x: 3 - layer(x.T).T - torch.ones(1, 4),
        lambda layer, x: (layer(x.T) / torch.tensor([[1.0], [2.0], [3.0], [4.0]]) - torch.tanh(x[:, :4].T)).T,
    ],
)
def test_transposes_meet_behind_what_is_between_them(function, tmp_path: Path) -> None:
    model = check(_Wrapped(function), "batch,6", tmp_path)
    assert "Transpose" not in op_types(model)


class _Wrapped(torch.nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.layer, self.function = BatchLastLayer(8, 6, 4), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.layer, x)


def test_a_transpose_that_others_use_stays(tmp_path: Path) -> None:
    model = check(
        _Wrapped(lambda layer, x: (lambda t: t.relu() + t.cumsum(0))(layer(x.T))), "batch,6", tmp_path
    )
    assert op_types(model).count("Transpose") == 1


@pytest.mark.parametrize("shape", ["batch,time,6", "batch,5,6", "2,time,3,6"])
@pytest.mark.parametrize("relu", [False, True])
def test_sequences_keep_their_axes(shape: str, relu: bool, tmp_path: Path) -> None:
    class Sequence(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.linear = BatchLastLayer(8, 6, 4), torch.nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x.reshape(-1, 6).T).T.reshape(*x.shape[:-1], 4)
            return 0.5 * y + self.linear(x.relu() if relu else x)

    model = check(Sequence(), shape, tmp_path)
    assert op_types(model) == ["LMKAN2D"]


@pytest.mark.parametrize(
    ("shape", "before", "after"),
    [
        ("batch,2,3,2", (-1, 6), (-1, 2, 4)),  # features of several axes
        ("batch,4,6", (-1, 6), (-1, 2, 4)),  # other leading axes behind the layer
        ("batch,2,6", (-1, 6), (-1, 8)),  # outputs of two rows together
    ],
)
def test_reshapes_that_move_features_stay(
    shape: str, before: tuple[int, ...], after: tuple[int, ...], tmp_path: Path
) -> None:
    network = _Wrapped(lambda layer, x: layer(x.reshape(before).T).T.reshape(after))
    assert op_types(check(network, shape, tmp_path)).count("Reshape") == 2


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


def test_zeros_with_more_axes_are_no_relu(tmp_path: Path) -> None:
    model = check(
        Branched(lambda x: torch.maximum(x, torch.zeros(1, 1, 1)), PRODUCTS["linear"]), "batch,6", tmp_path
    )
    assert op_types(model) != ["LMKAN2D"]


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
