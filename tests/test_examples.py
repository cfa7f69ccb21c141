"""The examples, run for real."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import lmkan_deploy
from lmkan_deploy import Architecture

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "without_package"


@pytest.fixture(scope="module")
def methane(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's network, untrained."""
    folder = tmp_path_factory.mktemp("examples")
    architecture = Architecture("model:MethaneNet", ROOT / "examples" / "methane")
    torch.manual_seed(0)
    torch.save(architecture.build().state_dict(), folder / "model.pt")
    return lmkan_deploy.export(
        folder / "model.pt", architecture=architecture, input_shapes=["batch,5,3"]
    ).path


@pytest.fixture(scope="module")
def python_output(methane: Path) -> str:
    command = [sys.executable, FOLDER / "run_model.py", lmkan_deploy.get_library_path(), methane]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_python_without_the_package(python_output: str) -> None:
    assert "import lmkan_deploy" not in (FOLDER / "run_model.py").read_text()
    value, unit = python_output.split()
    assert unit == "eV"
    assert np.isfinite(float(value))


def test_cpp_without_the_package(methane: Path, python_output: str, tmp_path: Path) -> None:
    headers = os.environ.get("ORT_INCLUDE_DIR") or subprocess.run(
        [sys.executable, ROOT / "plugins/cmake/fetch_headers.py", "onnxruntime"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()  # fmt: skip
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    shutil.copy(library, tmp_path / "libonnxruntime.so.1")
    subprocess.run(
        ["g++", "-std=c++17", "-isystem", headers, FOLDER / "run_model.cc", "libonnxruntime.so.1",
         "-Wl,-rpath,$ORIGIN", "-o", "run_model"],
        cwd=tmp_path,
        check=True,
    )  # fmt: skip
    command = [tmp_path / "run_model", lmkan_deploy.get_library_path(), methane]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == python_output
    wrong = subprocess.run(
        [*command[:2], tmp_path / "none.onnx"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: ")


def test_demo() -> None:
    """The main job: data, training, export, verification, and the same error in PyTorch and ONNX Runtime."""
    command = [sys.executable, ROOT / "examples/methane/demo.py"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "100"}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = re.findall(r"│ (PyTorch|ONNX Runtime alone|ONNX Runtime \+ library) +│ +([\d.]+)", done.stdout)
    errors = {name: float(error) for name, error in rows}
    assert len(errors) == 3
    assert max(errors.values()) < 30  # meV; a quadratic regression has 58
    assert max(errors.values()) - min(errors.values()) < 0.01
