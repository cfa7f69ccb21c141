"""The kernels' C++ tests, without any framework: optimised, and under sanitizers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Tools that pip installed come first.
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.mark.parametrize("sanitize", [False, True], ids=["release", "sanitizers"])
def test_kernels(sanitize: bool) -> None:
    build = ROOT / "build" / ("cpp-sanitizers" if sanitize else "cpp-release")
    run("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DLMKAN_BUILD_TESTS=ON",
        "-DLMKAN_BUILD_ONNXRUNTIME=OFF", f"-DLMKAN_SANITIZE={'ON' if sanitize else 'OFF'}")  # fmt: skip
    run("cmake", "--build", build)
    output = run("ctest", "--test-dir", build, "--output-on-failure", "-j", "2")
    assert int(re.search(r"100% tests passed.* out of (\d+)", output)[1]) >= 22
    assert not re.search(r"portable.*Skipped", output)


def run(*command: object) -> str:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
