"""The README's commands and programs, run in their order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_commands_and_programs(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((200, 16), dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    program, commands = "", 0
    for language, text in BLOCKS:
        if language == "python":
            program += text  # later ones use the names of earlier ones
            command: list[str] = [sys.executable, "-c", program]
            subprocess.run(command, cwd=tmp_path, env=environment, check=True)
            continue
        for line in text.splitlines():
            if line.startswith("make "):
                target = line.split()[1]
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
                continue
            subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environment, check=True)
            commands += 1
    assert commands >= 4
    assert np.load(tmp_path / "y.npy").shape == (200, 1)


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
