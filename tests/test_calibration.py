"""What narrow tables cost, and the smallest ones within an error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

import lmkan_deploy
from cli_process import cli
from lmkan_deploy.calibration import Calibration
from lmkan_deploy.converters.model_file import load_model, staged_model
from lmkan_deploy.converters.passes.base import all_lookups, table_dtype_of
from lmkan_deploy.converters.table_dtype import narrow_tables
from lmkan_deploy.errors import ExportError, ModelError
from lmkan_deploy.runtime.runner import load_runner
from lmkan_deploy.verification import random_cases
from networks import ExportedStack, UserModel

BYTES = {"float32": 4, "float16": 2, "int8": 1}


@pytest.fixture
def wide(user_model: UserModel, tmp_path: Path) -> Path:
    """The user's model with float32 tables."""
    return lmkan_deploy.export(
        user_model.state_dict,
        tmp_path / "wide.onnx",
        architecture=user_model.architecture,
        input_shapes=user_model.input_shapes,
        check=False,
    ).path


def relative_error(path: Path, wide: Path, x: np.ndarray) -> float:
    """As `Comparison.max_rel`."""
    y, want = (load_runner(file).run({"x": x})["y"].astype(np.float64) for file in (path, wide))
    return float((np.abs(y - want) / (np.abs(want) + np.sqrt(np.mean(want**2)))).max())


def test_costs_are_those_of_one_table_alone(user_model: UserModel, wide: Path, tmp_path: Path) -> None:
    study = Calibration(load_model(wide), {"data": {"x": user_model.x}})
    layers = len(all_lookups(load_model(wide)))
    costs = study.costs(["float16"] * layers)
    for index, cost in enumerate(costs.layers):
        assert set(cost.errors) == {"float16", "int8"}
        for dtype, error in cost.errors.items():
            result = load_model(wide)
            narrow_tables(result, [dtype if i == index else "float32" for i in range(layers)])
            with staged_model(result, tmp_path / "one.onnx"):
                pass
            np.testing.assert_allclose(relative_error(tmp_path / "one.onnx", wide, user_model.x), error)
        assert 2 * cost.errors["float16"] < cost.errors["int8"]
    assert costs.together == study.error(["float16"] * layers)


def test_the_chosen_types_are_the_smallest_within_the_error(user_model: UserModel, wide: Path) -> None:
    study = Calibration(load_model(wide), {"data": {"x": user_model.x}}, weighted=True)
    sizes = []
    for most in (1e-9, 1e-3, 2e-2, 10.0):
        chosen = study.choose(most)
        assert study.error(chosen) <= most
        sizes.append(sum(BYTES[dtype] for dtype in chosen))
        # No single layer can be narrower.
        for index, dtype in enumerate(chosen):
            if dtype == "int8":
                continue
            narrower = list(chosen)
            narrower[index] = "int8" if dtype == "float16" else "float16"
            assert study.error(narrower) > most
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (4 * len(chosen), len(chosen))


def test_bfloat16_is_chosen_beyond_the_range_of_float16() -> None:
    rng = np.random.default_rng(0)
    table = rng.uniform(1e6, 2e6, (3, 7, 7, 5)).astype(np.float32)
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20, "lmkan" : 1]>
        g (float[n, 6] x) => (float[n, 5] y) { y = lmkan.LMKAN2D (x, table) }"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(table, "table"))
    model = ir.serde.deserialize_model(proto)
    x = rng.uniform(-1, 1, (50, 6)).astype(np.float32)
    study = Calibration(model, {"data": {"x": x}})
    (cost,) = study.costs(["float32"]).layers
    assert set(cost.errors) == {"int8", "bfloat16"}
    assert cost.errors["int8"] != cost.errors["bfloat16"]
    assert study.choose(1e-6) == ["float32"]
    between = sorted(cost.errors.values())
    assert study.choose(between[0] * 1.01) == [min(cost.errors, key=cost.errors.get)]


def test_export_within_an_error(user_model: UserModel, wide: Path, tmp_path: Path) -> None:
    result = lmkan_deploy.export(
        user_model.state_dict,
        tmp_path / "chosen.onnx",
        architecture=user_model.architecture,
        input_shapes=user_model.input_shapes,
        calibration=lambda _: {"x": user_model.x},
        max_error=0.02,
    )
    assert relative_error(result.path, wide, user_model.x) <= 0.02
    assert result.tables is not None
    assert [cost.dtype for cost in result.tables.layers] == [
        layer.table_dtype for layer in result.info.layers
    ]
    np.testing.assert_allclose(
        relative_error(result.path, wide, user_model.x), result.tables.together, rtol=1e-6
    )
    # The same from the file with float32 tables.
    again = lmkan_deploy.optimize(
        wide, tmp_path / "again.onnx", calibration=lambda _: {"x": user_model.x}, max_error=0.02
    )
    assert again.tables == result.tables


def test_verify_against_the_model_with_wide_tables(user_model: UserModel, wide: Path, tmp_path: Path) -> None:
    narrow = lmkan_deploy.optimize(wide, tmp_path / "narrow.onnx", table_dtype="int8").path
    result = lmkan_deploy.verify(narrow, reference_model=wide, inputs={"x": user_model.x}, rtol=0.6)
    assert result.passed
    study = Calibration(load_model(wide), {"data": {"x": user_model.x}})
    expected = study.costs(["int8"] * len(all_lookups(load_model(wide))))
    assert result.tables is not None
    np.testing.assert_allclose(result.tables.together, expected.together, rtol=1e-6)
    for cost, want in zip(result.tables.layers, expected.layers, strict=True):
        np.testing.assert_allclose(cost.errors["int8"], want.errors["int8"], rtol=1e-6)
    assert not lmkan_deploy.verify(narrow, reference_model=wide, rtol=1e-4).passed
    # Nothing to measure between models with the same tables.
    assert lmkan_deploy.verify(wide, reference_model=wide).tables is None


def test_the_runtimes_of_int8_tables_agree(user_model: UserModel, wide: Path, tmp_path: Path) -> None:
    narrow = lmkan_deploy.optimize(wide, tmp_path / "narrow.onnx", table_dtype="int8").path
    assert lmkan_deploy.verify(narrow).passed
    assert {table_dtype_of(node) for node in all_lookups(load_model(narrow))} == {"int8"}


def test_other_networks_are_no_reference(stack: ExportedStack, wide: Path, tmp_path: Path) -> None:
    narrow = lmkan_deploy.optimize(stack.onnx, tmp_path / "narrow.onnx", table_dtype="int8").path
    inputs = load_runner(wide).inputs
    study = Calibration(load_model(wide), random_cases(inputs, sizes=[4]))
    with pytest.raises(ModelError, match="expected a lookup layer .* in both models, found 0, 2"):
        study.costs_of(load_model(narrow))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_error": 0.1}, "pass --calibration with --max-error"),
        ({"max_error": 0.1, "table_dtype": "int8"}, "found 0.1 and int8"),
        ({"max_error": 0.0, "calibration": lambda _: {}}, "above 0, found 0.0"),
        ({"max_error": float("nan"), "calibration": lambda _: {}}, "above 0, found nan"),
    ],
)
def test_contradictions_are_refused(
    options: dict[str, object], message: str, stack: ExportedStack, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        lmkan_deploy.optimize(stack.onnx, tmp_path / "x.onnx", **options)
    assert not (tmp_path / "x.onnx").exists()


def test_command_line(stack: ExportedStack, tmp_path: Path) -> None:
    features = load_runner(stack.onnx).inputs[0].shape[1]
    x = np.random.default_rng(0).standard_normal((50, features), dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    output = tmp_path / "narrow.onnx"
    result = cli(
        "optimize", stack.onnx, "-o", output, "--max-error", 0.05, "--calibration", tmp_path / "x.npy"
    )
    assert result.returncode == 0, result.stderr
    assert "all tables, " in result.stdout
    assert "one narrow table at a time, on calibration" in result.stdout
    exported = cli(
        "export", stack.checkpoint, "-o", tmp_path / "m.onnx", "--max-error", 0.05, "--calibration",
        tmp_path / "x.npy",
    )  # fmt: skip
    assert exported.returncode == 0, exported.stderr
    assert "all tables, " in exported.stdout
    compared = cli("verify", output, "--reference", stack.onnx, "--rtol", 0.9)
    assert "one narrow table at a time, on random inputs" in compared.stdout
    verified = cli(
        "verify", output, "--reference", stack.onnx, "-i", tmp_path / "x.npy", "--rtol", 0.2, "--json"
    )
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["tables"]["together"] <= 0.05
    wrong = cli("optimize", stack.onnx, "-o", output, "--max-error", 0.05)
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
