"""The README's commands and programs, run in their order."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from served import Served

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXTRAS = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_commands_and_programs(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        run_commands_and_programs(tmp_path, stack)


def run_commands_and_programs(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    # A reader's shell, after `make demo`: what is not in the README is not there.
    (tmp_path / ".venv").symlink_to(sys.prefix)
    own = str(Path(sys.executable).parent)
    path = [folder for folder in os.environ["PATH"].split(os.pathsep) if folder != own]
    environment = {**os.environ, "PATH": os.pathsep.join(path)}
    run = functools.partial(subprocess.run, cwd=tmp_path, env=environment, check=True)
    program, commands, activation = "", 0, ""
    server: Served | None = None
    for language, text in BLOCKS:
        if language == "python":
            program += text  # later ones use the names of earlier ones
            (tmp_path / "program.py").write_text(program)
            run(["sh", "-c", f"{activation}python program.py"])
            continue
        if "curl" in text:
            assert server is not None
            text = text.replace("http://localhost:8000", server.url)
            answer = run(["sh", "-c", text], capture_output=True).stdout
            assert json.loads(answer)["outputs"][0]["shape"] == [1, 1]
            continue
        for line in text.splitlines():
            if line.startswith("make "):
                target = line.split()[1]
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
                continue
            if line.startswith(". "):
                activation = f"{line.split('#')[0].strip()} && "
                continue
            if line.startswith("pip install"):
                assert set(re.findall(r"\w+", line.split("[")[1])) <= set(EXTRAS), line
                assert "-c constraints.txt" in line
                continue
            if line.startswith("lmkan-deploy serve"):
                server = stack.enter_context(Served(tmp_path / line.split()[2]))
                continue
            run(["sh", "-c", activation + line])
            commands += 1
    assert commands >= 4
    assert np.load(tmp_path / "y.npy").shape == (1000, 1)


def test_files_it_names_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_map_is_complete() -> None:
    chart = README.split("## Map")[1]
    for folder in ("lmkan_deploy", "plugins"):
        section = chart.split(f"    {folder}/\n")[1].split("\n    benchmarks/")[0]
        for path in (ROOT / folder).iterdir():
            if path.is_dir() and path.name not in ("__pycache__", "cmake"):
                assert f"{path.name}/" in section, path
            if path.suffix == ".py" and path.stem not in ("__init__", "version", "errors"):
                assert path.name in section, path
    for name in re.findall(r"[\w/]+\.py|[\w/]+/(?=\s)", chart):
        assert list(ROOT.glob(f"**/{name}")), name


def test_the_test_command_is_what_ci_runs() -> None:
    assert "make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text()
