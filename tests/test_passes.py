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
from lmkan_deploy.converters.passes import PASSES, optimize, run_passes, select_passes
from lmkan_deploy.converters.passes.fold_linear_branch import Linear, _with_branch
from lmkan_deploy.converters.passes.fold_scale_shift import _scaled
from lmkan_deploy.converters.passes.simplify_layout import simplify_layout
from lmkan_deploy.converters.torch_to_onnx import to_onnx
from lmkan_deploy.errors import ExportError
from lmkan_deploy.nn import LMKAN2DLayer, LMKANConv2d, PreconditionedLMKAN2D
from lmkan_deploy.reference import lookup2d
from lmkan_deploy.runtime.runner import load_runner
from lmkan_deploy.upstream import LMKAN2DLayer as BatchLastLayer
from networks import make_stack

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
            for size in rows:
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


def hand_made(body: str, outputs: str) -> onnx.ModelProto:
    """A model around `h = LMKAN2D(x, table)`, without the shapes of intermediate values."""
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20, "lmkan" : 1]>
        g (float[n, 4] x) => ({outputs}) {{ h = lmkan.LMKAN2D (x, table)  {body} }}"""
    )
    for name, shape in (("table", (2, 7, 7, 6)), ("c", (6,)), ("w", (4, 6)), ("column", (6, 1))):
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


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
    proto = hand_made(body, outputs)
    model = ir.serde.deserialize_model(proto)
    optimize(model)
    rewritten = ir.serde.serialize_model(model)
    onnx.checker.check_model(rewritten)
    assert [value.name for value in rewritten.graph.output] == [value.name for value in proto.graph.output]
    if left is not None:
        assert [node.op_type for node in rewritten.graph.node] == left

    def run(m: onnx.ModelProto) -> list[np.ndarray]:
        options = ort.SessionOptions()
        lmkan_deploy.register_custom_ops(options)
        x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
        return ort.InferenceSession(m.SerializeToString(), options).run(None, {"x": x})

    for got, want in zip(run(rewritten), run(proto), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


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
    assert [item.name for item in select_passes(without=["all"])] == ["fold-table-transpose", "clean-up"]
    assert "fold-scale-shift" not in [item.name for item in select_passes(without=["fold-scale-shift"])]
    assert [item.name for item in select_passes(["drop-constant-pairs"])][-1] == "drop-constant-pairs"
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
    info = lmkan_deploy.inspect(tmp_path / "small.onnx")
    assert info.has_function
    assert info.metadata["lmkan_deploy.checkpoint"] == "model.pt"
    assert "BatchNormalization" in info.metadata["lmkan_deploy.passes_applied"]
    again = lmkan_deploy.optimize(tmp_path / "small.onnx", tmp_path / "small.onnx")
    assert not any(outcome.applied for outcome in again.outcomes.values())


def test_running_the_passes_again_changes_nothing(tmp_path: Path) -> None:
    module = torch.nn.Sequential(LMKANConv2d(6, 2, 8, 2), torch.nn.BatchNorm2d(8), LMKANConv2d(6, 8, 4, 2))
    model = to_onnx(module.eval(), input_specs(module, [parse_input_shape("n,2,8,8")]))
    assert not any(outcome.applied for outcome in run_passes(model).values())
