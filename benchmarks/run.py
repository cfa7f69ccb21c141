"""Runs the benchmarks, then most of them again as on a machine without AVX-512.

Usage: run.py FOLDER [PYTEST ARGUMENTS]

FOLDER has load_bandwidth and hide_avx512.so, which `make bench` builds. Results are written there, those
of the second run to FOLDER/avx2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CANNOT_HIDE = 77  # exit status of hide_avx512
NO_TESTS = 5  # exit status of pytest
WITHOUT_AVX512 = ("test_shapes.py", "test_chains.py", "test_threads.py", "test_curves.py::test_over_grids")


def run(
    folder: Path, tools: Path, environment: dict[str, str], *arguments: str, may_be_empty: bool = False
) -> None:
    """Writes bandwidth.json, timings.json and one_row.json."""
    folder.mkdir(exist_ok=True)
    (folder / "timings.json").unlink(missing_ok=True)
    with (folder / "bandwidth.json").open("w") as output:
        subprocess.run([tools / "load_bandwidth"], stdout=output, env=environment, check=True)
    # pytest's fault handler would take the signal that hide_avx512 answers.
    pytest = [sys.executable, "-m", "pytest", "-p", "no:faulthandler", "--quiet"]
    timings = f"--benchmark-json={folder / 'timings.json'}"
    status = subprocess.run([*pytest, timings, *arguments], env=environment, check=False).returncode
    if status != 0 and not (may_be_empty and status == NO_TESTS):
        sys.exit(status)
    one_row = [sys.executable, HERE / "one_row.py", folder / "one_row.json"]
    subprocess.run(one_row, env=environment, check=True)


def main() -> None:
    """Command line."""
    folder = Path(sys.argv[1]).resolve()
    shutil.rmtree(folder / "avx2", ignore_errors=True)
    environment = dict(os.environ)
    run(folder, folder, environment, str(HERE), *sys.argv[2:])
    environment["LD_PRELOAD"] = str(folder / "hide_avx512.so")
    probe = subprocess.run(["true"], env=environment, check=False)
    if probe.returncode == CANNOT_HIDE:
        print("no second run: this machine can't hide AVX-512")
        return
    tests = [str(HERE / name) for name in WITHOUT_AVX512]
    run(folder / "avx2", folder, environment, *tests, *sys.argv[2:], may_be_empty=True)


if __name__ == "__main__":
    main()
