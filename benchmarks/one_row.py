"""Times one row of one shape: with one_row.cc through the C++ API, and from Python with and without IO binding.

Usage: one_row.py OUTPUT.json

Writes interface -> model -> seconds of a call, one for each turn. The models take turns, as in one_row.cc.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

import lmkan_deploy
import workloads

ROOT = Path(__file__).parent.parent
WIDTH, NUM_GRIDS = 128, 26
TURNS, CALLS_A_TURN = 31, 1000


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
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    library = lmkan_deploy.get_library_path("onnxruntime")
    sessions = {form: workloads.new_session(model, library=library) for form, model in models.items()}
    sessions["function"] = workloads.new_session(models["float32"])
    calls = {form: _python_calls(session) for form, session in sessions.items()}
    seconds = {"the C++ API": json.loads(found)}
    for index, interface in enumerate(("Python's session.run", "Python's run_with_iobinding")):
        seconds[interface] = _in_turns({form: both[index] for form, both in calls.items()})
    output.write_text(json.dumps(seconds))


def _python_calls(session: ort.InferenceSession) -> tuple[workloads.Run, workloads.Run]:
    """A call that passes arrays, and one whose arrays were bound before."""
    x = np.random.default_rng(0).standard_normal((1, WIDTH), dtype=np.float32)
    bound = session.io_binding()
    bound.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x))
    bound.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(np.zeros((1, WIDTH), np.float32)))
    feeds = {"x": x}
    return lambda: session.run(None, feeds), lambda: session.run_with_iobinding(bound)


def _in_turns(calls: dict[str, workloads.Run]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {form: [] for form in calls}
    for _ in range(TURNS):
        for form, call in calls.items():
            started = time.perf_counter()
            for _ in range(CALLS_A_TURN):
                call()
            seconds[form].append((time.perf_counter() - started) / CALLS_A_TURN)
    return seconds


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
