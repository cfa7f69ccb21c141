"""Fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lmkan_deploy
from exporter_functions import remember
from networks import USER_MODELS, ExportedStack, UserModel, make_stack

remember()

# Files that share something expensive run in one process.
GROUPS = {
    "test_cuda": "cuda",
    "test_onnxruntime_cuda": "cuda",
    "test_tensorrt_package": "cuda",
    "test_tensorrt_plugin": "cuda",
    "test_package": "package",
}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        group = GROUPS.get(item.path.stem)
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(params=USER_MODELS, ids=lambda model: model.name)
def user_model(request: pytest.FixtureRequest) -> UserModel:
    return request.param


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> ExportedStack:
    folder = tmp_path_factory.mktemp("stack")
    module = make_stack(10, 24, 7)
    torch.save(module.state_dict(), folder / "model.pt")
    lmkan_deploy.export(folder / "model.pt", folder / "model.onnx")
    return ExportedStack(module, folder / "model.pt", folder / "model.onnx")


@pytest.fixture(scope="session")
def cuda_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that nvcc builds, for compute capability 9.0; build.log has ptxas's report.

    LMKAN_CUDA_BUILD names a folder that is built already.
    """
    if os.environ.get("LMKAN_CUDA_BUILD"):
        return Path(os.environ["LMKAN_CUDA_BUILD"])
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed: the CUDA kernels can't be compiled here")
    folder = tmp_path_factory.mktemp("cuda-build")
    # Tools that pip installed come first.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    options = ["-DLMKAN_BUILD_CUDA=ON", "-DLMKAN_BUILD_TENSORRT=ON", "-DLMKAN_BUILD_CUDA_TESTS=ON",
               "-DCMAKE_CUDA_ARCHITECTURES=90-real", "-DCMAKE_CUDA_FLAGS=-Xptxas=-v",
               f"-DPython3_EXECUTABLE={sys.executable}"]  # fmt: skip
    targets = ["lmkan_cpu", "lmkan_cuda", "lmkan_cuda_archive", "lmkan_onnxruntime", "lmkan_onnxruntime_cuda",
               "lmkan_tensorrt", "lmkan_tensorrt_register", "cuda_lookup_gpu"]  # fmt: skip
    root = Path(__file__).parent.parent
    with (folder / "build.log").open("w") as log:
        for command in (["cmake", "-S", root, "-B", folder, "-G", "Ninja", *options],
                        ["cmake", "--build", folder, "--verbose", "--target", *targets]):  # fmt: skip
            result = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
            )
            assert result.returncode == 0, (folder / "build.log").read_text()[-4000:]
    return folder
