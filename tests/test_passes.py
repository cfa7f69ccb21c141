"""Graph passes: which ones run, what they do to the networks they are meant for, and what stays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import lmkan_deploy
from lmkan_deploy.checkpoints.input_shapes import input_specs, parse_input_shape
from lmkan_deploy.converters.model_file import staged_model
from lmkan_deploy.converters.passes import PASSES, noted_outcomes, run_passes, select_passes
from lmkan_deploy.converters.torch_to_onnx import to_onnx
from lmkan_deploy.errors import ExportError
from lmkan_deploy.nn import LMKAN2DLayer, LMKANConv2d, PreconditionedLMKAN2D
from lmkan_deploy.runtime.runner import load_runner
from lmkan_deploy.upstream import LMKAN2DLayer as BatchLastLayer
from networks import make_stack
from rewritten import check, op_types

# --- Networks ----------------------------------------------------------------------------------------


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


def test_a_batch_norm_before_the_first_layer_stays(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(4), LMKAN2DLayer(6, 4, 6)).eval()
    refused = noted_outcomes(check(module, "n,4", tmp_path).metadata_props)[1]
    assert refused["fold-scale-shift"] == ["1: BatchNormalization before it stays: it would move the grid"]


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
