"""The kernels' C++ tests, without any framework: of the package's own library, and under sanitizers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import lmkan_deploy

ROOT = Path(__file__).parent.parent
# Tools that pip installed come first.
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_kernels_of_the_package() -> None:
    library = lmkan_deploy.get_library_path("cpu")
    sources = (ROOT / "plugins" / "kernels" / "cpu").iterdir()
    assert library.stat().st_mtime > max(file.stat().st_mtime for file in sources), "run make setup"
    check("release", f"-DLMKAN_CPU_LIBRARY={library}")


def test_kernels_under_sanitizers() -> None:
    check("sanitizers", "-DLMKAN_SANITIZE=ON")


def check(name: str, option: str) -> None:
    build = ROOT / "build" / f"cpp-{name}"
    run("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DLMKAN_BUILD_TESTS=ON",
        "-DLMKAN_BUILD_ONNXRUNTIME=OFF", option)  # fmt: skip
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
