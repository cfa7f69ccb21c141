"""The command line as a user meets it: separate processes, exit codes, one-line errors."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import lmkan_deploy
from cli_process import cli, fresh_cli
from lmkan_deploy import api
from lmkan_deploy import cli as command_line
from lmkan_deploy.converters.passes import PASSES
from networks import DATA, ExportedStack, make_stack, needs_opset

ROOT = Path(__file__).parent.parent


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
    result = fresh_cli("export", *METHANE, "-o", path)
    assert result.returncode == 0, result.stderr
    for fragment in (
        "x float32[batch, 12] -> y float32[batch, 1]",
        "lmkan1",
        "86,528",
        "verified onnxruntime against PyTorch",
        "from a state dict, read as weights only",
    ):
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
    assert report["weights_only"] is True
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
        "nothing to do: ",
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
        "table_of": None,
    }


def test_the_help_describes_all_passes() -> None:
    section = " ".join(cli("optimize", "--help").stdout.split("Passes:")[1].split())
    for item in PASSES:
        always = item.name in ("fold-table-transpose", "clean-up", "share-tables")
        assert f"{item.name} {item.summary}{' (always runs)' if always else ''}" in section


def test_passes_by_name(methane: Path, tmp_path: Path) -> None:
    without = tmp_path / "without.onnx"
    result = cli("export", *METHANE, "-o", without, "--no-passes", "fold-scale-shift")
    assert result.returncode == 0, result.stderr
    assert "not run: fold-scale-shift\n" in cli("inspect", without).stdout
    assert json.loads(cli("inspect", without, "--json").stdout)["other_nodes"]["BatchNormalization"] > 0
    only = tmp_path / "only.onnx"
    result = cli("optimize", without, "-o", only, "--passes", "fold-scale-shift")
    assert "fold-scale-shift: lmkan1: BatchNormalization" in result.stdout
    found = json.loads(cli("inspect", only, "--json").stdout)
    assert found["passes_not_run"] == []
    assert "BatchNormalization" not in found["other_nodes"]
    fails(
        cli("optimize", without, "-o", only, "--passes", "fold"), 2, "expected a pass of fold-table-transpose"
    )


def test_run(methane: Path, tmp_path: Path) -> None:
    stored = np.load(DATA / "methane.io.npz")
    assert cli("run", methane, "-i", DATA / "methane.io.npz", "-o", tmp_path / "y.npz").returncode == 0
    np.testing.assert_allclose(np.load(tmp_path / "y.npz")["y"], stored["y"], rtol=1e-4, atol=1e-5)
    np.save(tmp_path / "x.npy", stored["x"])
    result = cli("run", methane, "-i", "x.npy", "-o", "y.npy", "--threads", 1, cwd=tmp_path)
    assert result.stdout == "y.npy: y float32[40, 1]\n"
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), np.load(tmp_path / "y.npz")["y"])


def test_outputs_replace_nothing_that_is_read(stack: ExportedStack, tmp_path: Path) -> None:
    lmkan_deploy.export(stack.checkpoint, tmp_path / "m.onnx", external_data=True, check=False)
    np.save(tmp_path / "x.npy", np.zeros((2, 10), np.float32))
    (tmp_path / "link.npy").symlink_to("x.npy")
    for output in ("m.onnx", "m.onnx.data", "x.npy", "link.npy"):
        before = (tmp_path / output).read_bytes()
        result = cli("run", "m.onnx", "-i", "x.npy", "-o", output, cwd=tmp_path)
        fails(result, 2, f"a file of its own for the output, found {output}, which is read; pass another -o")
        assert (tmp_path / output).read_bytes() == before
    before = (tmp_path / "x.npy").read_bytes()
    for command in (
        ("export", stack.checkpoint, "-o", "x.npy", "-i", "x.npy"),
        ("export", stack.checkpoint, "-o", "x.npy", "--table-dtype", "int8", "--calibration", "x.npy"),
        ("optimize", "m.onnx", "-o", "x.npy", "--table-dtype", "int8", "--calibration", "x.npy"),
    ):
        fails(cli(*command, cwd=tmp_path), 2, "found x.npy, which is read; pass another -o")
    assert (tmp_path / "x.npy").read_bytes() == before


def test_the_reference_evaluator_needs_functions(stack: ExportedStack, tmp_path: Path) -> None:
    model = onnx.load(stack.onnx)
    del model.functions[:]
    onnx.save(model, tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", np.zeros((2, 10), np.float32))
    result = cli("run", "m.onnx", "-i", "x.npy", "-o", "y.npy", "--runtime", "onnx-reference", cwd=tmp_path)
    fails(result, 2, "expected operators that onnx's ReferenceEvaluator has, or their functions in m.onnx")


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
        fails(cli("export", "none/missing.pt", cwd=tmp_path), 2, "found no file none/missing.pt")
        fails(cli("export", ".", cwd=tmp_path), 2, "found the folder .")
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

    def test_a_traceback_keeps_the_exit_code(self, tmp_path: Path) -> None:
        result = cli("--debug", "export", tmp_path / "none.pt")
        assert result.returncode == 2
        assert "Traceback" in result.stderr
        assert "CheckpointError: expected a checkpoint file, found no file" in result.stderr

    def test_a_pickle_of_a_newer_protocol_is_one_line(self, tmp_path: Path) -> None:
        torch.save({"a": Path("x")}, tmp_path / "p4.pt", pickle_protocol=4)
        fails(cli("export", tmp_path / "p4.pt"), 2, "--trust-pickle")

    def test_a_table_that_does_not_fit_in_the_reference_evaluator(
        self, methane: Path, tmp_path: Path
    ) -> None:
        model = onnx.load(methane)
        [table] = [w for w in model.graph.initializer if w.name == "lmkan1.table"]
        array = onnx.numpy_helper.to_array(table)
        table.CopyFrom(onnx.numpy_helper.from_array(array[:-1], table.name))
        onnx.save(model, tmp_path / "misfit.onnx")
        np.save(tmp_path / "x.npy", np.zeros((2, 12), np.float32))
        for runtime in ("onnx-reference", "onnxruntime-function", "onnxruntime"):
            result = cli(
                "run", tmp_path / "misfit.onnx", "-i", tmp_path / "x.npy", "--runtime", runtime, cwd=tmp_path
            )
            fails(result, 2)

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
        fails(cli("verify", methane, "--outputs", tmp_path / "wide.npz"), 2, "--inputs")
        for file in ("methane.state_dict.pt", "methane.pickled.pt"):
            for command in (
                ["inspect"],
                ["run", "-i", "wide.npz"],
                ["bench"],
                ["optimize", "-o", "new.onnx"],
            ):
                result = cli(command[0], DATA / file, *command[1:], cwd=tmp_path)
                fails(
                    result, 2, f"looks like a PyTorch checkpoint; run lmkan-deploy export {DATA / file} first"
                )
        assert not (tmp_path / "outputs.npz").exists()

    def test_models_of_two_inputs(self, tmp_path: Path) -> None:
        text = """<ir_version: 8, opset_import: ["" : 18]>
        g (float[n, 4] left, float[n, 4] right) => (float[n, 4] y) { y = Add (left, right) }"""
        onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
        left, right = np.zeros((3, 4), np.float32), np.zeros((5, 4), np.float32)
        np.save(tmp_path / "x.npy", left)
        np.savez(tmp_path / "one.npz", left=left)
        np.savez(tmp_path / "rows.npz", left=left, right=right)
        np.savez(tmp_path / "wide.npz", left=left, right=right[:, :3])
        for name, fragments in {
            "x.npy": (
                "expected an .npz file with the arrays left, right, found the single array of x.npy",
                "numpy.savez(file, left=..., right=...)",
            ),
            "one.npz": ("expected arrays left, right in one.npz, found left",),
            "rows.npz": ("expected input right float32[n, 4] with n = 3 as in left, found shape [5, 4]",),
            "wide.npz": ("expected input right float32[n, 4], found shape [5, 3]",),
        }.items():
            fails(cli("run", "m.onnx", "-i", name, cwd=tmp_path), 2, *fragments)

    def test_pickled_arrays_are_not_loaded(self, methane: Path, tmp_path: Path) -> None:
        np.savez(tmp_path / "objects.npz", x=np.array([{"a": 1}], dtype=object))
        fails(cli("run", methane, "-i", tmp_path / "objects.npz"), 2, "could not read")

    def test_usage(self, methane: Path) -> None:
        fails(cli("export"), 2, "Missing argument 'CHECKPOINT'", "see lmkan-deploy export --help")
        fails(cli("nonsense"), 2, "'nonsense'", "see lmkan-deploy --help")
        fails(cli("--nonsense"), 2, "--nonsense", "see lmkan-deploy --help")
        fails(cli("run", methane, "--nonsense"), 2, "--nonsense", "see lmkan-deploy run --help")
        fails(cli("inspect", "a" * 300), 2, "File name too long")

    def test_numbers_out_of_range(self, methane: Path, tmp_path: Path) -> None:
        fails(cli("verify", methane, "--seed", -1), 2, "--seed")
        fails(cli("verify", methane, "--batch", -1), 2, "--batch")
        fails(cli("verify", methane, "--batch", 10**12), 2, "--batch")
        fails(cli("verify", methane, "--batch", 2 * 10**9), 2, "expected more memory")
        fails(cli("run", methane, "-i", "x.npy", "--threads", 0), 2, "--threads")
        fails(cli("run", methane, "-i", "x.npy", "--threads", 10**6), 2, "--threads")
        for rtol in ("nan", "inf", "-1"):
            fails(cli("verify", methane, "--rtol", rtol), 2)
            fails(cli("export", *METHANE, "-o", tmp_path / "m.onnx", "--rtol", rtol), 2)
        for opset in (17, 26, 99):
            fails(cli("export", *METHANE, "-o", tmp_path / "m.onnx", "--opset", opset), 2, "--opset")
        assert list(tmp_path.iterdir()) == []

    def test_options_that_would_have_no_effect(self, methane: Path) -> None:
        stored = DATA / "methane.io.npz"
        fails(cli("export", METHANE[0], "--arch-args", "{}"), 2, "expected --arch with --arch-args")
        fails(cli("verify", methane, "--arch", "a:b"), 2, "--checkpoint")
        fails(cli("verify", methane, "--input-shape", "batch,12"), 2, "--checkpoint")
        both = ("-i", stored, "--outputs", stored)
        fails(cli("verify", methane, *both, "-c", METHANE[0]), 2, "--outputs without")
        fails(cli("verify", methane, *both, "--batch", 3), 2, "--outputs without")
        fails(cli("export", *METHANE, "-i", stored, "--no-verify"), 2, "expected --verify with --inputs")
        for options in ((), ("--table-dtype", "float32")):
            calibrated = ("--calibration", stored, *options, "-o", "m.onnx")
            fails(cli("export", *METHANE, *calibrated), 2, "pass --table-dtype or --max-error")
            fails(cli("optimize", methane, *calibrated), 2, "pass --table-dtype or --max-error")
        for name in ("clean-up", "share-tables", "fold-table-transpose"):
            call = ("optimize", methane, "-o", "m.onnx", "--no-passes", name)
            fails(cli(*call), 2, f"found {name}, which every model needs")

    def test_messages_are_one_line(self, tmp_path: Path) -> None:
        fails(cli("inspect", "two\nlines.onnx", cwd=tmp_path), 2, "two lines.onnx")

    def test_defects_are_no_differences(self, stack: ExportedStack) -> None:
        """Python's own exit code, 1, means that answers differ."""
        code = (
            "import sys; from lmkan_deploy import api, cli\n"
            "def broken(path): raise ValueError('a first line.\\nand a second.')\n"
            f"api.inspect = broken; sys.argv[1:] += ['inspect', {str(stack.onnx)!r}]; cli.main()"
        )
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=False)
        fails(
            run([sys.executable, "-c", code]),
            2,
            "error: unexpected ValueError: a first line. and a second; this is a defect of lmkan-deploy: ",
            "run again with --debug and report it",
        )
        debug = run([sys.executable, "-c", code, "--debug"])
        assert debug.returncode == 2
        assert "Traceback" in debug.stderr

    def test_debug(self, tmp_path: Path) -> None:
        traced = cli("--debug", "inspect", tmp_path / "none.onnx")
        assert traced.returncode != 0
        assert "Traceback" in traced.stderr


class TestOutputs:
    """Files appear complete, where the user says, or not at all."""

    @pytest.mark.parametrize("output", ["", ".", "folder/", "none/file", "loop", "/dev/null"])
    def test_places_that_no_file_can_be_written_to(self, output: str, tmp_path: Path) -> None:
        """They are found before anything is read."""
        (tmp_path / "folder").mkdir()
        (tmp_path / "loop").symlink_to("loop")
        for call in (("export", "none.pt"), ("optimize", "none.onnx"), ("run", "none.onnx", "-i", "x.npz")):
            fails(cli(*call, "-o", output, cwd=tmp_path), 2, output.rstrip("/") or ".")
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "loop"]

    def test_a_name_that_means_a_folder(self, tmp_path: Path) -> None:
        for call in (
            ("export", "none.pt"),
            ("optimize", "none.onnx"),
            ("run", "none.onnx", "-i", "x.npz"),
            ("build", "none.onnx"),
            ("plugins", "build", "--tensorrt-include", "none"),
        ):
            fails(cli(*call, "-o", "none/", cwd=tmp_path), 2, "found the folder none/; name a file in it")
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_even_root_can_not_write(self, methane: Path) -> None:
        fails(cli("optimize", methane, "-o", "/proc/file"), 2, "could not write /proc/file")
        inputs = DATA / "methane.io.npz"
        fails(cli("run", methane, "-i", inputs, "-o", "/proc/file.npz"), 2, "could not write /proc/file.npz")

    def test_a_folder_in_the_place_of_the_weights(self, methane: Path, tmp_path: Path) -> None:
        (tmp_path / "m.onnx.data").mkdir()
        call = ("optimize", methane, "-o", tmp_path / "m.onnx", "--external-data")
        fails(cli(*call), 2, "found the folder")
        assert [path.name for path in tmp_path.iterdir()] == ["m.onnx.data"]

    def test_a_full_disk(self, methane: Path, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", np.zeros((5000, 12), np.float32))
        # A write beyond the limit fails like one to a full disk.
        limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))}
        for options in ((), ("--external-data",)):
            result = fresh_cli("optimize", methane, "-o", tmp_path / "m.onnx", *options, **limit)
            fails(result, 2, "could not write", "m.onnx")
        result = fresh_cli("run", methane, "-i", tmp_path / "x.npy", "-o", tmp_path / "y.npy", **limit)
        fails(result, 2, "could not write", "y.npy")
        assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]

    def test_links_are_followed(self, methane: Path, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        for name in ("m.onnx", "y.npz"):
            (tmp_path / name).symlink_to(f"folder/{name}")  # whose target does not exist at first
        inputs = DATA / "methane.io.npz"
        for _ in range(2):
            result = cli("optimize", methane, "-o", "m.onnx", "--external-data", cwd=tmp_path)
            assert result.returncode == 0, result.stderr
            assert cli("run", methane, "-i", inputs, "-o", "y.npz", cwd=tmp_path).returncode == 0
        assert (tmp_path / "m.onnx").is_symlink()
        assert (tmp_path / "y.npz").is_symlink()
        names = sorted(path.name for path in (tmp_path / "folder").iterdir())
        assert names == ["m.onnx", "m.onnx.data", "y.npz"]
        assert cli("inspect", tmp_path / "folder" / "m.onnx").returncode == 0

    def test_the_umask_gives_the_mode(self, methane: Path, tmp_path: Path) -> None:
        umask = {"preexec_fn": lambda: os.umask(0o027)}
        assert fresh_cli("optimize", methane, "-o", tmp_path / "m.onnx", **umask).returncode == 0
        inputs = DATA / "methane.io.npz"
        assert fresh_cli("run", methane, "-i", inputs, "-o", tmp_path / "y.npz", **umask).returncode == 0
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}

    @pytest.mark.parametrize(
        ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
    )
    def test_an_interrupted_export_leaves_nothing(
        self, number: signal.Signals, code: int, tmp_path: Path
    ) -> None:
        (tmp_path / "slow.py").write_text(SLOW)
        torch.save(make_stack(4, 2)[0].state_dict(), tmp_path / "m.pt")
        call = [sys.executable, "-m", "lmkan_deploy.cli", "export", "m.pt", "--arch", "slow:make"]
        process = subprocess.Popen(
            [*call, "--arch-path", "."], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )
        deadline = time.monotonic() + 120
        while not (tmp_path / "waiting").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        assert process.communicate(timeout=60) == (b"", b"")
        assert process.returncode == code
        left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
        assert left == {"m.pt", "slow.py", "waiting"}

    def test_hanging_up_is_ignored_under_nohup(self, stack: ExportedStack, tmp_path: Path) -> None:
        def ignore() -> None:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

        code = (
            "import os, signal, sys; from lmkan_deploy import api, cli; inspect = api.inspect\n"
            "api.inspect = lambda path: os.kill(os.getpid(), signal.SIGHUP) or inspect(path)\n"
            f"sys.argv = ['lmkan-deploy', 'inspect', {str(stack.onnx)!r}]; cli.main()"
        )
        command = [sys.executable, "-c", code]
        run = functools.partial(subprocess.run, command, capture_output=True, cwd=tmp_path, check=False)
        assert [run(preexec_fn=ignore).returncode, run().returncode] == [0, 129]


def test_a_terminal_shows_a_bar(methane: Path) -> None:
    screen, terminal = os.openpty()
    command = [sys.executable, "-m", "lmkan_deploy.cli", "verify", methane]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, env=environment) as process:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal ends
            while data := os.read(screen, 65536):
                shown += data
        os.close(screen)
        assert process.stdout is not None
        result = process.stdout.read().decode()
    assert process.returncode == 0
    assert "━" in shown.decode()
    assert result.startswith("onnxruntime against onnxruntime-function")


class TestStandardStreams:
    """What becomes of stdout and stderr says nothing about the answers."""

    @pytest.mark.parametrize(
        ("arguments", "code"),
        [(("verify",), 0), (("verify", "--json"), 0), (("verify", "--rtol", "0"), 1), (("inspect",), 0)],
    )
    def test_a_reader_that_ends_early(
        self, arguments: tuple[str, ...], code: int, stack: ExportedStack
    ) -> None:
        command = [sys.executable, "-m", "lmkan_deploy.cli", *arguments, stack.onnx]
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "wb") as stdout:
            result = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
        assert (result.returncode, result.stderr) == (code, "")

    @pytest.mark.parametrize(("rtol", "code"), [("1e-3", 0), ("0", 1)])
    @pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
    def test_closed_streams(
        self, closed: tuple[int, ...], rtol: str, code: int, stack: ExportedStack
    ) -> None:
        def close() -> None:
            for number in closed:
                os.close(number)

        result = fresh_cli("verify", stack.onnx, "--rtol", rtol, preexec_fn=close)
        assert (result.returncode, result.stderr) == (code, "")
        assert ("comparisons" in result.stdout) == (1 not in closed)

    def test_characters_that_the_terminal_has_not(self, stack: ExportedStack, tmp_path: Path) -> None:
        model = tmp_path / "größe.onnx"
        shutil.copy(stack.onnx, model)
        ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
        for command in ("inspect", "verify"):
            result = fresh_cli(command, model, env=ascii_only)
            assert (result.returncode, result.stderr) == (0, "")
            assert result.stdout.isascii()
        assert "gr??e.onnx" in fresh_cli("inspect", model, env=ascii_only).stdout

    def test_a_mistake_that_nobody_reads(self, tmp_path: Path) -> None:
        assert fresh_cli("inspect", tmp_path / "none", preexec_fn=lambda: os.close(2)).returncode == 2
        with Path("/dev/full").open("w") as full:
            command = [sys.executable, "-m", "lmkan_deploy.cli", "inspect", tmp_path / "none"]
            assert subprocess.run(command, stderr=full, check=False).returncode == 2

    def test_a_full_disk_for_the_result(self, stack: ExportedStack) -> None:
        with Path("/dev/full").open("w") as full:
            command = [sys.executable, "-m", "lmkan_deploy.cli", "inspect", stack.onnx]
            result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        fails(result, 2, "No space left on device")


SLOW = """
import pathlib, time
from lmkan_deploy.nn import LMKAN2DLayer

class Slow(LMKAN2DLayer):
    def forward(self, x):
        if any(pathlib.Path().glob(".lmkan-*/*.onnx")):  # the model is staged, and being verified
            pathlib.Path("waiting").touch()
            time.sleep(100)
        return super().forward(x)

def make():
    return Slow(6, 4, 2)
"""


TALKATIVE = """
import logging, sys, warnings
import torch
from lmkan_deploy.nn import LMKAN2DLayer

class Talkative(LMKAN2DLayer):
    def forward(self, x):
        print("a print")
        return super().forward(x)

class Branching(LMKAN2DLayer):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else -y
"""


def test_stderr_of_a_network_that_depends_on_its_data(tmp_path: Path) -> None:
    (tmp_path / "talk.py").write_text(TALKATIVE)
    torch.save(make_stack(4, 2)[0].state_dict(), tmp_path / "m.pt")
    call = ("m.pt", "--arch", "talk:Branching", "--arch-path", ".", "--arch-args", "[6, 4, 2]")
    fails(cli("export", *call, cwd=tmp_path), 2, "the rows of x float32[batch, 4] depend on each other")
    call = (*call, "--input-shape", "batch,4")
    fails(cli("export", *call, cwd=tmp_path), 2, "could not trace")
    debug = cli("--debug", "export", *call, cwd=tmp_path).stderr
    assert "torch.ops.lmkan.lookup2d" in debug
    assert "Traceback" in debug


def test_what_a_network_prints_is_no_part_of_the_result(tmp_path: Path) -> None:
    (tmp_path / "talk.py").write_text(TALKATIVE)
    torch.save(make_stack(4, 2)[0].state_dict(), tmp_path / "m.pt")
    call = ("m.pt", "--arch", "talk:Talkative", "--arch-path", ".", "--arch-args", "[6, 4, 2]")
    result = cli("export", *call, "--json", cwd=tmp_path)
    assert json.loads(result.stdout)["verification"]["passed"] is True
    assert set(result.stderr.splitlines()) == {"a print"}


def test_names_with_brackets(tmp_path: Path) -> None:
    """Brackets are markup to rich."""
    torch.save(make_stack(4, 2).state_dict(), tmp_path / "[red]m[bold].pt")
    result = cli("export", "[red]m[bold].pt", "-o", "[bold]m.onnx", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("[bold]m.onnx  ")
    assert " from an inferred stack, read as weights only\n" in result.stdout
    model = onnx.load(tmp_path / "[bold]m.onnx")
    next(node for node in model.graph.node if node.op_type == "LMKAN2D").name = "[/]layer"
    for node in model.graph.node:
        node.output[:] = ["[b]y" if name == "y" else name for name in node.output]
    model.graph.output[0].name = "[b]y"
    onnx.save(model, tmp_path / "[i]m.onnx")
    inspected = cli("inspect", "[i]m.onnx", cwd=tmp_path).stdout
    assert inspected.startswith("[i]m.onnx  ")
    assert "[/]layer" in inspected
    assert "[red]m[bold].pt" in inspected
    assert "[b]y" in cli("verify", "[i]m.onnx", cwd=tmp_path).stdout
    assert cli("optimize", "[i]m.onnx", "-o", "[u]m.onnx", cwd=tmp_path).stdout.startswith("[u]m.onnx  ")
    fails(cli("inspect", "[red]none", cwd=tmp_path), 2, "[red]none")


def test_long_paths_stay_on_one_line(stack: ExportedStack, tmp_path: Path) -> None:
    path = tmp_path / f"{'long' * 30}.onnx"
    assert cli("optimize", stack.onnx, "-o", path).stdout.startswith(f"{path}  ")


def test_json_has_no_nan(methane: Path, tmp_path: Path) -> None:
    stored = dict(np.load(DATA / "methane.io.npz"))
    stored["y"][3, 0] = np.nan
    np.savez(tmp_path / "y.npz", **stored)
    result = cli("verify", methane, "-i", tmp_path / "y.npz", "--outputs", tmp_path / "y.npz", "--json")
    assert result.returncode == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    comparison = json.loads(result.stdout, parse_constant=refuse)["comparisons"][0]
    assert comparison["max_abs"] == "Infinity"
    assert comparison["first_bad_values"][0] == "NaN"


def test_axes_of_several_names_have_several_sizes(tmp_path: Path) -> None:
    torch.save(make_stack(4, 2)[0].state_dict(), tmp_path / "m.pt")
    arch = ("--arch", "lmkan_deploy.nn:LMKAN2DLayer", "--arch-args", "[6, 4, 2]")
    result = cli("export", "m.pt", *arch, "--input-shape", "batch,time,4", "--json", cwd=tmp_path)
    comparisons = json.loads(result.stdout)["verification"]["comparisons"]
    assert [c["case"] for c in comparisons[::2]] == [
        "random 1 x 2",
        "random 2 x 7",
        "random 7 x 64",
        "random 64 x 1",
    ]


def test_the_range_of_opsets(stack: ExportedStack, tmp_path: Path) -> None:
    text = " ".join(cli("export", "--help").stdout.split())
    assert f"[18 to {api.MAX_OPSET}]" in text
    needs_opset(api.MAX_OPSET)
    path = tmp_path / "m.onnx"
    result = cli("export", stack.checkpoint, "-o", path, "--opset", api.MAX_OPSET)
    assert result.returncode == 0, result.stderr
    assert {entry.domain: entry.version for entry in onnx.load(path).opset_import}[""] == api.MAX_OPSET


def commands() -> dict[str, Any]:
    """Every command by what is typed for it."""
    plugins = command_line.plugins.registered_commands
    found = {c.callback.__name__: c.callback for c in command_line.app.registered_commands}
    return found | {f"plugins {c.name}": c.callback for c in plugins}


@functools.cache
def help_of(command: str, columns: int) -> str:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setenv("COLUMNS", str(columns))
        arguments = [*command.split(), "--help"]
        command_line.app(arguments, prog_name="lmkan-deploy", standalone_mode=False)
    return output.getvalue()


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("command", commands())
def test_examples_in_the_help_can_be_copied(command: str, columns: int) -> None:
    """They are shown as they are written, whatever the width, and their options exist."""
    text = help_of(command, columns)
    source = inspect.cleandoc(commands()[command].__doc__)
    written = re.findall(r"^    .*(?:\n    .*)*", source, re.MULTILINE)
    assert written
    for example in written:
        shown = re.sub("^", "  ", example, flags=re.MULTILINE)
        assert f"\n\n{shown}\n" in text
        assert max(map(len, shown.splitlines())) <= 80
        if "trtexec" in example:
            continue
        for option in re.findall(r" (--?[a-z][a-z-]*)", example):
            assert re.search(rf"^ +(.*, )?{option}[ ,]", text, re.MULTILINE), option


@pytest.mark.parametrize("command", ["", "plugins", *commands()])
def test_the_help_is_plain(command: str) -> None:
    """Without what typer thinks of types, and without words that break at hyphens."""
    widths = []
    for columns in (60, 80, 120):
        text = help_of(command, columns)
        widths.append(max(map(len, text.splitlines())))
        assert not re.search(r"[{<]\w+\W*[}>]|<=|>=|\[\[|-$|…|\N{NON-BREAKING HYPHEN}", text, re.MULTILINE)
        if "Commands:" in text and columns > 60:
            assert "..." not in text.split("Commands:")[1]
    assert widths[0] <= 80
    assert widths[1] <= 80
    if command not in ("", "plugins", "inspect"):
        assert 80 < widths[2] <= 120


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("export --table-dtype ", ["float32", "float16", "bfloat16", "int8"]),
        ("optimize m.onnx --passes fold-l", ["fold-linear-branch"]),
        ("optimize m.onnx --no-passes s", ["sink-transposes", "simplify-layout"]),
        ("run m.onnx --runtime onnxruntime-", ["onnxruntime-function", "onnxruntime-cuda"]),
        ("verify m.onnx --runtime onnx-", ["onnx-reference"]),
        ("bench m.onnx --runtime onnx-", ["onnx-reference"]),
        ("serve m.onnx --runtime onnx-", ["onnx-reference"]),
        ("serve m.onnx --log-format ", ["text", "json"]),
        ("build m.onnx --runtime ", ["tensorrt", "tensorrt-rtx"]),
        ("package m.onnx --format triton", ["triton", "triton-python"]),
        ("plugins path tensor", ["tensorrt"]),
        ("ver", ["verify"]),
    ],
)
def test_the_shell_completes_values(words: str, found: list[str]) -> None:
    position = len(words.split()) + words.endswith(" ")
    environment = {
        "_LMKAN_DEPLOY_COMPLETE": "complete_bash",
        "COMP_WORDS": f"lmkan-deploy {words}",
        "COMP_CWORD": str(position),
    }
    result = cli(env={**os.environ, **environment})
    assert result.stderr == ""
    assert result.stdout.split() == found


def test_the_help_of_the_server_says_what_cuda_graphs_do() -> None:
    text = " ".join(cli("serve", "--help").stdout.split())
    assert "--cuda-graphs Run engines with CUDA graphs" in text
    assert "padded with rows of zeros to the next of few sizes (1, 2, 3, 4, 6, 8, 12, ...)" in text


def test_help_has_an_example_for_every_command() -> None:
    overview = cli("--help").stdout
    for command in ("export", "verify", "run", "inspect"):
        assert command in overview
        assert f"lmkan-deploy {command} model" in cli(command, "--help").stdout


def test_no_usage_data_is_sent(stack: ExportedStack, tmp_path: Path) -> None:
    """ONNX Runtime keeps what it is about to send in the home folder; where CI is set it sends nothing anyway."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")
    }
    assert cli("verify", stack.onnx, env={**environment, "HOME": str(tmp_path)}).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_launcher_in_the_checkout() -> None:
    command = [sys.executable, "cli.py", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.startswith("lmkan-deploy ")
    assert (ROOT / "converters" / "torch_to_onnx.py").is_file()


def test_outputs_of_another_format_are_refused(stack: ExportedStack, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 10), np.float32))
    result = cli("run", stack.onnx, "-i", tmp_path / "x.npy", "-o", tmp_path / "y.csv")
    assert (result.returncode, result.stderr) == (
        2, f"error: expected an output that ends in .npz or .npy, found {tmp_path / 'y.csv'}\n"
    )  # fmt: skip
    assert not (tmp_path / "y.csv").exists()


def test_what_was_compared_is_named(stack: ExportedStack, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 10), np.float32))
    output = cli("export", stack.checkpoint, "-o", tmp_path / "m.onnx").stdout
    assert "verified onnxruntime against PyTorch on random inputs: largest relative error" in output
    assert "note: assumed no layers without weights, such as activations" in output
    output = cli("export", stack.checkpoint, "-o", tmp_path / "m.onnx", "-i", tmp_path / "x.npy").stdout
    assert "verified onnxruntime against PyTorch on random and given inputs: largest" in output


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_tables_fit_the_terminal(columns: int, stack: ExportedStack) -> None:
    terminal = {**os.environ, "COLUMNS": str(columns)}
    shown = cli("inspect", stack.onnx, env=terminal).stdout
    assert re.search(r"^ layer +N_in +N_out +G +parameters +table +type +mult-adds", shown, re.MULTILINE)
    assert re.search(r"^ total +", shown, re.MULTILINE)
    for name in ("kind", "SHA-256", "PyTorch", "onnx", "lmkan-deploy"):
        assert re.search(rf"^{name}  ", shown, re.MULTILINE), name
    sha256 = hashlib.sha256(stack.checkpoint.read_bytes()).hexdigest()
    assert sha256 in "".join(shown.split())
    failing = cli("verify", stack.onnx, "--rtol", 0, env=terminal).stdout
    header = " inputs +output +max abs +p99 abs +max rel +p99 rel +allowed"
    assert len(re.findall(f"^{header}", failing, re.MULTILINE)) == 1
    assert re.search("0.0e[+]00 +FAIL", failing)
    tables = [line for line in (shown + failing).splitlines() if line.startswith(" ") and ": " not in line]
    assert max(map(len, tables)) <= columns
    assert "…" not in shown + failing


def test_what_is_said_of_narrow_tables(stack: ExportedStack, tmp_path: Path) -> None:
    narrow = tmp_path / "int8.onnx"
    hint = "random inputs may lie far outside of a network's data: --calibration measures on yours\n"
    assert hint in cli("optimize", stack.onnx, "-o", narrow, "--table-dtype", "int8").stdout
    np.save(tmp_path / "x.npy", np.zeros((3, 10), np.float32))
    call = ("-i", tmp_path / "x.npy", "--rtol", 1e-9)
    failing = cli("verify", narrow, "--reference", stack.onnx, *call).stdout
    assert failing.endswith("int8 tables round, and networks amplify it: --rtol allows more\n")
    np.save(tmp_path / "y.npy", lmkan_deploy.run(stack.onnx, {"x": np.zeros((3, 10), np.float32)})["y"])
    one = ("-i", tmp_path / "x.npy", "--outputs", tmp_path / "y.npy", "--runtime", "onnxruntime")
    assert cli("verify", stack.onnx, *one).stdout.endswith("\nthe comparison passed\n")
    assert "the comparison failed\n" in cli("verify", narrow, *one, "--rtol", 1e-9).stdout
