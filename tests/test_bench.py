"""Timing of models side by side."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import lmkan_deploy
from lmkan_deploy import report
from lmkan_deploy.errors import InputError, LmkanError
from lmkan_deploy.latency import Contender, measure
from lmkan_deploy.runtime.tensors import Arrays, TensorSpec
from networks import ExportedStack


def bench(*arguments: object) -> str:
    command = [sys.executable, "-m", "lmkan_deploy.cli", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


class Sleeper:
    """A model that takes a known time, and keeps its inputs."""

    def __init__(self, seconds: float, shape: tuple[int | str | None, ...] = ("batch", 4)) -> None:
        self.name = f"sleeper {seconds}"
        self.inputs = [TensorSpec("x", shape, "float32")]
        self.outputs = [TensorSpec("y", shape, "float32")]
        self.seconds = seconds
        self.feeds: list[Arrays] = []
        self.times: list[float] = []

    def run(self, feeds: Arrays) -> Arrays:
        assert not gc.isenabled()
        self.feeds.append(feeds)
        self.times.append(time.perf_counter())
        time.sleep(self.seconds)
        return {"y": feeds["x"]}


def test_times_are_those_of_the_calls() -> None:
    fast, slow = Sleeper(0.002), Sleeper(0.008)
    found = measure(
        [Contender("a", fast, None, {}), Contender("b", slow, None, {})], [3], seconds=0.3, seed=0
    )
    assert gc.isenabled()
    assert [(each.model, each.runtime, each.batch) for each in found] == [
        ("a", fast.name, 3),
        ("b", slow.name, 3),
    ]
    for latency, sleeper in zip(found, (fast, slow), strict=True):
        assert latency.calls >= 10
        assert sleeper.seconds <= latency.least <= latency.median <= latency.p90 <= latency.p99
        assert latency.least < 1.5 * sleeper.seconds
        assert latency.rows_per_second <= 3 / sleeper.seconds
    assert found[0].ratio is None
    ratio, low, high = found[1].ratio or (0, 0, 0)
    assert 2 < low <= ratio <= high < 4.5
    # Calls go through different inputs of the asked size, and models take turns to the end.
    assert len({feeds["x"].tobytes() for feeds in slow.feeds}) == 16
    assert all(feeds["x"].shape == (3, 4) for feeds in fast.feeds)
    assert fast.times[-1] > slow.times[-10]


@pytest.mark.parametrize("shape", [(7, 4), (None, 4), ("batch", "batch")], ids=str)
def test_free_and_fixed_axes(shape: tuple[int | str | None, ...]) -> None:
    model = Sleeper(0.0001, shape)
    found = measure([Contender("m", model, None, {})], [2, 5], seconds=0.01, seed=0)
    free = not isinstance(shape[0], int)
    assert [each.batch for each in found] == ([2, 5] if free else [1, 1])
    want = (
        {(2, shape[1] if shape[1] == 4 else 2), (5, shape[1] if shape[1] == 4 else 5)} if free else {(7, 4)}
    )
    assert {feeds["x"].shape for feeds in model.feeds} == want


def test_limits_of_axes() -> None:
    model = Sleeper(0.0001)
    found = measure([Contender("m", model, None, {"batch": (2, 16)})], [1, 100], seconds=0.01, seed=0)
    assert [each.batch for each in found] == [2, 16]


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_no_time(seconds: float) -> None:
    with pytest.raises(InputError, match="expected a time above 0 seconds"):
        measure([Contender("m", Sleeper(0), None, {})], [1], seconds=seconds, seed=0)


def test_the_operator_beside_the_function_and_another_network(stack: ExportedStack, tmp_path: Path) -> None:
    dense = torch.nn.Sequential(torch.nn.Linear(10, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6)).eval()
    torch.onnx.export(
        dense, (torch.zeros(2, 10),), tmp_path / "dense.onnx", dynamic_shapes=({0: "n"},), verbose=False
    )
    found = lmkan_deploy.bench(
        [tmp_path / "dense.onnx", stack.onnx],
        runtimes=["onnxruntime", "onnxruntime-function"],
        batch_sizes=[1, 512],
        threads=1,
        seconds=0.05,
    )
    assert [(each.batch, Path(each.model).name, each.runtime) for each in found] == [
        (batch, name, runtime)
        for batch in (1, 512)
        for name in ("dense.onnx", stack.onnx.name)
        for runtime in ("onnxruntime", "onnxruntime-function")
    ]
    operator, function = found[6], found[7]
    assert function.median > 2 * operator.median


def test_given_inputs(stack: ExportedStack) -> None:
    x = np.zeros((5, 10), np.float32)
    [found] = lmkan_deploy.bench(stack.onnx, inputs={"x": x}, batch_sizes=[1, 2], seconds=0.01)
    assert found.batch == 5
    with pytest.raises(LmkanError, match=r"expected input x .*10.*found"):
        lmkan_deploy.bench(stack.onnx, inputs={"x": x[:, :4]}, seconds=0.01)


def test_command_line(stack: ExportedStack, tmp_path: Path) -> None:
    out = bench(stack.onnx, stack.onnx, "--batch", 4, "--seconds", 0.02, "--json")
    first, second = json.loads(out)
    assert first["batch"] == second["batch"] == 4
    assert first["ratio"] is None
    assert len(second["ratio"]) == 3
    np.save(tmp_path / "x.npy", np.zeros((3, 10), np.float32))
    out = bench(stack.onnx, "-i", tmp_path / "x.npy", "--seconds", 0.02)
    assert "batch 3" in out
    assert "median" in out


def test_times_are_readable(capsys: pytest.CaptureFixture[str]) -> None:
    from lmkan_deploy.latency import Latency

    times = {"least": 1e-6, "median": 4.567e-6, "p90": 1.234e-3, "p99": 2.5}
    report.print_latencies(
        [
            Latency("a.onnx", "onnxruntime", 1, 9, **times, rows_per_second=1234.5, ratio=None),
            Latency("b.onnx", "onnxruntime", 1, 9, **times, rows_per_second=2.5e6, ratio=(1.5, 1.25, 20.51)),
        ]
    )
    out = capsys.readouterr().out
    for text in ("4.57 µs", "1.23 ms", "2.5 s", "1.23 k", "2.5 M", "1.50 (1.25 to 20.5)"):
        assert text in out
