"""What a user reads where a network can't be exported: what was found, and what helps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import lmkan_deploy
from exported import Block, export_module
from lmkan_deploy.errors import ExportError
from networks import make_stack


@dataclasses.dataclass
class Result:
    y: torch.Tensor


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda y: (y, 3), "found int among its outputs; leave it out"),
        (lambda y: (y, "text"), "found str among"),
        (lambda y: (y, y.shape[0]), "found int among"),
        (lambda y: None, "found none among"),
        (lambda y: {}, "found none among"),
        (Result, r"Result among its outputs; return a dict, or call torch.export.register_dataclass"),
    ],
)
def test_outputs_that_are_no_tensors(returned, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_module(Block(lambda self, x: returned(self.lmkan(x))), tmp_path / "model.onnx")


def test_programs_whose_outputs_are_no_tensors(tmp_path: Path) -> None:
    module = Block(lambda self, x: (self.lmkan(x), 3)).eval()
    torch.export.save(torch.export.export(module, (torch.randn(3, 4),)), tmp_path / "model.pt2")
    with pytest.raises(ExportError, match="found int among its outputs"):
        lmkan_deploy.export(tmp_path / "model.pt2", tmp_path / "model.onnx")


def counting(self, x):
    self.count += 1
    return self.lmkan(x)


def averaging(self, x):
    self.count = 0.9 * self.count + x.mean()
    return self.lmkan(x)


def training(self, x):
    return torch.nn.functional.batch_norm(self.lmkan(x), self.mean, self.var, training=True)


@pytest.mark.parametrize(
    ("forward", "buffers", "message"),
    [
        (counting, ("count",), "each call changes count"),
        (averaging, ("count",), "each call changes count"),
        (training, ("mean", "var"), "each call changes mean, var; put layers such as BatchNorm into eval"),
        (lambda self, x: torch.dropout(self.lmkan(x), 0.5, True), (), "others at the second"),
        (lambda self, x: self.lmkan(x) + torch.randn_like(x), (), "others at the second"),
    ],
    ids=["counting", "averaging", "training", "dropout", "noise"],
)
def test_networks_that_change_between_calls(forward, buffers, message: str, tmp_path: Path) -> None:
    module = Block(forward, **{name: torch.ones(4) for name in buffers})
    with pytest.raises(ExportError, match=message):
        export_module(module, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            torch.nn.BatchNorm1d(4),
            r"each call changes 1.running_mean.*; trace the network in eval mode: call",
        ),
        (torch.nn.Dropout(), "others at the second.*; trace the network in eval mode: call"),
    ],
    ids=["BatchNorm", "Dropout"],
)
def test_programs_traced_in_train_mode(layer: torch.nn.Module, message: str, tmp_path: Path) -> None:
    module = torch.nn.Sequential(*make_stack(4, 4), layer).train()
    for check in (True, False):
        torch.export.save(torch.export.export(module, (torch.randn(3, 4),)), tmp_path / "model.pt2")
        with pytest.raises(ExportError, match=message):
            lmkan_deploy.export(tmp_path / "model.pt2", check=check)
    torch.export.save(torch.export.export(module.eval(), (torch.randn(3, 4),)), tmp_path / "model.pt2")
    assert lmkan_deploy.export(tmp_path / "model.pt2").verification.passed


@pytest.mark.parametrize(
    ("module", "shape", "found"),
    [
        (Block(lambda self, x: self.lmkan(x)).double(), "n,4:float64", "float64"),
        (Block(lambda self, x: self.lmkan(x.double()).float()), "n,4", "float64"),
        (Block(torch.no_grad()(lambda self, x: self.lmkan(x.double()).float())), "n,4", "float64"),
    ],
)
def test_lookups_of_other_types(module: torch.nn.Module, shape: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"lookup layers of float32.*{found}; convert .* model.float"):
        export_module(module, tmp_path / "model.onnx", shape)


def test_lookups_of_integers(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"expected x of float16, .*int64; convert it .*check --input-shape"
    ):
        export_module(Block(lambda self, x: self.lmkan(x)), tmp_path / "model.onnx", "n,4:int64")


def forward(self, x):  # PyTorch records the lines of functions of this name alone
    return torch.linalg.svd(self.lmkan(x))[1]


def branching(self, x):
    return self.lmkan(x) if x.sum() > 0 else -self.lmkan(x)


@pytest.mark.parametrize(
    ("forward", "shape", "message"),
    [
        (
            branching,
            "n,4",
            r"depends on values .* at test_export_problems.py:\d+, `.*x.sum\(\) > 0.*use torch.where",
        ),
        (lambda self, x: torch.stack([self.lmkan(r) for r in x]), "n,4", "axis n can't be free.*as a number"),
        (lambda self, x: self.lmkan(x) + self.y[:, : x.shape[0]].T, "n,4", "needs .*n <= 32; give it"),
        (forward, "n,4", r"no operator for aten.*svd at test_export_problems"),
        (
            lambda self, x: self.lmkan(x[:, :3]),
            "n,4",
            r"does not take its inputs: ValueError.*shapes \[4, 4\]",
        ),
    ],
    ids=["branch", "loop", "limit", "operator", "shape"],
)
def test_errors_say_where_and_what_to_do(forward, shape: str, message: str, tmp_path: Path, capfd) -> None:
    with pytest.raises(ExportError, match=message) as error:
        export_module(Block(forward, y=torch.ones(4, 32)), tmp_path / "model.onnx", shape)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_networks_without_onnx_operators_are_an_error(tmp_path: Path) -> None:
    class Unknown(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.lstsq(x, x).solution

    with pytest.raises(ExportError, match="PyTorch could not"):
        export_module(Unknown(), tmp_path / "model.onnx", "4,4")
