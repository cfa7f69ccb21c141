"""Pickles and exported programs that would run code: refused where they are not trusted."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

import lmkan_deploy
from lmkan_deploy.errors import CheckpointError
from lmkan_deploy.nn import LMKAN2DLayer


def test_a_pickle_needs_trust(tmp_path: Path) -> None:
    marker = tmp_path / "code-ran"
    for name, save in (("zip.pt", torch.save), ("raw.pt", lambda o, p: Path(p).write_bytes(pickle.dumps(o)))):
        save(Malicious(str(marker)), tmp_path / name)
        with pytest.raises(CheckpointError, match=r"pickled Python objects.*--trust-pickle"):
            lmkan_deploy.load_checkpoint(tmp_path / name)
    assert not marker.exists()


class Malicious:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path(self.path),))


@pytest.fixture
def program_file(tmp_path: Path) -> Path:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lmkan = LMKAN2DLayer(4, 4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lmkan(torch.cat([x, x]))

    program = torch.export.export(
        Net().eval(), (torch.randn(8, 4),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    torch.export.save(program, tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


def rewrite(path: Path, change) -> None:
    """Applies a function to every file of an archive."""
    with zipfile.ZipFile(path) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, change(name, content))


def test_programs_with_symbolic_expressions_load(program_file: Path) -> None:
    assert lmkan_deploy.load_checkpoint(program_file).kind == "exported program"


def edit_program(path: Path, change) -> None:
    """Applies a function to the program's JSON document."""

    def rewritten(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        document = json.loads(content)
        change(document)
        return json.dumps(document).encode()

    rewrite(path, rewritten)


def set_expression(text: str):
    def change(document: dict) -> None:
        changed = 0
        for value in document["graph_module"]["graph"]["tensor_values"].values():
            for size in value["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = text
                    changed += 1
        assert changed

    return change


def set_signature(key: str, value: object):
    def change(document: dict) -> None:
        document["graph_module"]["module_call_graph"][0]["signature"][key] = value

    return change


def set_target(target: str):
    def change(document: dict) -> None:
        document["graph_module"]["graph"]["nodes"][0]["target"] = target

    return change


def rename_values(code: str):
    def change(document: dict) -> None:
        values = document["graph_module"]["graph"]["tensor_values"]
        name = next(iter(values))
        values[f"{name}={code}"] = values.pop(name)

    return change


ENUM = [1, {"type": "builtins.list", "context": '{"__enum__": true, "fqn": "antigravity:X", "name": "a"}',
            "children_spec": [{"type": None, "context": None, "children_spec": []}]}]  # fmt: skip
ATTACKS = {
    "expression": lambda code: set_expression(code),
    "string in a call": lambda code: set_expression(f'floor("{code}")'),
    "string as a symbol": lambda code: set_expression(f'Symbol("{code}")'),
    "attribute": lambda code: set_expression("Symbol('s77').func"),
    "function of torch": lambda code: set_target("torch.os.system"),
    "operator that opens files": lambda code: set_target("torch.ops.aten.from_file.default"),
    "operator of another library": lambda code: set_target("torch.ops.inductor.accumulate_grad_.default"),
    "argument names": lambda code: set_signature("forward_arg_names", [f"x={code}"]),
    "annotated argument names": lambda code: set_signature("forward_arg_names", [f"x: {code}"]),
    "names of values": lambda code: rename_values(code),
    "enumeration": lambda code: set_signature("out_spec", json.dumps(ENUM)),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_programs_that_would_run_code_are_refused(attack: str, program_file: Path, tmp_path: Path) -> None:
    marker = tmp_path / "code-ran"
    edit_program(program_file, ATTACKS[attack](f"__import__('pathlib').Path('{marker}').touch()"))
    with pytest.raises(CheckpointError, match="registered operators"):
        lmkan_deploy.load_checkpoint(program_file)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "model/data/aotinductor/model/x.wrapper.so",
        "model/data/constants/opaque_obj_0",
        "model/data/constants/custom_obj_0",
        "model/MODELS/model.json",
        "model/models/Model.json",
    ],
)
def test_archives_with_other_files_are_refused(name: str, program_file: Path) -> None:
    with zipfile.ZipFile(program_file, "a") as archive:
        archive.writestr(name, pickle.dumps(None))
    with pytest.raises(CheckpointError, match="holds"):
        lmkan_deploy.load_checkpoint(program_file)


def test_archives_with_pickled_tensors_are_refused(program_file: Path) -> None:
    def change(name: str, content: bytes) -> bytes:
        return (
            content.replace(b'"use_pickle": false', b'"use_pickle": true')
            if "weights_config" in name
            else content
        )

    rewrite(program_file, change)
    with pytest.raises(CheckpointError, match="holds pickled tensors"):
        lmkan_deploy.load_checkpoint(program_file)


def test_programs_with_pickled_inputs_are_refused(program_file: Path, tmp_path: Path) -> None:
    marker = tmp_path / "code-ran"
    buffer = io.BytesIO()
    torch.save(Malicious(str(marker)), buffer)
    rewrite(program_file, lambda name, content: buffer.getvalue() if "sample_inputs" in name else content)
    with pytest.raises(CheckpointError):
        lmkan_deploy.load_checkpoint(program_file)
    assert not marker.exists()


def test_damaged_programs(program_file: Path) -> None:
    rewrite(program_file, lambda name, content: content[:50] if name.endswith("model.json") else content)
    with pytest.raises(CheckpointError, match="torch.export archive"):
        lmkan_deploy.load_checkpoint(program_file)
