"""Export: structure, names, dynamic batch, external data, all-or-nothing writing."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import types
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
import torch

import lmkan_deploy
from lmkan_deploy import Architecture, api, report
from lmkan_deploy.checkpoints.input_shapes import input_specs, parse_input_shape
from lmkan_deploy.converters.model_file import staged_model
from lmkan_deploy.converters.torch_to_onnx import to_onnx
from lmkan_deploy.errors import CheckpointError, ExportError, InputError, ModelError, VerificationError
from lmkan_deploy.nn import LMKAN2DLayer, LMKANConv2d, PreconditionedLMKAN2D
from lmkan_deploy.runtime.axis_limits import noted_limits
from lmkan_deploy.runtime.pytorch import TorchRunner
from lmkan_deploy.runtime.runner import load_runner
from lmkan_deploy.verification import random_cases, verify_runners
from networks import DATA, USER_MODELS, ExportedStack, UserModel, make_stack, needs_opset

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


# --- The main job ------------------------------------------------------------------------------------


def test_both_linear_forms_of_a_users_class_fold(tmp_path: Path) -> None:
    patchnet = next(model for model in USER_MODELS if model.name == "patchnet")
    info = lmkan_deploy.export(
        patchnet.state_dict,
        tmp_path / "model.onnx",
        architecture=patchnet.architecture,
        input_shapes=patchnet.input_shapes,
    ).info
    assert set(info.other_nodes) == {"Reshape", "Transpose"}
    forms = [line.partition(": ")[2] for line in info.passes_applied["fold-linear-branch"]]
    assert sorted(forms) == ["Linear(ReLU(x))", "Linear(ReLU(x))", "Linear(x)"]
    assert sum("BatchNormalization" in line for line in info.passes_applied["fold-scale-shift"]) == 2


@pytest.mark.parametrize("form", ["state dict", "pickled", "exported program"])
def test_user_models_export_and_match(form: str, user_model: UserModel, tmp_path: Path) -> None:
    checkpoint, shapes, trust = user_model.state_dict, user_model.input_shapes, False
    if form == "pickled":
        checkpoint, trust = user_model.pickled, True
    if form == "exported program":
        module = lmkan_deploy.load_checkpoint(checkpoint, user_model.architecture).module
        x = torch.from_numpy(user_model.x)
        checkpoint, shapes = tmp_path / "model.pt2", ()
        program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
        torch.export.save(program, checkpoint)
    architecture = user_model.architecture
    if form != "state dict":  # which has its own network, of classes in this folder
        with pytest.raises(CheckpointError, match=f"expected no --arch .*{form}.*leave it out"):
            lmkan_deploy.export(checkpoint, architecture=architecture, trust_pickle=trust)
        architecture = dataclasses.replace(architecture, factory=None)
    result = lmkan_deploy.export(
        checkpoint,
        tmp_path / "model.onnx",
        architecture=architecture,
        input_shapes=shapes,
        trust_pickle=trust,
    )
    assert result.verification.passed
    assert result.info.inputs[0].startswith("x float32[batch, ")
    assert result.info.outputs[0].startswith("y float32[batch, ")
    assert len(lookups(result.path)) == user_model.num_lookups
    scale = np.abs(user_model.y).max()
    for runtime in RUNTIMES:
        y = load_runner(result.path, runtime).run({"x": user_model.x})["y"]
        assert np.abs(y - user_model.y).max() <= 1e-5 * scale


def test_a_stack_is_nothing_but_its_layers(stack: ExportedStack) -> None:
    model = onnx.load(stack.onnx)
    assert [node.op_type for node in model.graph.node] == ["LMKAN2D", "LMKAN2D"]
    assert [node.name for node in lookups(stack.onnx)] == ["0", "2"]
    table = next(t for t in model.graph.initializer if t.name == "2.table")
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(table), stack.module[2].table.detach().numpy())
    assert {o.domain: o.version for o in model.opset_import} == {"": 20, "lmkan": 1}
    assert [(f.domain, f.name) for f in model.functions] == [("lmkan", "LMKAN2D")]
    attributes = {a.name: a.s.decode() for a in lookups(stack.onnx)[0].attribute}
    assert attributes == {"plugin_namespace": "lmkan", "plugin_version": "1"}


def test_batch_last_networks_lose_their_transposes(tmp_path: Path) -> None:
    result = lmkan_deploy.export(
        DATA / "methane.state_dict.pt",
        tmp_path / "model.onnx",
        architecture=Architecture("user_models:MethaneNet", DATA),
    )
    assert "Transpose" not in result.info.other_nodes


def test_provenance_without_paths(stack: ExportedStack) -> None:
    info = lmkan_deploy.inspect(stack.onnx)
    metadata = {key.removeprefix("lmkan_deploy."): value for key, value in info.metadata.items()}
    assert metadata["version"] == lmkan_deploy.__version__
    assert metadata["torch_version"] == torch.__version__
    assert metadata["checkpoint"] == "model.pt"
    assert len(metadata["checkpoint_sha256"]) == 64
    text = stack.onnx.read_bytes()
    for private in (b"stack_trace", b".py", str(stack.onnx.parent).encode(), str(Path.home()).encode()):
        assert private not in text


@pytest.mark.parametrize(("opset", "ir_version"), [(18, 8), (20, 9), (21, 10), (23, 10)])
def test_other_opsets(opset: int, ir_version: int, stack: ExportedStack, tmp_path: Path) -> None:
    needs_opset(opset)
    result = lmkan_deploy.export(stack.checkpoint, tmp_path / "model.onnx", opset=opset)
    assert result.info.ir_version == ir_version  # ONNX Runtime 1.17 reads 9
    onnx.checker.check_model(result.path, full_check=True)
    assert result.info.opsets == {"ai.onnx": opset, "lmkan": 1}
    names = [node.name for function in onnx.load(result.path).functions for node in function.node]
    assert len(set(names) - {""}) == len(names)  # or ONNX Runtime 1.21 refuses to inline it
    lookups(result.path)


def test_old_opsets_are_refused(stack: ExportedStack, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="opset 18 or later"):
        lmkan_deploy.export(stack.checkpoint, tmp_path / "model.onnx", opset=17)
    assert list(tmp_path.iterdir()) == []


# --- Networks around the layers ----------------------------------------------------------------------


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


def test_a_batch_that_is_not_free_is_an_error(tmp_path: Path) -> None:
    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lmkan = LMKAN2DLayer(4, 4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lmkan(x) + torch.ones(4, 2)

    with pytest.raises(ExportError, match="batch"):
        export_module(Fixed(), tmp_path / "model.onnx", "batch,4")


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


def test_caches_made_at_the_first_call_are_no_state(tmp_path: Path) -> None:
    def cached(self, x):
        if not hasattr(self, "positions"):
            self.register_buffer("positions", torch.linspace(0, 1, 4))
        return self.lmkan(x) + self.positions

    assert_agrees(Block(cached).eval(), tmp_path / "model.onnx", "n,4")


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
        (branching, "n,4", r"depends on values .* at test_export.py:\d+, `.*x.sum\(\) > 0.*use torch.where"),
        (lambda self, x: torch.stack([self.lmkan(r) for r in x]), "n,4", "axis n can't be free.*as a number"),
        (lambda self, x: self.lmkan(x) + self.y[:, : x.shape[0]].T, "n,4", "needs .*n <= 32; give it"),
        (forward, "n,4", r"no operator for aten.*svd at test_export"),
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


def test_networks_without_onnx_operators_are_an_error(tmp_path: Path) -> None:
    class Unknown(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.lstsq(x, x).solution

    with pytest.raises(ExportError, match="PyTorch could not"):
        export_module(Unknown(), tmp_path / "model.onnx", "4,4")


# --- Writing -----------------------------------------------------------------------------------------


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


def test_a_failed_verification_leaves_what_was_there(stack: ExportedStack, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(VerificationError, match="relative error .* nothing was written"):
        lmkan_deploy.export(stack.checkpoint, path, rtol=1e-12)
    assert list(tmp_path.iterdir()) == []
    path.write_text("the old file")
    with pytest.raises(VerificationError):
        lmkan_deploy.export(stack.checkpoint, path, rtol=1e-12)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["the old file"]


def test_a_missing_folder(stack: ExportedStack, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a writable folder"):
        lmkan_deploy.export(stack.checkpoint, tmp_path / "nowhere" / "model.onnx")


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


@pytest.mark.parametrize(("least", "most"), [(None, 16), (5, None), (3, 6)])
def test_axes_of_an_archive_keep_their_limits(least: int | None, most: int | None, tmp_path: Path) -> None:
    network = make_stack(6, 4).eval()
    bounded = torch.export.Dim("batch", **{k: v for k, v in {"min": least, "max": most}.items() if v})
    program = torch.export.export(network, (torch.randn(5, 6),), dynamic_shapes=({0: bounded},))
    torch.export.save(program, tmp_path / "m.pt2")
    result = lmkan_deploy.export(tmp_path / "m.pt2")
    sizes = {int(c.case.split()[-1]) for c in result.verification.comparisons}
    assert sizes == {max(min(size, most or size), least or 1) for size in (1, 2, 7, 64)}
    # The file says so to later checks, rewrites among them.
    again = lmkan_deploy.optimize(result.path, tmp_path / "again.onnx", table_dtype="float16")
    for path in (result.path, again.path):
        checked = lmkan_deploy.verify(path, checkpoint=tmp_path / "m.pt2", rtol=0.1)
        assert {int(c.case.split()[-1]) for c in checked.comparisons} == sizes
        assert checked.passed
    asked = lmkan_deploy.verify(result.path, batch_sizes=[100])
    assert [c.case for c in asked.comparisons] == ["random 100"]


class Patches(torch.nn.Module):
    """Cuts images into patches of a size, which images must be multiples of."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.patch = LMKAN2DLayer(6, 2 * size * size, 8)
        self.head = LMKAN2DLayer(6, 8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        s = self.size
        y = x.reshape(b, c, h // s, s, w // s, s).permute(0, 2, 4, 1, 3, 5)
        return self.head(self.patch(y.reshape(b, (h // s) * (w // s), c * s * s)).mean(1))


class Strides(torch.nn.Module):
    """Needs images of a least size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = LMKANConv2d(6, 2, 8, kernel_size=3, padding=1)
        self.second = LMKANConv2d(6, 8, 8, kernel_size=2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)).mean((2, 3))


@pytest.mark.parametrize(
    ("network", "least", "step"),
    [(Patches(2), 2, 2), (Patches(3), 3, 3), (Patches(7), 7, 7), (Strides(), 4, 1)],
)
def test_images_of_every_size_that_the_network_takes(
    network: torch.nn.Module, least: int, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = network.eval()
    monkeypatch.setattr("test_export.image_network", lambda: network, raising=False)
    torch.save(network.state_dict(), tmp_path / "m.pt")
    result = lmkan_deploy.export(
        tmp_path / "m.pt", architecture="test_export:image_network", input_shapes="batch,2,height,width"
    )
    sizes = f"{'sizes' if step == 1 else f'multiples of {step}'} from {least} on"
    assert result.notes[-2:] == [f"the axis height takes {sizes}", f"the axis width takes {sizes}"]
    assert result.info.inputs == ["x float32[batch, 2, height, width]"]
    runners = [load_runner(result.path, runtime) for runtime in RUNTIMES]
    for batch, height, width in ((1, least, least), (3, least, 5 * step + least), (2, 64 * step, 20 * step)):
        x = torch.randn(batch, 2, height, width)
        want = network(x).detach().numpy()
        for runner in runners:
            np.testing.assert_allclose(runner.run({"x": x.numpy()})["y"], want, rtol=1e-4, atol=1e-5)
    # Later checks keep to them.
    assert lmkan_deploy.verify(result.path, batch_sizes=[5, 6]).passed
    assert len(lmkan_deploy.bench(result.path, batch_sizes=[5], seconds=0.01)) == 1
    if step > 1:
        x = np.zeros((1, 2, step, step + 1), np.float32)
        with pytest.raises(
            InputError, match=rf"with width in multiples of {step}, found shape \[1, 2, {step},"
        ):
            runners[0].run({"x": x})


def test_sizes_that_no_step_allows_are_refused(tmp_path: Path) -> None:
    class Square(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = LMKAN2DLayer(6, 2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer((x + x.transpose(2, 3)).mean((2, 3)))

    with pytest.raises(ExportError, match=r"The size of tensor a \(12\) must match .* check --input-shape"):
        export_module(Square().eval(), tmp_path / "m.onnx", "b,2,h,w")
    export_module(Square().eval(), tmp_path / "m.onnx", "b,2,h,h")


def test_multiples_of_an_archive(tmp_path: Path) -> None:
    network = Patches(2).eval()

    def save(height: object, width: object) -> Path:
        dynamic = ({0: torch.export.Dim("batch"), 2: height, 3: width},)
        program = torch.export.export(network, (torch.randn(3, 2, 8, 12),), dynamic_shapes=dynamic)
        torch.export.save(program, tmp_path / "m.pt2")
        return tmp_path / "m.pt2"

    result = lmkan_deploy.export(save(*[torch.export.Dim.DYNAMIC] * 2), trust_pickle=True)  # for its guards
    assert result.verification.passed
    assert len([note for note in result.notes if "takes multiples of 2 from 4 on" in note]) == 2
    x = torch.randn(1, 2, 6, 2)
    y = load_runner(result.path).run({"x": x.numpy()})["y"]
    np.testing.assert_allclose(y, network(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    save(2 * torch.export.Dim("rows"), 2 * torch.export.Dim("columns"))
    with pytest.raises(ExportError, match=r"found 2\*s.* computed of others, .* trace .* with Dim\.DYNAMIC"):
        lmkan_deploy.export(tmp_path / "m.pt2", trust_pickle=True)


def test_natural_arguments(stack: ExportedStack, tmp_path: Path) -> None:
    x = {"x": np.random.default_rng(0).standard_normal((20, 10)).astype(np.float32)}
    result = lmkan_deploy.export(
        stack.checkpoint, tmp_path / "m.onnx", inputs=x, calibration=x, table_dtype="int8",
        input_shapes="batch,10", without_passes="simplify-layout", rtol=1,
    )  # fmt: skip
    assert "given inputs" in {c.case for c in result.verification.comparisons}
    assert "simplify-layout" in result.info.passes_not_run
    lmkan_deploy.optimize(stack.onnx, tmp_path / "o.onnx", calibration=x, table_dtype="int8")
    with pytest.raises(InputError, match="expected a dict with an array for each of x, found ndarray"):
        lmkan_deploy.run(stack.onnx, x["x"])
    for other, name in ((x["x"].tolist(), "list"), (torch.from_numpy(x["x"]), "Tensor")):
        with pytest.raises(InputError, match=rf"a NumPy array for input x .*, found {name}; convert it with"):
            lmkan_deploy.run(stack.onnx, {"x": other})


def test_a_factory_by_its_name_alone(
    user_model: UserModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(DATA))
    result = lmkan_deploy.export(
        user_model.state_dict,
        tmp_path / "m.onnx",
        architecture=user_model.architecture.factory,
        input_shapes=user_model.input_shapes,
    )
    assert result.verification.passed
    with pytest.raises(CheckpointError, match=r"could not import .*; pass --arch m:Net --arch-path nets"):
        lmkan_deploy.export(user_model.state_dict, tmp_path / "n.onnx", architecture="nets/m.py:Net")


@pytest.mark.parametrize("text", ["batch,10:fp32", "x:batch,10:half"])
def test_unknown_types_of_inputs(text: str, stack: ExportedStack, tmp_path: Path) -> None:
    found = text.split(":")[-1]
    with pytest.raises(CheckpointError, match=f"expected an element type of float32, .*, found '{found}' in"):
        lmkan_deploy.export(stack.checkpoint, tmp_path / "m.onnx", input_shapes=[text])


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


class Logarithms(torch.nn.Module):
    """Random inputs are mostly out of its domain."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = LMKAN2DLayer(6, 8, 4)
        torch.nn.init.normal_(self.layer.func_parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.log(x))


class Pooled(torch.nn.Module):
    """Takes images of every size without an error, but the mean of nothing is no number."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = LMKANConv2d(5, 3, 8, 4)
        self.head = LMKAN2DLayer(5, 8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.patches(x).mean((2, 3)))


def test_sizes_without_an_answer_are_not_allowed(tmp_path: Path) -> None:
    module = Pooled().eval()
    path = export_module(module, tmp_path / "m.onnx", "batch,3,height,width")
    limits = noted_limits(lmkan_deploy.inspect(path).metadata)
    assert [limits[axis].least for axis in ("height", "width")] == [4, 4]
    assert lmkan_deploy.verify(path).passed
    x = np.random.default_rng(0).standard_normal((2, 3, 9, 6)).astype(np.float32)
    want = module(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(load_runner(path).run({"x": x})["y"], want, rtol=1e-4, atol=1e-5)


def test_options_are_noted(stack: ExportedStack, tmp_path: Path) -> None:
    result = lmkan_deploy.export(
        stack.checkpoint, tmp_path / "m.onnx", opset=21, without_passes=["all"], table_dtype="float16"
    )
    assert result.info.path == str(tmp_path / "m.onnx")
    options = json.loads(result.info.metadata["lmkan_deploy.options"])
    assert options == {"input_shapes": [], "opset": 21, "no_passes": ["all"], "table_dtype": "float16"}


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
