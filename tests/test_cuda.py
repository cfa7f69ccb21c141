"""The CUDA kernels: built by nvcc, and their source run on the CPU, neither of which needs a GPU; and on one."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lmkan_deploy.engines.device import compute_capability

ROOT = Path(__file__).parent.parent
# Tools that pip installed come first.
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

BUILT_FOR = "9.0"  # by `cuda_build`

OK, INVALID_ARGUMENT, CUDA_ERROR = 0, 1, 4
FLOAT32, INT8 = 0, 3
AUTO, GATHER, SHARED, NARROW = 0, 1, 2, 3


class TableDesc(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("num_pairs", ctypes.c_int64),
        ("num_grids", ctypes.c_int64),
        ("num_outputs", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
    ]


@pytest.fixture
def library(cuda_build: Path) -> Path:
    return next(cuda_build.rglob("liblmkan_cuda.so"))


def test_kernels_do_not_spill(cuda_build: Path) -> None:
    kernels = re.findall(
        r"Function properties for (\S+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill"
        r" loads\nptxas info\s*: Used (\d+) registers",
        (cuda_build / "build.log").read_text(),
    )
    # Four types of tables: SHARED in two forms, GATHER with aligned and other corners, NARROW for four
    # numbers of outputs, SPLIT; and what adds its parts.
    assert len(kernels) == 37
    for name, stack, stores, loads, registers in kernels:
        # What is before and after the sums may leave a few values in memory where there are 64 sums.
        most = 48 if "BulkKernel" in name else 0
        assert max(int(stack), int(stores), int(loads)) <= most, name
        most = {"GatherKernel": 255, "NarrowKernel": 64}
        assert int(registers) <= next((n for kind, n in most.items() if kind in name), 128), name


def test_symbols(library: Path) -> None:
    lines = run("nm", "--dynamic", library).splitlines()
    symbols = [line.split()[-2:] for line in lines]
    defined = {name for kind, name in symbols if kind not in "Uwv"}
    assert defined == {
        "lmkan_abi_version",
        "lmkan_version",
        "lmkan_cuda_tactics",
        "lmkan_cuda_workspace_size",
        "lmkan_cuda_lookup2d",
    }
    undefined = {name for kind, name in symbols if kind == "U"}
    assert all("@GLIBC_" in name for name in undefined), undefined
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", library))
    allowed = r"(libc|libm|libdl|librt|libpthread|ld-linux-x86-64)\.so\.\d+"
    assert needed
    assert all(re.fullmatch(allowed, name) for name in needed), needed


def test_library_without_a_device(library: Path) -> None:
    """Statuses of a machine without a GPU; in a process that sees none even where there is one."""
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import test_cuda; "
    script += f"test_cuda.check_library({str(library)!r})"
    environment = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def check_library(path: str) -> None:
    library = ctypes.CDLL(path)
    library.lmkan_version.restype = ctypes.c_char_p
    version = re.search(r'__version__ = "(.*)"', (ROOT / "lmkan_deploy" / "version.py").read_text())[1]
    assert library.lmkan_version().decode() == version
    header = (ROOT / "plugins" / "include" / "lmkan" / "lookup2d.h").read_text()
    assert library.lmkan_abi_version() == int(re.search(r"LMKAN_ABI_VERSION (\d+)", header)[1])

    memory = (ctypes.c_float * 1024)()
    start = (ctypes.addressof(memory) + 15) // 16 * 16
    desc = TableDesc(start, FLOAT32, 2, 4, 3, None)
    message = ctypes.create_string_buffer(256)

    def look_up(rows: int = 1, dtype: int = FLOAT32, tactic: int = AUTO) -> tuple[int, str]:
        message.value = b""
        status = library.lmkan_cuda_lookup2d(
            ctypes.byref(desc), dtype, ctypes.c_void_p(start), ctypes.c_void_p(start), ctypes.c_int64(rows),
            tactic, None, ctypes.c_size_t(0), None, message, ctypes.c_size_t(len(message)),
        )  # fmt: skip
        return status, message.value.decode()

    assert look_up(rows=0) == (OK, "")
    assert look_up(dtype=INT8)[0] == INVALID_ARGUMENT
    assert look_up(rows=-1) == (INVALID_ARGUMENT, "expected at least 0 rows, found -1")
    for tactic in (AUTO, GATHER, SHARED, NARROW):
        status, text = look_up(tactic=tactic)
        assert status == CUDA_ERROR
        assert re.fullmatch(r"finding the CUDA device failed: .* \(cudaError\w+\)", text), text
    assert library.lmkan_cuda_tactics(ctypes.byref(desc), FLOAT32, None, 0) == 0
    size = ctypes.c_size_t(1)
    assert (
        library.lmkan_cuda_workspace_size(
            ctypes.byref(desc),
            FLOAT32,
            ctypes.c_int64(5),
            AUTO,
            ctypes.byref(size),
            message,
            ctypes.c_size_t(256),
        )
        == OK
    )
    assert size.value == 0


@pytest.mark.gpu
@pytest.mark.skipif(
    compute_capability() != BUILT_FOR,
    reason=f"needs a GPU of compute capability {BUILT_FOR}, found {compute_capability() or 'none'}",
)
def test_lookups_on_a_gpu(cuda_build: Path) -> None:
    program = next(cuda_build.rglob("cuda_lookup_gpu"))
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    if result.returncode == 77:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr


def test_kernels_on_the_cpu() -> None:
    folder = ROOT / "build" / "cuda-emulated"
    configure(folder, "-DLMKAN_SANITIZE=ON")
    run("cmake", "--build", folder, "--target", "cuda_lookup_emulated", "cuda_interface_emulated")
    output = run("ctest", "--test-dir", folder, "--output-on-failure", "-j", "2", "-R", "cuda_.*_emulated")
    assert re.search(r"100% tests passed.* out of 2", output)


def configure(folder: Path, *options: str) -> None:
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DLMKAN_BUILD_CUDA_TESTS=ON",
        "-DLMKAN_BUILD_ONNXRUNTIME=OFF", *options)  # fmt: skip


def run(*command: object) -> str:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
