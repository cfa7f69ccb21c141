"""Networks that several test files share."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch

from lmkan_deploy import Architecture
from lmkan_deploy.nn import LMKAN2DLayer

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class UserModel:
    """A model that a user of upstream's package trained and saved."""

    name: str
    architecture: Architecture
    input_shapes: tuple[str, ...]
    num_lookups: int

    @property
    def state_dict(self) -> Path:
        return DATA / f"{self.name}.state_dict.pt"

    @property
    def pickled(self) -> Path:
        return DATA / f"{self.name}.pickled.pt"

    @property
    def x(self) -> np.ndarray:
        return np.load(DATA / f"{self.name}.io.npz")["x"]

    @property
    def y(self) -> np.ndarray:
        return np.load(DATA / f"{self.name}.io.npz")["y"]


USER_MODELS = [
    UserModel("methane", Architecture("user_models:MethaneNet", DATA), (), 3),
    UserModel("patchnet", Architecture("user_models:PatchNet", DATA), ("batch,4,8,8",), 3),
]


def make_stack(*widths: int, num_grids: int = 6, seed: int = 0) -> torch.nn.Sequential:
    """A stack of lookup and BatchNorm layers with statistics as after a training."""
    torch.manual_seed(seed)
    layers: list[torch.nn.Module] = []
    for index, (n_in, n_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        if index:
            norm = torch.nn.BatchNorm1d(n_in, affine=False)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
            layers.append(norm)
        layer = LMKAN2DLayer(num_grids, n_in, n_out)
        torch.nn.init.normal_(layer.func_parameter, std=n_in**-0.5)
        layers.append(layer)
    return torch.nn.Sequential(*layers).eval()


@dataclass(frozen=True)
class ExportedStack:
    """A stack of layers, saved and exported."""

    module: torch.nn.Sequential
    checkpoint: Path
    onnx: Path


def needs_opset(opset: int) -> None:
    """Skips a test where ONNX Runtime is too old for it, as on Python 3.10."""
    if opset > _newest_opset():
        pytest.skip(f"ONNX Runtime {onnxruntime.__version__} does not read opset {opset}")


@functools.cache
def _newest_opset() -> int:
    for opset in range(onnx.defs.onnx_opset_version(), 0, -1):
        text = (
            f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[1] x) => (float[1] y) {{ y = Neg (x) }}'
        )
        try:
            onnxruntime.InferenceSession(onnx.parser.parse_model(text).SerializeToString())
        except Exception:  # which one, depends on the release
            continue
        return opset
    raise AssertionError("ONNX Runtime reads no opset")
