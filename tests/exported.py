"""Exports networks that never were in a file, and compares what comes out with PyTorch."""

from __future__ import annotations

import types
from pathlib import Path

import onnx
import torch

from lmkan_deploy.checkpoints.input_shapes import input_specs, parse_input_shape
from lmkan_deploy.converters.model_file import staged_model
from lmkan_deploy.converters.torch_to_onnx import to_onnx
from lmkan_deploy.nn import LMKAN2DLayer
from lmkan_deploy.runtime.pytorch import TorchRunner
from lmkan_deploy.runtime.runner import load_runner
from lmkan_deploy.verification import random_cases, verify_runners

RUNTIMES = ("onnxruntime", "onnxruntime-function", "onnx-reference")


def export_module(module: torch.nn.Module, path: Path, *shapes: str, **options) -> Path:
    """Exports a module that never was in a file."""
    specs = input_specs(module.eval(), [parse_input_shape(shape) for shape in shapes])
    with staged_model(to_onnx(module, specs, **options), path):
        pass
    return path


def lookups(path: Path) -> list[onnx.NodeProto]:
    model = onnx.load(path)
    onnx.checker.check_model(model)
    return [node for node in model.graph.node if node.op_type == "LMKAN2D"]


class Block(torch.nn.Module):
    """A lookup layer whose surroundings a test chooses."""

    def __init__(self, forward, width: int = 4, **buffers: torch.Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lmkan = LMKAN2DLayer(5, width, width)
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self.forward = types.MethodType(forward, self)


def assert_agrees(module: torch.nn.Module, path: Path, *shapes: str) -> list[str]:
    """Exports a module, compares ONNX Runtime with it, and gives the names of the outputs."""
    export_module(module, path, *shapes)
    runners = [load_runner(path, runtime) for runtime in RUNTIMES[:2]]
    names = [spec.name for spec in runners[0].outputs]
    specs = input_specs(module, [parse_input_shape(shape) for shape in shapes])
    reference = TorchRunner(module, specs, names)
    result = verify_runners(reference, runners, random_cases(runners[0].inputs, sizes=[2, 5]))
    assert result.passed, result
    return names
