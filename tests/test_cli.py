"""The command line as a user meets it: separate processes, exit codes, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from networks import DATA, ExportedStack, make_stack

ROOT = Path(__file__).parent.parent


def cli(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lmkan_deploy.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, check=False)


def fails(result: subprocess.CompletedProcess[str], code: int, *fragments: str) -> None:
    assert result.returncode == code, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for fragment in fragments:
        assert fragment in lines[0]


METHANE = (DATA / "methane.state_dict.pt", "--arch", "user_models:MethaneNet", "--arch-path", DATA)


@pytest.fixture(scope="module")
def methane(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "methane.onnx"
    result = cli("export", *METHANE, "-o", path)
    assert result.returncode == 0, result.stderr
    for fragment in ("lmkan1", "86,528", "verified onnxruntime against PyTorch", "from a state dict"):
        assert fragment in result.stdout
    assert result.stderr == ""
    return path


def test_export_of_a_stack_needs_nothing_else(tmp_path: Path) -> None:
    torch.save(make_stack(6, 8, 2).state_dict(), tmp_path / "model.pt")
    result = cli("export", "model.pt", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "note: assumed BatchNorm's default eps" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.pt"]


def test_export_as_json(stack: ExportedStack, tmp_path: Path) -> None:
    result = cli("export", stack.checkpoint, "-o", tmp_path / "m.onnx", "--json")
    report = json.loads(result.stdout)
    assert report["kind"] == "inferred stack"
    assert report["verification"]["passed"] is True
    assert [layer["num_grids"] for layer in report["model"]["layers"]] == [6, 6]
    assert cli("export", stack.checkpoint, "-o", tmp_path / "m.onnx", "-q", "--no-verify").stdout == ""


def test_inspect(methane: Path) -> None:
    text = cli("inspect", methane).stdout
    for fragment in (
        "x float32[batch, 12]",
        "ai.onnx 20, lmkan 1",
        "present",
        "fold-scale-shift: lmkan1: BatchNormalization",
        "3,072",
    ):
        assert fragment in text
    report = json.loads(cli("inspect", methane, "--json").stdout)
    assert report["has_function"] is True
    assert report["layers"][1] == {
        "name": "lmkan2",
        "num_inputs": 32,
        "num_outputs": 32,
        "num_grids": 12,
        "table_dtype": "float32",
        "parameters": 16 * 13 * 13 * 32,
        "table_bytes": 16 * 13 * 13 * 32 * 4,
        "multiply_adds": 4 * 16 * 32,
    }


def test_run(methane: Path, tmp_path: Path) -> None:
    stored = np.load(DATA / "methane.io.npz")
    assert cli("run", methane, "-i", DATA / "methane.io.npz", "-o", tmp_path / "y.npz").returncode == 0
    np.testing.assert_allclose(np.load(tmp_path / "y.npz")["y"], stored["y"], rtol=1e-4, atol=1e-5)
    np.save(tmp_path / "x.npy", stored["x"])
    result = cli("run", methane, "-i", "x.npy", "-o", "y.npy", "--threads", 1, cwd=tmp_path)
    assert result.stdout == "y.npy: y float32[40, 1]\n"
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), np.load(tmp_path / "y.npz")["y"])


def test_verify_against_the_checkpoint(methane: Path) -> None:
    inputs = ("-i", DATA / "methane.io.npz")
    result = cli("verify", methane, "-c", *METHANE, *inputs, "--runtime", "onnxruntime", "--batch", 3)
    assert result.returncode == 0, result.stderr
    assert "all 2 comparisons passed" in result.stdout
    report = json.loads(cli("verify", methane, "-c", *METHANE, "--json").stdout)
    assert report["reference"] == "pytorch"
    assert len(report["comparisons"]) == 8


def test_verify_without_a_reference_compares_the_runtimes(methane: Path) -> None:
    report = json.loads(cli("verify", methane, "--json", "--batch", 3).stdout)
    assert (report["reference"], report["comparisons"][0]["runner"]) == (
        "onnxruntime-function",
        "onnxruntime",
    )
    only = json.loads(cli("verify", methane, "--json", "--runtime", "onnxruntime-function").stdout)
    assert {comparison["runner"] for comparison in only["comparisons"]} == {"onnx-reference"}


def test_verify_against_stored_outputs(methane: Path, tmp_path: Path) -> None:
    stored = DATA / "methane.io.npz"
    good = cli("verify", methane, "-i", stored, "--outputs", stored, "--runtime", "onnx-reference")
    assert good.returncode == 0
    y = np.load(stored)["y"]
    y[17, 0] += 1.0
    np.savez(tmp_path / "y.npz", y=y)
    bad = cli("verify", methane, "-i", stored, "--outputs", tmp_path / "y.npz")
    assert bad.returncode == 1
    assert "first bad element y[17, 0]: expected" in bad.stdout
    assert "2 of 2 comparisons failed" in bad.stdout
    assert cli("verify", methane, "-i", stored, "--outputs", tmp_path / "y.npz", "-q").stdout == ""


def test_verify_of_a_model_against_another_network(methane: Path, tmp_path: Path) -> None:
    torch.save(make_stack(12, 4, 1).state_dict(), tmp_path / "other.pt")
    assert cli("verify", methane, "-c", tmp_path / "other.pt").returncode == 1


class TestMistakes:
    def test_checkpoints(self, tmp_path: Path) -> None:
        (tmp_path / "empty.pt").touch()
        fails(cli("export", "missing.pt", cwd=tmp_path), 2, "found no file missing.pt")
        fails(cli("export", tmp_path / "empty.pt"), 2, "found the empty file")
        fails(cli("export", DATA / "methane.pickled.pt"), 2, "--trust-pickle")
        fails(cli("export", DATA / "methane.state_dict.pt"), 2, "--arch module:factory")
        fails(cli("export", *METHANE, "--input-shape", "batch,13"), 2, "expected x [..., 12]")
        fails(cli("export", *METHANE, "--input-shape", "what?"), 2, "expected an input shape such as")
        fails(cli("export", *METHANE, "--arch-args", "{oops"), 2, "as JSON")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.pt"]

    def test_a_difference_is_exit_code_1(self, stack: ExportedStack, tmp_path: Path) -> None:
        result = cli("export", stack.checkpoint, "-o", tmp_path / "m.onnx", "--rtol", 1e-12)
        fails(result, 1, "nothing was written")
        assert list(tmp_path.iterdir()) == []

    def test_models_and_arrays(self, methane: Path, tmp_path: Path) -> None:
        (tmp_path / "bad.onnx").write_bytes(b"no model")
        (tmp_path / "bad.npz").write_bytes(b"no arrays")
        np.savez(tmp_path / "wide.npz", x=np.zeros((2, 13), np.float32))
        np.savez(tmp_path / "double.npz", x=np.zeros((2, 12)))
        np.savez(tmp_path / "other.npz", a=np.zeros(1), b=np.zeros(1))
        run = lambda name: cli("run", methane, "-i", name, cwd=tmp_path)  # noqa: E731
        fails(cli("inspect", tmp_path / "bad.onnx"), 2, "expected an ONNX")
        fails(cli("run", tmp_path / "none.onnx", "-i", "x.npy"), 2, "found no file")
        fails(run("bad.npz"), 2, "expected a .npz or .npy file")
        fails(run("none.npz"), 2, "none.npz")
        fails(run("wide.npz"), 2, "expected input x float32[batch, 12], found shape [2, 13]")
        fails(run("double.npz"), 2, "found float64", "astype('float32')")
        fails(run("other.npz"), 2, "expected arrays x", "found a, b")
        fails(cli("verify", methane, "--outputs", tmp_path / "wide.npz"), 2)
        assert not (tmp_path / "outputs.npz").exists()

    def test_pickled_arrays_are_not_loaded(self, methane: Path, tmp_path: Path) -> None:
        np.savez(tmp_path / "objects.npz", x=np.array([{"a": 1}], dtype=object))
        fails(cli("run", methane, "-i", tmp_path / "objects.npz"), 2, "could not read")

    def test_usage_and_debug(self, tmp_path: Path) -> None:
        assert cli("export").returncode == 2
        assert cli("nonsense").returncode == 2
        traced = cli("--debug", "inspect", tmp_path / "none.onnx")
        assert traced.returncode != 0
        assert "Traceback" in traced.stderr


def test_help_has_an_example_for_every_command() -> None:
    overview = cli("--help").stdout
    for command in ("export", "verify", "run", "inspect"):
        assert command in overview
        assert f"lmkan-deploy {command} model" in cli(command, "--help").stdout


def test_launcher_in_the_checkout() -> None:
    command = [sys.executable, "cli.py", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.startswith("lmkan-deploy ")
    assert (ROOT / "converters" / "torch_to_onnx.py").is_file()
