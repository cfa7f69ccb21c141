"""Writing of exported models: external data, large files, and nothing where something failed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
import torch

import lmkan_deploy
from exported import RUNTIMES
from lmkan_deploy.errors import ModelError, VerificationError
from lmkan_deploy.nn import LMKAN2DLayer
from lmkan_deploy.runtime.runner import load_runner
from networks import ExportedStack

# --- External data -----------------------------------------------------------------------------------


def test_external_data(stack: ExportedStack, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    info = lmkan_deploy.export(stack.checkpoint, path, external_data=True).info
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert path.stat().st_size < 20_000 < info.file_bytes
    x = np.random.default_rng(0).standard_normal((3, 10)).astype(np.float32)
    want = load_runner(stack.onnx).run({"x": x})["y"]
    for runtime in RUNTIMES:
        np.testing.assert_allclose(load_runner(path, runtime).run({"x": x})["y"], want, rtol=1e-4, atol=1e-5)

    lmkan_deploy.export(stack.checkpoint, path, external_data=False)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]

    lmkan_deploy.export(stack.checkpoint, path, external_data=True)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"model\.onnx\.data, found no such file"):
        lmkan_deploy.inspect(path)


def test_external_data_that_was_cut_short(stack: ExportedStack, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    lmkan_deploy.export(stack.checkpoint, path, external_data=True)
    data = tmp_path / "model.onnx.data"
    size = data.stat().st_size
    os.truncate(data, size - 1)
    uses = (
        lmkan_deploy.inspect,
        lambda p: lmkan_deploy.optimize(p, p),
        lambda p: load_runner(p, "onnx-reference"),
    )
    for use in uses:
        with pytest.raises(
            ModelError, match=rf"to {size} of .*model\.onnx\.data .*found {size - 1} bytes; copy"
        ):
            use(path)


@pytest.mark.parametrize("output", ["model.onnx", "other.onnx", "folder/other.onnx"])
@pytest.mark.parametrize("external_data", [None, True])
@pytest.mark.parametrize("table_dtype", [None, "int8"])
@pytest.mark.parametrize("check", [False, True])
def test_external_data_goes_with_the_model(
    output: str,
    external_data: bool | None,
    table_dtype: Literal["int8"] | None,
    check: bool,
    stack: ExportedStack,
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.onnx"
    lmkan_deploy.export(stack.checkpoint, path, external_data=True, check=False)
    (tmp_path / "folder").mkdir()
    target = tmp_path / output
    lmkan_deploy.optimize(path, target, external_data=external_data, table_dtype=table_dtype, check=check)
    if target != path:
        path.unlink()
        (tmp_path / "model.onnx.data").unlink()
    files = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file())
    assert files == ([output, f"{output}.data"] if external_data else [output])
    x = np.random.default_rng(0).standard_normal((3, 10)).astype(np.float32)
    want = load_runner(stack.onnx).run({"x": x})["y"]
    tolerance = 1e-5 if table_dtype is None else 3e-2
    np.testing.assert_allclose(load_runner(target).run({"x": x})["y"], want, rtol=tolerance, atol=tolerance)


def test_files_that_are_not_the_models_stay(stack: ExportedStack, tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").write_text("somebody else's")
    lmkan_deploy.export(stack.checkpoint, tmp_path / "model.onnx", check=False)
    assert (tmp_path / "model.onnx.data").read_text() == "somebody else's"
    before = stack.checkpoint.read_bytes()
    with pytest.raises(lmkan_deploy.LmkanError, match="other than the checkpoint"):
        lmkan_deploy.export(stack.checkpoint, stack.checkpoint)
    assert stack.checkpoint.read_bytes() == before


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret"])
def test_external_data_elsewhere_is_not_read(location: str, stack: ExportedStack, tmp_path: Path) -> None:
    path = tmp_path / "sub" / "model.onnx"
    path.parent.mkdir()
    lmkan_deploy.export(stack.checkpoint, path, external_data=True, check=False)
    path.write_bytes(_with_location(onnx.load(path, load_external_data=False), location).SerializeToString())
    uses = (
        lmkan_deploy.inspect,
        lambda p: lmkan_deploy.optimize(p, p),
        lambda p: load_runner(p, "onnx-reference"),
    )
    for use in uses:
        with pytest.raises(ModelError, match="in its own folder"):
            use(path)


def _with_location(model: onnx.ModelProto, location: str) -> onnx.ModelProto:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    return model


@pytest.mark.skipif(
    os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 20 << 30,
    reason="a network of 3 GB needs 20 GB of memory for PyTorch, ONNX and two ONNX Runtime sessions",
)
def test_three_gigabytes(tmp_path: Path) -> None:
    layers = [LMKAN2DLayer(26, 512, 512) for _ in range(8)]
    torch.save(torch.nn.Sequential(*layers).state_dict(), tmp_path / "model.pt")
    result = lmkan_deploy.export(tmp_path / "model.pt", tmp_path / "model.onnx")
    assert result.info.weight_bytes > 3e9
    assert result.verification.passed
    assert (tmp_path / "model.onnx").stat().st_size < 1e6


# --- Failures ----------------------------------------------------------------------------------------


def test_a_failed_verification_leaves_what_was_there(stack: ExportedStack, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(VerificationError, match="relative error .* nothing was written"):
        lmkan_deploy.export(stack.checkpoint, path, rtol=1e-12)
    assert list(tmp_path.iterdir()) == []
    path.write_text("the old file")
    with pytest.raises(VerificationError):
        lmkan_deploy.export(stack.checkpoint, path, rtol=1e-12)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["the old file"]


class Logarithms(torch.nn.Module):
    """Random inputs are mostly out of its domain."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = LMKAN2DLayer(6, 8, 4)
        torch.nn.init.normal_(self.layer.func_parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.log(x))


def test_nothing_is_verified_where_no_output_is_finite(tmp_path: Path) -> None:
    x = torch.rand(9, 8) + 0.5
    program = torch.export.export(Logarithms().eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "m.pt2")
    with pytest.raises(
        VerificationError, match="expected finite outputs to compare, found none; pass --inputs"
    ):
        lmkan_deploy.export(tmp_path / "m.pt2")
    assert list(tmp_path.glob("*.onnx")) == []
    assert lmkan_deploy.export(tmp_path / "m.pt2", inputs={"x": x.numpy()}).verification.passed


def test_a_missing_folder(stack: ExportedStack, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a writable folder"):
        lmkan_deploy.export(stack.checkpoint, tmp_path / "nowhere" / "model.onnx")
