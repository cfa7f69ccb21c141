"""Networks of many kinds around the layers: values, and names of what they take and return."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import lmkan_deploy
from exported import RUNTIMES, Block, assert_agrees, export_module, lookups
from lmkan_deploy import api, report
from lmkan_deploy.checkpoints.input_shapes import input_specs, parse_input_shape
from lmkan_deploy.nn import LMKAN2DLayer, LMKANConv2d, PreconditionedLMKAN2D
from lmkan_deploy.runtime.pytorch import TorchRunner
from lmkan_deploy.runtime.runner import load_runner
from networks import make_stack


@pytest.mark.parametrize("form", ["none", "linear", "relu_first", "relu_last"])
def test_convolutional_networks(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        LMKANConv2d(5, 3, 8, 3, preconditioning=form),
        torch.nn.BatchNorm2d(8, affine=False),
        LMKANConv2d(5, 8, 6, 3, stride=1, padding=1, preconditioning=form),
        torch.nn.Flatten(),
        PreconditionedLMKAN2D(4, 54, 10, form),
    )
    path = export_module(module, tmp_path / "model.onnx", "batch,3,9,9")
    x = np.random.default_rng(0).standard_normal((5, 3, 9, 9)).astype(np.float32)
    want = module(torch.from_numpy(x)).detach().numpy()
    for runtime in RUNTIMES:
        np.testing.assert_allclose(load_runner(path, runtime).run({"x": x})["y"], want, rtol=1e-4, atol=1e-5)


def test_several_inputs_and_outputs_keep_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = LMKAN2DLayer(5, 4, 6)

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            a, b = self.shared(left), self.shared(right)
            return a + b.mean(0), a.flatten()

    path = export_module(Net(), tmp_path / "model.onnx", "left:n,4", "right:m,4")
    runner = load_runner(path)
    assert [str(spec) for spec in runner.inputs] == ["left float32[n, 4]", "right float32[m, 4]"]
    assert [spec.name for spec in runner.outputs] == ["y0", "y1"]
    assert [node.name for node in lookups(path)] == ["shared", "shared_2"]
    assert len({node.input[1] for node in lookups(path)}) == 1  # one table, used twice
    info = lmkan_deploy.inspect(path)
    assert [layer.table_of for layer in info.layers] == [None, "shared"]
    report.print_model(info)
    total = next(line for line in capsys.readouterr().out.splitlines() if "total" in line)
    assert "432" in total  # entries of one table
    rng = np.random.default_rng(0)
    feeds = {
        name: rng.standard_normal((size, 4)).astype(np.float32) for name, size in (("left", 3), ("right", 5))
    }
    assert runner.run(feeds)["y1"].shape == (18,)


def test_half_precision_networks(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        module = make_stack(6, 4).to(dtype)
        path = export_module(module, tmp_path / "model.onnx")
        runner = load_runner(path)
        assert runner.inputs[0].dtype == str(dtype).removeprefix("torch.")
        x = torch.randn(7, 6).to(dtype)
        feeds = api.random_cases(runner.inputs, sizes=[7])["random 7"]
        assert runner.run(feeds)["y"].shape == (7, 4)
        assert module(x).dtype == dtype


def varied(self, *xs, scale):
    return self.lmkan(xs[0]) * scale - self.lmkan(xs[1])


def with_defaults(self, x, mask=None, scale=None):
    y = self.lmkan(x)
    y = y if mask is None else y * mask
    return y if scale is None else y + scale


@pytest.mark.parametrize(
    ("forward", "shapes"),
    [
        (varied, ("left:n,4", "right:n,4", "scale:1")),
        (with_defaults, ("n,4",)),
        (with_defaults, ("x:n,4", "scale:n,4")),
        (lambda self, a, b: self.lmkan(a).sum(0) + self.lmkan(b), ("a:n,4", "b:m,4")),
    ],
    ids=["varied", "defaults", "keyword", "two axes"],
)
def test_inputs_reach_their_parameters(forward, shapes: tuple[str, ...], tmp_path: Path) -> None:
    module = Block(forward).eval()
    assert_agrees(module, tmp_path / "model.onnx", *shapes)
    if shapes == ("x:n,4", "scale:n,4"):
        runner = load_runner(tmp_path / "model.onnx")
        x, scale = torch.randn(3, 4), torch.randn(3, 4)
        y = runner.run({"x": x.numpy(), "scale": scale.numpy()})["y"]
        want = module(x, scale=scale).detach()
        torch.testing.assert_close(torch.from_numpy(y), want, rtol=1e-4, atol=1e-5)


def test_programs_with_nested_inputs_and_keywords(tmp_path: Path) -> None:
    module = Block(lambda self, batch, *, scale: {"out": self.lmkan(batch["a"]) * scale}).eval()
    n = torch.export.Dim("n")
    program = torch.export.export(
        module,
        ({"a": torch.randn(3, 4)},),
        {"scale": torch.randn(4)},
        dynamic_shapes={"batch": {"a": {0: n}}, "scale": None},
    )
    torch.export.save(program, tmp_path / "model.pt2")
    result = lmkan_deploy.export(tmp_path / "model.pt2", tmp_path / "model.onnx")
    assert result.verification.passed
    assert result.info.inputs == ["batch_a float32[batch, 4]", "scale float32[4]"]
    assert result.info.outputs[0].startswith("out ")


Pair = collections.namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    ("returned", "names"),
    [
        (lambda x, y: {"logits": y, "relu": torch.relu(y) + 1, "loss": None}, ["logits", "relu"]),
        (lambda x, y: {"x": y, "hidden": y + 1}, ["y0", "y1"]),  # x is an input
        (lambda x, y: {"a": y, "b": [y + 1, {"c": y + 2}]}, ["a", "b_0", "b_1_c"]),
        (lambda x, y: {"a": {"b": y}, "a_b": y + 1}, ["y0", "y1"]),
        (lambda x, y: (y, None, y + 1), ["y0", "y1"]),
        (lambda x, y: Pair(y, {"a": y + 1}), ["first", "second_a"]),
        (lambda x, y: {"logits": y}, ["logits"]),
    ],
)
def test_outputs_and_their_names(returned, names: list[str], tmp_path: Path) -> None:
    module = Block(lambda self, x: returned(x, self.lmkan(x) + self.y), y=torch.ones(4)).eval()
    assert assert_agrees(module, tmp_path / "model.onnx") == names


@pytest.mark.parametrize(
    ("forward", "names"),
    [
        (lambda self, x: {"y": self.lmkan(x), "scale": self.c}, ["y", "scale"]),
        (
            lambda self, x: {"scale": self.c, "y": self.lmkan(x) * self.c, "again": self.c},
            ["scale", "y", "again"],
        ),
        (lambda self, x: {"c": self.lmkan(x), "y": self.c}, ["c", "y"]),
        (lambda self, x: {"y": self.lmkan(x), "computed": self.c * 2}, ["y", "computed"]),
        (lambda self, x: {"y": self.lmkan(x), "table": self.lmkan.table}, ["y", "table"]),
        (lambda self, x: (self.lmkan(x), self.c), ["y0", "y1"]),
    ],
)
def test_constant_outputs_and_their_names(forward, names: list[str], tmp_path: Path) -> None:
    assert assert_agrees(Block(forward, c=torch.arange(4.0)).eval(), tmp_path / "model.onnx") == names
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)


def test_caches_made_at_the_first_call_are_no_state(tmp_path: Path) -> None:
    def cached(self, x):
        if not hasattr(self, "positions"):
            self.register_buffer("positions", torch.linspace(0, 1, 4))
        return self.lmkan(x) + self.positions

    assert_agrees(Block(cached).eval(), tmp_path / "model.onnx", "n,4")


class Attention(torch.nn.Module):
    """A transformer block with lookup layers in place of its dense ones."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(5, width)
        self.norm = torch.nn.LayerNorm(width)
        self.qkv = LMKAN2DLayer(5, width, 3 * width)
        self.drop = torch.nn.Dropout(0.1)
        self.out = PreconditionedLMKAN2D(5, width, width, "relu_last")

    def forward(self, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) * weight[..., None]
        batch, length, width = x.shape
        parts = self.qkv(self.norm(x)).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(*parts.unbind(0))
        return x + self.drop(self.out(y.transpose(1, 2).reshape(batch, length, width)))


def test_attention_around_lookups(tmp_path: Path) -> None:
    assert_agrees(Attention().eval(), tmp_path / "model.onnx", "tokens:n,length:int64", "weight:n,length")


class InPlace(torch.nn.Module):
    """Changes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = LMKAN2DLayer(6, 8, 4)
        self.register_buffer("mean", torch.full((8,), 0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x -= self.mean
        return self.layer(torch.relu_(x))


def test_networks_that_change_their_inputs(tmp_path: Path) -> None:
    network = InPlace().eval()
    torch.nn.init.normal_(network.layer.func_parameter)
    path = export_module(network, tmp_path / "m.onnx", "batch,8")
    x = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    kept = x.copy()
    runner = TorchRunner(network, input_specs(network, [parse_input_shape("batch,8")]), ["y"])
    want = runner.run({"x": x})["y"]
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(runner.run({"x": x})["y"], want)
    np.testing.assert_allclose(load_runner(path).run({"x": x})["y"], want, rtol=1e-4, atol=1e-5)


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = LMKAN2DLayer(6, 8, 4)
        torch.nn.init.normal_(self.layer.func_parameter)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.layer(x)
        return {"logits": y, "label": y.argmax(-1), "mask": y > 0}


def test_narrow_tables_of_networks_that_return_labels(tmp_path: Path) -> None:
    path = export_module(Classifier().eval(), tmp_path / "m.onnx", "batch,8")
    result = lmkan_deploy.optimize(path, tmp_path / "narrow.onnx", table_dtype="int8")
    assert result.verification.passed
    assert result.tables.together < 0.1  # of the logits


def test_labels_are_no_costs_of_narrow_tables(tmp_path: Path) -> None:
    network = Classifier().eval()
    table = network.layer.func_parameter
    with torch.no_grad():  # near ties, which the rounding of float16 decides
        table.copy_(table[:, :, :1] + 1e-3 * torch.randn_like(table))
    path = export_module(network, tmp_path / "m.onnx", "batch,8")
    result = lmkan_deploy.optimize(path, tmp_path / "narrow.onnx", table_dtype="float16")
    numbers, labels = (
        max(c.max_rel for c in result.verification.comparisons if c.is_discrete == discrete)
        for discrete in (False, True)
    )
    assert labels > 2 * numbers
    assert result.tables.together == pytest.approx(numbers, rel=0.01)
