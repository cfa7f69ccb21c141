"""Export of a user's network: what is in the file, and which arguments are taken."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import lmkan_deploy
from exported import RUNTIMES, lookups
from lmkan_deploy import Architecture
from lmkan_deploy.errors import CheckpointError, ExportError, InputError
from lmkan_deploy.runtime.runner import load_runner
from networks import DATA, USER_MODELS, ExportedStack, UserModel, needs_opset

# --- The file ----------------------------------------------------------------------------------------


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


def test_options_are_noted(stack: ExportedStack, tmp_path: Path) -> None:
    result = lmkan_deploy.export(
        stack.checkpoint, tmp_path / "m.onnx", opset=21, without_passes=["all"], table_dtype="float16"
    )
    assert result.info.path == str(tmp_path / "m.onnx")
    options = json.loads(result.info.metadata["lmkan_deploy.options"])
    assert options == {"input_shapes": [], "opset": 21, "no_passes": ["all"], "table_dtype": "float16"}


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


# --- Arguments ---------------------------------------------------------------------------------------


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
