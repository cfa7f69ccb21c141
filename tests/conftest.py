"""Fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lmkan_deploy
from exporter_functions import remember
from lmkan_deploy.runtime.tensorrt_plugin import build_tensorrt_plugin
from networks import USER_MODELS, ExportedStack, UserModel, make_stack
from tensorrt_builds import PLUGIN, ROOT, needed_by_host_kernels, run
from tensorrt_driver import Library

remember()

# Files that share something expensive run in one process.
GROUPS = {
    "test_cuda": "cuda",
    "test_onnxruntime_cuda": "cuda",
    "test_tensorrt_package": "cuda",
    "test_tensorrt_plugin_contract": "cuda",
    "test_tensorrt_plugin_libraries": "cuda",
    "test_tensorrt_plugin_values": "cuda",
    "test_tensorrt_rtx": "cuda",
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


# --- The TensorRT plugin -------------------------------------------------------------------------------

# The methods that only an engine calls are called by a driver of our own. "host" is the plugin with kernels that
# compute on host memory, so that values come out; "cuda", with the CUDA kernels, does all that needs no device.


@pytest.fixture(scope="session")
def headers() -> Path:
    """TensorRT's headers; the build finds them in the same way."""
    return Path(
        os.environ.get("TENSORRT_INCLUDE_DIR")
        or run(sys.executable, ROOT / "plugins/cmake/fetch_headers.py", "tensorrt").strip()
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensorrt")


@pytest.fixture(scope="session")
def host_kernels(folder: Path) -> Path:
    """An archive with the interface of the CUDA kernels over the CPU's kernels."""
    run("g++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-c", "-I", ROOT / "plugins/include",
        PLUGIN / "tests/host_kernels.cc", "-o", folder / "host_kernels.o")  # fmt: skip
    run("ar", "rcs", folder / "liblmkan_host_kernels.a", folder / "host_kernels.o")
    return folder / "liblmkan_host_kernels.a"


@pytest.fixture(scope="session")
def host_plugin(folder: Path, headers: Path, host_kernels: Path) -> Path:
    """The plugin around them, as a user's machine compiles it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDFLAGS", needed_by_host_kernels())
        return build_tensorrt_plugin(headers, folder / "liblmkan_tensorrt_host.so", kernels=host_kernels)


@pytest.fixture(scope="session")
def cuda_plugin(cuda_build: Path) -> Path:
    """The plugin with the CUDA kernels inside, as the project builds it."""
    return next(cuda_build.rglob("liblmkan_tensorrt.so"))


@pytest.fixture(scope="session")
def driver(folder: Path, headers: Path) -> Path:
    path = folder / "libdriver.so"
    run("g++", "-std=c++17", "-fPIC", "-shared", "-isystem", headers, "-idirafter", PLUGIN / "cuda_types",
        PLUGIN / "tests/driver.cc", "-o", path)  # fmt: skip
    return path


@pytest.fixture(scope="session")
def host_library(driver: Path, host_plugin: Path) -> Library:
    return Library(driver, host_plugin)


@pytest.fixture(scope="session")
def cuda_library(driver: Path, cuda_plugin: Path) -> Library:
    return Library(driver, cuda_plugin)


@pytest.fixture
def host(host_library: Library) -> Iterator[Library]:
    """A test must have looked at every line that is logged, here and below."""
    host_library.listen()
    yield host_library
    assert host_library.lines == []


@pytest.fixture
def cuda(cuda_library: Library) -> Iterator[Library]:
    cuda_library.listen()
    yield cuda_library
    assert cuda_library.lines == []


@pytest.fixture(params=["host", "cuda"])
def library(request: pytest.FixtureRequest) -> Library:
    return request.getfixturevalue(request.param)
