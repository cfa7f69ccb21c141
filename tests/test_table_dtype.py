"""Tables in fewer bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lmkan_deploy
from lmkan_deploy import report
from lmkan_deploy.converters.byte_scales import from_bytes, to_bytes
from lmkan_deploy.converters.model_file import load_model
from lmkan_deploy.converters.quantize import round_table, table_scales
from lmkan_deploy.converters.table_dtype import store_scales
from lmkan_deploy.errors import ExportError, InputError, VerificationError
from lmkan_deploy.nn import LMKAN2DLayer
from lmkan_deploy.reference import dequantize_table, lookup2d
from lmkan_deploy.runtime.runner import load_runner
from lmkan_deploy.spec import OP_TYPE, QUANTIZED_OP_TYPE, TableDtype
from lmkan_deploy.verification import TableCosts
from networks import ExportedStack, UserModel, make_stack

UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 2.0**-8}
"""Largest error of one rounding: relative, for int8 to the largest entry of a pair and output."""

SHARE = {"float16": 0.51, "bfloat16": 0.51, "int8": 0.27}
"""Size relative to float32, scales and the rest of the weights included."""


@pytest.mark.parametrize("dtype", UNIT)
def test_user_models_with_narrow_tables(dtype: str, user_model: UserModel, tmp_path: Path) -> None:
    result = lmkan_deploy.export(
        user_model.state_dict,
        tmp_path / "model.onnx",
        architecture=user_model.architecture,
        input_shapes=user_model.input_shapes,
        table_dtype=dtype,
    )
    assert result.verification.passed
    assert {layer.table_dtype for layer in result.info.layers} == {dtype}
    wide = lmkan_deploy.export(
        user_model.state_dict,
        tmp_path / "wide.onnx",
        architecture=user_model.architecture,
        input_shapes=user_model.input_shapes,
    )
    assert result.info.weight_bytes < SHARE[dtype] * wide.info.weight_bytes
    overhead = wide.info.file_bytes - wide.info.weight_bytes  # the function and the rest of the graph
    assert result.info.file_bytes < SHARE[dtype] * wide.info.weight_bytes + 1.2 * overhead
    error = {}
    for runtime in ("onnxruntime", "onnxruntime-function", "onnx-reference"):
        y = load_runner(result.path, runtime).run({"x": user_model.x})["y"]
        assert y.dtype == np.float32
        error[runtime] = np.abs(y - user_model.y).max() / np.abs(user_model.y).max()
    # The rounding shows, in every runtime alike, and stays of its order.
    assert all(0.01 * UNIT[dtype] < e < 60 * UNIT[dtype] for e in error.values()), error
    assert max(error.values()) < 1.2 * min(error.values())


@pytest.mark.parametrize("num_grids", [3, 4, 5, 6, 7, 12])
def test_int8_files_are_a_quarter(num_grids: int, tmp_path: Path) -> None:
    torch.save(make_stack(128, 512, 10, num_grids=num_grids).state_dict(), tmp_path / "model.pt")
    sizes = {}
    for dtype in ("float32", "int8"):
        path = tmp_path / f"{dtype}.onnx"
        sizes[dtype] = lmkan_deploy.export(
            tmp_path / "model.pt", path, table_dtype=dtype, check=False
        ).info.file_bytes
    assert sizes["int8"] <= 0.27 * sizes["float32"]
    info = lmkan_deploy.inspect(tmp_path / "int8.onnx")
    assert sum(layer.table_bytes for layer in info.layers) == info.weight_bytes
    # Answers of the operator and of the function, of a model whose scales are stored otherwise, and of a session
    # that leaves the scales to be computed in each call.
    x = {"x": np.random.default_rng(0).standard_normal((37, 128), np.float32)}
    y = load_runner(path).run(x)["y"]
    function = load_runner(path, "onnxruntime-function").run(x)["y"]
    np.testing.assert_allclose(function, y, atol=1e-3 * np.abs(y).max())
    model = load_model(path)
    store_scales(model)
    ir.save(model, tmp_path / "stored.onnx")
    assert {node.op_type for node in model.graph} == {QUANTIZED_OP_TYPE}
    np.testing.assert_array_equal(load_runner(tmp_path / "stored.onnx").run(x)["y"], y)
    options = ort.SessionOptions()
    lmkan_deploy.register_custom_ops(options)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, x)[0], y)


def test_scales_in_bytes_are_computed_when_a_model_is_loaded(stack: ExportedStack, tmp_path: Path) -> None:
    result = lmkan_deploy.export(stack.checkpoint, tmp_path / "m.onnx", table_dtype="int8", check=False)
    assert result.info.other_nodes == {"Cast": 2, "Mul": 2}
    options = ort.SessionOptions()
    lmkan_deploy.register_custom_ops(options)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(result.path, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx").graph
    assert [node.op_type for node in optimized.node] == [QUANTIZED_OP_TYPE] * 2


def test_int8_files_are_compared_as_such(
    stack: ExportedStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lmkan_deploy.optimize(stack.onnx, tmp_path / "int8.onnx", table_dtype="int8")
    monkeypatch.setattr("lmkan_deploy.verification.DEFAULT_RTOL", {"float32": 1e-9})
    monkeypatch.setattr("lmkan_deploy.verification.RANDOM_RTOL", 1e-9)
    again = lmkan_deploy.optimize(tmp_path / "int8.onnx", tmp_path / "again.onnx")
    assert again.verification.passed
    assert lmkan_deploy.verify(tmp_path / "int8.onnx", reference_model=tmp_path / "again.onnx").passed
    assert not lmkan_deploy.verify(tmp_path / "int8.onnx", reference_model=stack.onnx).passed


class Twice(torch.nn.Module):
    """One layer, of which a call is scaled: one int8 table, but scales of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = LMKAN2DLayer(4, 8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * self.layer(torch.tanh(x)) + self.layer(x)


def test_weights_that_layers_share_are_counted_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(Twice().state_dict(), tmp_path / "m.pt")
    result = lmkan_deploy.export(
        tmp_path / "m.pt",
        architecture=lmkan_deploy.Architecture("test_table_dtype:Twice", Path(__file__).parent),
        input_shapes="batch,8",
        table_dtype="int8",
    )
    first, second = result.info.layers
    assert second.table_of == first.name
    assert 0 < second.table_bytes < 0.1 * first.table_bytes
    assert first.table_bytes + second.table_bytes == result.info.weight_bytes
    report.print_model(result.info)
    assert f"as {first.name}" in capsys.readouterr().out


@pytest.mark.parametrize("num_grids", [3, 4, 5, 6, 8])
def test_int8_tables_of_few_pairs_are_a_quarter(num_grids: int, tmp_path: Path) -> None:
    torch.save(make_stack(2, 12, 64, 1, num_grids=num_grids).state_dict(), tmp_path / "model.pt")
    result = lmkan_deploy.export(tmp_path / "model.pt", table_dtype="int8", check=False)
    assert result.info.weight_bytes <= 0.27 * 4 * sum(layer.parameters for layer in result.info.layers)
    assert (
        sum(cost.table_bytes for cost in measured(result.path, tmp_path).layers) == result.info.weight_bytes
    )


def measured(path: Path, folder: Path) -> TableCosts:
    """Costs by layer, against the same stack with float32 tables."""
    wide = lmkan_deploy.export(folder / "model.pt", folder / "wide.onnx", check=False).path
    costs = lmkan_deploy.verify(path, reference_model=wide, rtol=1.0).tables
    assert costs is not None
    return costs


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.floats(0, 12))
@settings(max_examples=100, deadline=None)
def test_scales_in_bytes_clip_nothing(pairs: int, outputs: int, seed: int, spread: float) -> None:
    exponents = np.random.default_rng(seed).uniform(-spread, spread, (pairs, outputs))
    scales = (10.0**exponents).astype(np.float32)
    scales[0, 0] = np.finfo(np.float32).tiny
    multiple, step = to_bytes(scales)
    rounded = from_bytes(multiple, step)
    assert rounded.dtype == np.float32
    assert (rounded >= (1 - 1e-6) * scales).all()
    largest = scales.max(axis=0)
    assert step.shape == ((1,) if largest.max() <= 16 * largest.min() else (outputs,))
    largest = largest.max() if step.shape == (1,) else largest
    assert (rounded <= scales + (1 / 255 + 1e-6) * largest).all()


@pytest.mark.parametrize("spread", [1, 10, 1000])
@pytest.mark.parametrize("num_grids", [3, 6])
def test_scales_in_bytes_cost_little(num_grids: int, spread: float) -> None:
    """Errors of outputs, relative to those with float32 scales."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 64))
    shape = (32, num_grids + 1, num_grids + 1, 20)
    outputs = np.exp(rng.uniform(0, np.log(spread), 20))
    table = (rng.standard_normal(shape) * rng.uniform(0.3, 1, (32, 1, 1, 20)) * outputs).astype(np.float32)
    want = lookup2d(x, table)
    scales = table_scales(table)
    errors = [
        np.sqrt(np.square(lookup2d(x, dequantize_table(round_table(table, s), s)) - want).mean(0))
        for s in (scales, from_bytes(*to_bytes(scales)))
    ]
    assert (errors[1] / errors[0]).max() < 1.2
    assert (errors[1] / errors[0]).mean() < 1.05


def test_a_tighter_tolerance_than_the_type_gives_fails(stack: ExportedStack, tmp_path: Path) -> None:
    with pytest.raises(VerificationError):
        lmkan_deploy.export(stack.checkpoint, tmp_path / "m.onnx", table_dtype="bfloat16", rtol=1e-5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_tolerance_counts_in_every_comparison(
    dtype: str, stack: ExportedStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmkan_deploy.verification.DEFAULT_RTOL", {"float32": 1e-12})
    monkeypatch.setattr("lmkan_deploy.verification.RANDOM_RTOL", 1e-12)
    monkeypatch.setattr("lmkan_deploy.acceptance.INT8_RTOL", 1e-12)
    for run, source, message in (
        (lmkan_deploy.export, stack.checkpoint, "differs from PyTorch"),
        (lmkan_deploy.optimize, stack.onnx, "operator differs from the function"),
    ):
        with pytest.raises(VerificationError, match=f"{message}.*pass --rtol to allow more"):
            run(source, tmp_path / "m.onnx", table_dtype=dtype)
        assert run(source, tmp_path / "m.onnx", table_dtype=dtype, rtol=0.5).verification.passed
        (tmp_path / "m.onnx").unlink()


def test_what_narrow_tables_cost_is_limited_by_the_user_alone(tmp_path: Path) -> None:
    """Large entries of two pairs cancel, and bfloat16 rounds them by more than what is left."""
    torch.manual_seed(0)
    layer = LMKAN2DLayer(6, 4, 8)
    with torch.no_grad():
        layer.func_parameter.normal_().add_(torch.tensor([1000.0, -1000.0]))
    torch.save(torch.nn.Sequential(layer).state_dict(), tmp_path / "m.pt")
    path = lmkan_deploy.export(tmp_path / "m.pt", check=False).path
    result = lmkan_deploy.optimize(path, tmp_path / "narrow.onnx", table_dtype="bfloat16")
    assert result.verification.passed
    worst = max(comparison.max_rel for comparison in result.verification.comparisons)
    assert worst > 1
    assert result.tables.together == pytest.approx(worst, rel=0.1)
    with pytest.raises(VerificationError, match="allowed 1e.00"):
        lmkan_deploy.optimize(path, tmp_path / "narrow.onnx", table_dtype="bfloat16", rtol=1.0)


def test_costs_of_layers_without_names(stack: ExportedStack, tmp_path: Path) -> None:
    named = lmkan_deploy.optimize(stack.onnx, tmp_path / "named.onnx", table_dtype="int8")
    want = lmkan_deploy.verify(named.path, reference_model=stack.onnx, rtol=1.0).tables
    model = onnx.load(stack.onnx)
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, tmp_path / "m.onnx")
    narrow = lmkan_deploy.optimize(tmp_path / "m.onnx", tmp_path / "narrow.onnx", table_dtype="int8").path
    found = lmkan_deploy.verify(narrow, reference_model=tmp_path / "m.onnx", rtol=1.0).tables
    for costs in (want, found):
        assert [cost.dtype for cost in costs.layers] == ["int8", "int8"]
    assert [cost.errors for cost in found.layers] == [cost.errors for cost in want.layers]


def test_options_without_a_use_are_refused(stack: ExportedStack, tmp_path: Path) -> None:
    x = {"x": np.zeros((3, 10), np.float32)}
    output = tmp_path / "m.onnx"
    for options, message in (
        ({"calibration": x}, "expected narrow tables with --calibration"),
        ({"calibration": x, "table_dtype": "float32"}, "expected narrow tables with --calibration"),
        ({"inputs": x, "check": False}, "--inputs, which are compared on, found none; leave out --no-verify"),
        ({"rtol": 0.0, "check": False}, "--rtol, which limits errors, found none; leave out --no-verify"),
    ):
        with pytest.raises(ExportError, match=message):
            lmkan_deploy.export(stack.checkpoint, output, **options)
    with pytest.raises(ExportError, match="--rtol, which limits errors"):
        lmkan_deploy.optimize(stack.onnx, output, rtol=1e-3, check=False)
    for options, message in (
        ({"outputs": x, "inputs": x, "reference_model": stack.onnx}, "found outputs and reference_model"),
        ({"checkpoint": stack.checkpoint, "outputs": x}, "found checkpoint and outputs"),
        ({"key": "ema", "architecture": "models:Net"}, "expected a checkpoint for architecture and key"),
        ({"runtimes": []}, "expected a runtime to compare"),
        ({"seed": -1}, "expected a seed of at least 0"),
    ):
        with pytest.raises(InputError, match=message):
            lmkan_deploy.verify(stack.onnx, **options)
    found = lmkan_deploy.verify(stack.onnx, runtimes="onnxruntime", batch_sizes=4)
    assert [comparison.case for comparison in found.comparisons] == ["random 4"]


def test_real_inputs_tell_what_narrow_tables_cost(stack: ExportedStack, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((9, 10)).astype(np.float32)
    for result in (
        lmkan_deploy.export(stack.checkpoint, tmp_path / "a.onnx", table_dtype="int8", calibration={"x": x}),
        lmkan_deploy.optimize(stack.onnx, tmp_path / "b.onnx", table_dtype="int8", calibration={"x": x}),
    ):
        assert {comparison.case for comparison in result.verification.comparisons} == {"calibration"}
        assert result.verification.comparisons[0].max_rel == pytest.approx(result.tables.together, rel=0.01)


def test_optimizing_a_file(stack: ExportedStack, tmp_path: Path) -> None:
    result = lmkan_deploy.optimize(stack.onnx, tmp_path / "half.onnx", table_dtype="float16")
    assert result.outcomes["table-dtype"].applied == ["0: float16", "2: float16"]
    assert result.verification.passed
    same = lmkan_deploy.optimize(tmp_path / "half.onnx", tmp_path / "again.onnx", table_dtype="float16")
    assert same.outcomes["table-dtype"].refused == []


class Branches(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.plus, self.minus = (
            LMKAN2DLayer(6, 4, 4),
            LMKAN2DLayer(6, 4, 2),
            LMKAN2DLayer(6, 4, 2),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return torch.cond(y.sum() > 0, self.plus, self.minus, (y,))


def test_lookups_in_branches_are_not_narrowed_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(Branches().state_dict(), tmp_path / "m.pt")
    architecture = lmkan_deploy.Architecture("test_table_dtype:Branches", Path(__file__).parent)
    options = {"architecture": architecture, "input_shapes": ["batch,4"]}
    wide = lmkan_deploy.export(tmp_path / "m.pt", **options)
    assert wide.notes == []
    result = lmkan_deploy.export(tmp_path / "m.pt", tmp_path / "half.onnx", table_dtype="float16", **options)
    reason = "it is inside of a branch, a loop or a function"
    types = {layer.name: layer.table_dtype for layer in result.info.layers}
    inside = [name for name, dtype in types.items() if dtype == "float32"]
    assert (types["first"], len(inside)) == ("float16", 2)
    assert result.notes == [f"not narrowed: {name}: {reason}" for name in inside]
    report.print_export(result)
    assert f"note: not narrowed: {inside[0]}: {reason}" in capsys.readouterr().out
    result = lmkan_deploy.optimize(wide.path, tmp_path / "int8.onnx", table_dtype="int8")
    assert result.outcomes["table-dtype"].refused == [f"{name}: {reason}" for name in inside]
    report.print_optimization(result)
    assert f"not table-dtype: {inside[0]}: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize("x", [np.zeros((0, 10)), np.full((3, 10), np.nan)], ids=["no rows", "NaN"])
def test_data_that_measures_nothing_is_refused(x: np.ndarray, stack: ExportedStack, tmp_path: Path) -> None:
    for options in ({"max_error": 1e-6}, {"table_dtype": "int8"}):
        with pytest.raises(InputError, match="finite outputs, found none"):
            lmkan_deploy.optimize(
                stack.onnx, tmp_path / "m.onnx", calibration=lambda _: {"x": x.astype(np.float32)}, **options
            )
    assert not (tmp_path / "m.onnx").exists()


def test_entries_beyond_the_range_are_refused(tmp_path: Path) -> None:
    module = make_stack(4, 2)
    with torch.no_grad():
        module[0].func_parameter[0, 0, 0, 0] = 1e5
    torch.save(module.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ExportError, match=r"range of float16, found 0: its largest entry, 1e\+05"):
        lmkan_deploy.export(tmp_path / "model.pt", table_dtype="float16")
    assert not (tmp_path / "model.onnx").exists()
    assert (
        lmkan_deploy.export(tmp_path / "model.pt", table_dtype="bfloat16").info.weight_bytes
        == 2 * 7 * 7 * 2 * 2
    )


def test_unknown_types_are_refused(stack: ExportedStack, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="float32, float16, bfloat16, int8, found 'int3'"):
        lmkan_deploy.optimize(stack.onnx, tmp_path / "x.onnx", table_dtype="int3")


class Repeated(nn.Module):
    """One layer and one BatchNorm, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = LMKAN2DLayer(12, 8, 8), nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = self.norm(self.layer(x))
        return x


@pytest.mark.parametrize(
    ("table_dtype", "calibrated"),
    [("float32", False), ("float16", False), ("float16", True), ("int8", False), ("int8", True)],
)
def test_a_layer_that_is_called_again_keeps_one_table(
    table_dtype: TableDtype, calibrated: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = Repeated().eval()
    with torch.no_grad():
        network.norm.running_mean.uniform_(-1, 1)
        network.norm.running_var.uniform_(0.5, 2)
    torch.save(network, tmp_path / "m.pt")
    calibration = {"x": np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)}
    result = lmkan_deploy.export(
        tmp_path / "m.pt",
        trust_pickle=True,
        table_dtype=table_dtype,
        calibration=(lambda _: calibration) if calibrated else None,
    )
    graph = onnx.load(result.path).graph
    lookups = [node for node in graph.node if node.op_type.startswith(OP_TYPE)]
    assert len(graph.node) == len(lookups) == 3, "the BatchNorm is in the table"
    assert len({tuple(node.input[1:]) for node in lookups}) == 1
    assert len(graph.initializer) == (2 if table_dtype == "int8" else 1)


@pytest.mark.parametrize("wanted", ["int8", "float32", "bfloat16"])
def test_narrow_tables_do_not_become_others(wanted: TableDtype, stack: ExportedStack, tmp_path: Path) -> None:
    narrow = lmkan_deploy.optimize(stack.onnx, tmp_path / "half.onnx", table_dtype="float16").path
    with pytest.raises(
        ExportError, match=f"float32 tables to make {wanted} ones of, found float16; start from"
    ):
        lmkan_deploy.optimize(narrow, tmp_path / "m.onnx", table_dtype=wanted)
    assert not (tmp_path / "m.onnx").exists()
    again = lmkan_deploy.optimize(narrow, tmp_path / "m.onnx", table_dtype="float16")
    assert again.verification.passed
