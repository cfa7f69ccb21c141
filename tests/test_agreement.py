"""All ways to run one network give one answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import lmkan_deploy
from lmkan_deploy.reference import lookup2d
from lmkan_deploy.runtime.runner import load_runner
from networks import make_stack


@pytest.mark.parametrize(("widths", "num_grids"), [((12, 32, 32, 1), 12), ((6, 3), 3), ((32, 40, 2), 28)])
@pytest.mark.parametrize("rows", [0, 1, 19, 111])
def test_eager_export_onnxruntime_and_reference(
    widths: tuple[int, ...], num_grids: int, rows: int, tmp_path: Path
) -> None:
    module = make_stack(*widths, num_grids=num_grids)
    torch.save(module.state_dict(), tmp_path / "model.pt")
    lmkan_deploy.export(tmp_path / "model.pt", tmp_path / "model.onnx", check=False)
    x = torch.randn(rows, widths[0])
    program = torch.export.export(
        module, (torch.randn(4, widths[0]),), dynamic_shapes=({0: torch.export.Dim("n", min=0)},)
    )
    answers = {"eager": module(x).detach().numpy(), "float64": _float64(module, x.numpy())}
    if rows >= 2:  # an exported program keeps PyTorch's assumptions about 0 and 1
        answers["torch.export"] = program.module()(x).detach().numpy()
    for runtime in ("onnxruntime", "onnxruntime-function", "onnx-reference"):
        answers[runtime] = load_runner(tmp_path / "model.onnx", runtime).run({"x": x.numpy()})["y"]
    scale = np.abs(answers["float64"]).max(initial=1.0)
    for name, y in answers.items():
        assert y.shape == (rows, widths[-1]), name
        assert np.abs(y - answers["float64"]).max(initial=0.0) <= 1e-4 * scale, name
    if rows >= 2:
        np.testing.assert_array_equal(answers["eager"], answers["torch.export"])


def _float64(module: torch.nn.Sequential, x: np.ndarray) -> np.ndarray:
    y = x.astype(np.float64)
    for layer in module:
        if isinstance(layer, torch.nn.BatchNorm1d):
            mean, variance = layer.running_mean.numpy(), layer.running_var.numpy()
            y = (y - mean) / np.sqrt(variance.astype(np.float64) + layer.eps)
        else:
            y = lookup2d(y, layer.table.detach().numpy())
    return y
