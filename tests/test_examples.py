"""The examples, run for real."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
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
def checkout(methane: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository after `make setup` and `make demo`, as far as the README's commands look at it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name, target in {
        ".venv": Path(sys.prefix),
        "examples": ROOT / "examples",
        "plugins": ROOT / "plugins",
    }.items():
        (folder / name).symlink_to(target)
    (folder / "build/demo").mkdir(parents=True)
    shutil.copy(methane, folder / "build/demo/model.onnx")
    return folder


def test_the_commands_without_the_package(checkout: Path) -> None:
    """Python and C++ print the same energy."""
    assert "import lmkan_deploy" not in (FOLDER / "run_model.py").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", (FOLDER / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    result = sh("".join(["set -e\n", *blocks]), checkout)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == second
    value, unit = first.split()
    assert unit == "eV"
    assert np.isfinite(float(value))
    wrong = sh(f"{blocks[0]} build/demo/run_model $LIBRARY none.onnx", checkout)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: ")


def sh(text: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "-c", text], cwd=cwd, capture_output=True, text=True, check=False)


def test_headers_without_npm(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, ROOT / "plugins/cmake/fetch_headers.py", "onnxruntime"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 1
    assert result.stderr.splitlines()[1:] == [
        "expected npm or ORT_INCLUDE_DIR, found neither; install npm, or set ORT_INCLUDE_DIR to a folder that "
        "has onnxruntime_c_api.h"
    ]
    assert result.stdout == ""


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
