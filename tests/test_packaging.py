"""Folders to deploy from: what they have in common."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import lmkan_deploy
from lmkan_deploy.commands.package import package
from lmkan_deploy.errors import LmkanError, ModelError
from lmkan_deploy.packaging import PackageError, package_model
from networks import ExportedStack
from packaged import (
    config_of,
    sample,
)

FORMATS = ("triton", "triton-python", "kserve", "ray")


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_folder_appears_complete_or_not_at_all(
    format_name: str, stack: ExportedStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()  # an empty one may be there
    result = package_model(stack.onnx, output, format=format_name, name="net")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    found = sorted(str(file.relative_to(output)) for file in output.rglob("*") if file.is_file())
    assert result.files == found
    assert "README.md" in found
    readme = (output / "README.md").read_text()
    assert all(line in readme for line in result.start)
    assert not re.search(r"\$\{?[a-z_]+\b", readme), "a place was not filled in"
    assert output.stat().st_mode & 0o055 == 0o055, "a server of another user could not read it"
    [model] = output.rglob("model.onnx")
    assert model.read_bytes() == stack.onnx.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lmkan_deploy.packaging.source.shutil.copyfile", fail)
    with pytest.raises(ModelError, match="could not write .*other: No space left"):
        package_model(stack.onnx, tmp_path / "other", format=format_name)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_outputs_that_are_not_free_are_refused(stack: ExportedStack, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for output, fragment in (
        ("full", "expected a new or empty folder, found files in .*; choose another --output"),
        ("file", "expected a folder to write, found the file"),
        ("missing/deep", "found no folder"),
    ):
        with pytest.raises(ModelError, match=fragment) as caught:
            package_model(stack.onnx, tmp_path / output)
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine.txt"]


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "a b", "-x", ".x", "é", "x" * 129, "a\n"])
def test_names_that_are_no_folder_names_are_refused(name: str, stack: ExportedStack, tmp_path: Path) -> None:
    for format_name in FORMATS:
        with pytest.raises(PackageError, match="expected a model name of .* found .*; pass --name"):
            package_model(stack.onnx, tmp_path / "out", format=format_name, name=name)
    assert not any(tmp_path.iterdir())


def test_the_name_is_the_files_by_default(stack: ExportedStack, tmp_path: Path) -> None:
    shutil.copyfile(stack.onnx, tmp_path / "net.v2.onnx")
    assert package_model(tmp_path / "net.v2.onnx", tmp_path / "out").name == "net.v2"
    assert config_of(tmp_path / "out" / "net.v2").name == "net.v2"
    shutil.copyfile(stack.onnx, tmp_path / "my net.onnx")
    with pytest.raises(PackageError, match="found 'my net'; pass --name"):
        package_model(tmp_path / "my net.onnx", tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"format": "tar"}, "expected a format of triton, triton-python, kserve, ray, found 'tar'"),
        ({"max_batch": 0}, "expected --max-batch of 1 to 16777216, found 0"),
        ({"max_delay_us": -1}, "expected --max-delay-us of 0 to"),
        ({"threads": 0}, "expected --threads of 1 to 1024, found 0"),
        ({"repository_path": "models"}, "expected an absolute --repository-path of letters"),
        ({"repository_path": "/a; b"}, "expected an absolute --repository-path of letters"),
        ({"format": "kserve", "image": "a b"}, "expected the name of an image"),
        ({"format": "kserve", "name": "x" * 41}, "expected a name of at most 40 characters for kserve"),
        ({"plugin": "plugin.so"}, "expected an engine with --plugin, found the ONNX file"),
        ({"image": "a"}, "expected --image with the format kserve, found it with triton; leave it out"),
        ({"wheel": "a.whl"}, "expected --wheel with the format kserve or ray, found it with triton;"),
        (
            {"format": "ray", "plugin": "plugin.so"},
            "expected --plugin with the format triton, found it with ray",
        ),
        ({"format": "kserve", "repository_path": "/m"}, "expected --repository-path with the format triton"),
        ({"format": "triton-python", "repository_path": "/m"}, "found it with triton-python; leave it out"),
        ({"format": "ray", "image": "a"}, "expected --image with the format kserve, found it with ray"),
        ({"format": "ray", "wheel": "numpy-1.0-py3-none-any.whl"}, "expected a wheel lmkan_deploy-"),
    ],
)
def test_settings_out_of_range_are_refused(
    options: dict[str, Any], fragment: str, stack: ExportedStack, tmp_path: Path
) -> None:
    with pytest.raises(PackageError) as caught:
        package_model(stack.onnx, tmp_path / "out", **options)
    assert fragment in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_models_that_can_not_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"x")
    (tmp_path / "bad.onnx").write_bytes(b"x")
    for name, kind, fragment in (
        ("model.pt", PackageError, "expected an .onnx or .engine file"),
        ("bad.onnx", ModelError, "expected an ONNX"),
        ("none.onnx", ModelError, "found no file"),
    ):
        with pytest.raises(kind, match=fragment):
            package_model(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize("format_name", FORMATS)
def test_external_data_comes_along_under_the_new_name(
    format_name: str, stack: ExportedStack, tmp_path: Path
) -> None:
    lmkan_deploy.optimize(stack.onnx, tmp_path / "big.onnx", external_data=True)
    assert (tmp_path / "big.onnx.data").is_file()
    package_model(tmp_path / "big.onnx", tmp_path / "out", format=format_name)
    [model] = (tmp_path / "out").rglob("model.onnx")
    assert Path(f"{model}.data").stat().st_size > 10_000
    for file in tmp_path.glob("big.onnx*"):
        file.unlink()
    runner, expected = lmkan_deploy.load_runner(model), lmkan_deploy.load_runner(stack.onnx)
    x = sample(runner, 5)
    np.testing.assert_allclose(runner.run(x)["y"], expected.run(x)["y"], rtol=1e-5, atol=1e-5)


def test_the_command(stack: ExportedStack, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(package)
    run = CliRunner().invoke
    result = run(app, [str(stack.onnx), "-o", str(tmp_path / "a"), "--name", "net", "--max-batch", "7"])
    assert result.exit_code == 0, result.output
    assert "net for triton, 4 files" in result.output
    assert config_of(tmp_path / "a" / "net").max_batch_size == 7
    result = run(app, [str(stack.onnx), "-o", str(tmp_path / "b"), "-f", "ray", "--json"])
    assert json.loads(result.output)["files"][0] == "README.md"
    result = run(app, [str(stack.onnx), "-o", str(tmp_path / "c"), "-f", "kserve", "-q"])
    assert result.output == ""
    result = run(app, [str(stack.onnx), "-o", str(tmp_path / "c")])
    assert isinstance(result.exception, LmkanError)
    assert "\n" not in str(result.exception)
