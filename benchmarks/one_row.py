"""Builds and runs one_row.cc on the models of one shape.

Usage: one_row.py OUTPUT.json
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

import lmkan_deploy
import workloads

ROOT = Path(__file__).parent.parent
WIDTH, NUM_GRIDS = 128, 26


def main() -> None:
    """Command line."""
    output = Path(sys.argv[1])
    table = workloads.random_table(np.random.default_rng(0), WIDTH, WIDTH, NUM_GRIDS)
    models = {
        form: workloads.lookup_model([workloads.in_type(table, form)])
        for form in ("float32", "float16", "int8")
    }
    models |= {"dense": workloads.dense_model(WIDTH, WIDTH), "identity": workloads.identity_model(WIDTH)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for form, model in models.items():
            onnx.save(model, folder / f"{form}.onnx")
        arguments = [f"{form}={folder / form}.onnx+" for form in models]
        arguments.append(f"function={folder / 'float32'}.onnx")
        program = _build(folder)
        command = [program, lmkan_deploy.get_library_path(), *arguments]
        output.write_text(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _build(folder: Path) -> Path:
    fetch = [sys.executable, ROOT / "plugins/cmake/fetch_headers.py", "onnxruntime"]
    headers = (
        os.environ.get("ORT_INCLUDE_DIR")
        or subprocess.run(fetch, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    )
    library = next((Path(ort.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    shutil.copy(library, folder / "libonnxruntime.so.1")
    source = ROOT / "benchmarks" / "one_row.cc"
    command = ["g++", "-O2", "-std=c++17", "-isystem", headers, source, "libonnxruntime.so.1",
               "-Wl,-rpath,$ORIGIN", "-o", "one_row"]  # fmt: skip
    # The compiler handles the signal that hide_avx512 answers.
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    subprocess.run(command, cwd=folder, env=environment, check=True)
    return folder / "one_row"


if __name__ == "__main__":
    main()
