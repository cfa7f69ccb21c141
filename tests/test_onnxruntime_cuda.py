"""The library with operators for both providers; without a GPU it serves the CPU's."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import lmkan_deploy
from lmkan_deploy.errors import LibraryError
from networks import ExportedStack


@pytest.fixture(scope="module")
def library(cuda_build: Path) -> Path:
    return next(cuda_build.rglob("liblmkan_onnxruntime_cuda.so"))


def test_it_serves_the_cpu_without_cuda(library: Path, stack: ExportedStack) -> None:
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(stack.onnx, options, providers=["CPUExecutionProvider"])
    runner = lmkan_deploy.load_runner(stack.onnx)
    features = runner.inputs[0].shape[1]
    x = np.random.default_rng(0).standard_normal((33, features), dtype=np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], runner.run({"x": x})["y"])


def test_symbols(library: Path) -> None:
    command = ["nm", "-D", "--defined-only", str(library)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    exported = {line.split()[-1] for line in output.splitlines()}
    assert exported == {"RegisterCustomOps", "lmkan_abi_version", "lmkan_version"}
    command = ["readelf", "-d", str(library)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*?)\.so", output)
    assert set(needed) <= {"libc", "libm", "libdl", "librt", "libpthread", "ld-linux-x86-64"}, needed


def test_a_missing_provider_is_named(stack: ExportedStack) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    with pytest.raises(LibraryError, match=r"with its CUDA provider, found .*; install lmkan-deploy\[gpu\]"):
        lmkan_deploy.load_runner(stack.onnx, "onnxruntime-cuda")


def test_a_missing_library_is_named() -> None:
    with pytest.raises(LibraryError, match=r"found none; .*LMKAN_BUILD_CUDA=ON"):
        lmkan_deploy.get_library_path("onnxruntime-cuda")
