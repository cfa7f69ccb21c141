"""Export: structure, names, dynamic batch, external data, all-or-nothing writing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import lmkan_deploy
from lmkan_deploy import Architecture, api
from lmkan_deploy.checkpoints.input_shapes import parse_input_shape
from lmkan_deploy.converters.model_file import staged_model
from lmkan_deploy.converters.torch_to_onnx import to_onnx
from lmkan_deploy.errors import ExportError, ModelError, VerificationError
from lmkan_deploy.nn import LMKAN2DLayer, LMKANConv2d, PreconditionedLMKAN2D
from lmkan_deploy.runtime.runner import load_runner
from networks import DATA, ExportedStack, UserModel, make_stack

RUNTIMES = ("onnxruntime", "onnxruntime-function", "onnx-reference")


def export_module(module: torch.nn.Module, path: Path, *shapes: str, **options) -> Path:
    """Exports a module that never was in a file."""
    from lmkan_deploy.checkpoints.input_shapes import input_specs

    specs = input_specs(module.eval(), [parse_input_shape(shape) for shape in shapes])
    with staged_model(to_onnx(module, specs, **options), path):
        pass
    return path


def lookups(path: Path) -> list[onnx.NodeProto]:
    model = onnx.load(path)
    onnx.checker.check_model(model)
    return [node for node in model.graph.node if node.op_type == "LMKAN2D"]


# --- The main job ------------------------------------------------------------------------------------


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
    result = lmkan_deploy.export(
        checkpoint,
        tmp_path / "model.onnx",
        architecture=user_model.architecture,
        input_shapes=shapes,
        trust_pickle=trust,
    )
    assert result.verification.passed
    assert result.info.inputs[0].startswith("x float32[batch, ")
    assert result.info.outputs[0].startswith("y float32[batch, ")
    assert len(lookups(result.path)) == user_model.num_lookups
    scale = np.abs(user_model.y).max()
    y = load_runner(result.path).run({"x": user_model.x})["y"]
    assert np.abs(y - user_model.y).max() <= 1e-5 * scale
    for runtime in RUNTIMES[1:]:
        y = load_runner(result.path, runtime).run({"x": user_model.x})["y"]
        assert np.abs(y - user_model.y).max() <= 2e-5 * scale


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


@pytest.mark.parametrize("opset", [18, 21, 23])
def test_other_opsets(opset: int, stack: ExportedStack, tmp_path: Path) -> None:
    result = lmkan_deploy.export(stack.checkpoint, tmp_path / "model.onnx", opset=opset)
    assert result.info.opsets == {"ai.onnx": opset, "lmkan": 1}
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


def test_several_inputs_and_outputs_keep_their_names(tmp_path: Path) -> None:
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
    for use in (lmkan_deploy.inspect, lambda p: lmkan_deploy.optimize(p, tmp_path / "o.onnx", check=False)):
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
