"""Exports networks with the passes and without, and compares both with PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import torch

from lmkan_deploy.checkpoints.input_shapes import input_specs, parse_input_shape
from lmkan_deploy.converters.model_file import staged_model
from lmkan_deploy.converters.passes import select_passes
from lmkan_deploy.converters.torch_to_onnx import to_onnx
from lmkan_deploy.runtime.runner import load_runner


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
