"""Runs compilers and other tools for tests of the TensorRT plugin, and says where its sources are."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import lmkan_deploy

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "plugins/tensorrt"


def run(*command: object, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def needed_by_host_kernels() -> str:
    """The linker's options for what they call."""
    cpu = lmkan_deploy.get_library_path("cpu")
    return f"-L{cpu.parent} -l:{cpu.name} -Wl,-rpath,{cpu.parent}"
