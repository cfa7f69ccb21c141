"""Timing of models side by side."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, save

import lmkan_deploy
from cli_process import cli
from lmkan_deploy import report
from lmkan_deploy.errors import InputError, LmkanError
from lmkan_deploy.latency import Contender, measure
from lmkan_deploy.runtime.axis_limits import AxisLimits
from lmkan_deploy.runtime.tensors import Arrays, TensorSpec
from networks import ExportedStack


def bench(*arguments: object) -> str:
    result = cli("bench", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


class Sleeper:
    """A model that takes a known time, and keeps its inputs."""

    def __init__(self, seconds: float, shape: tuple[int | str | None, ...] = ("batch", 4)) -> None:
        self.name = f"sleeper {seconds}"
        self.inputs = [TensorSpec("x", shape, "float32")]
        self.outputs = [TensorSpec("y", shape, "float32")]
        self.seconds = seconds
        self.feeds: list[Arrays] = []
        self.times: list[float] = []
        self.collects: list[bool] = []

    def run(self, feeds: Arrays) -> Arrays:
        self.collects.append(gc.isenabled())
        self.feeds.append(feeds)
        self.times.append(time.perf_counter())
        time.sleep(self.seconds)
        return {"y": feeds["x"]}


def test_times_are_those_of_the_calls() -> None:
    fast, slow = Sleeper(0.001), Sleeper(0.004)
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
    assert len({feeds["x"].tobytes() for feeds in fast.feeds}) == 16
    assert all(feeds["x"].shape == (3, 4) for feeds in fast.feeds)
    assert fast.times[-1] > slow.times[-10]
    assert not any(fast.collects[1:])  # but for the first try


@pytest.mark.parametrize("shape", [(7, 4), (None, 4), ("batch", "length"), ()], ids=str)
def test_free_and_fixed_axes(shape: tuple[int | str | None, ...]) -> None:
    model, free = Sleeper(0.0001, shape), Sleeper(0.0001)
    contenders = [Contender("m", model, None, {}), Contender("free", free, None, {})]
    found = measure(contenders, [2, 5, 2], seconds=0.01, seed=0)
    assert [each.asked for each in found] == [2, 2, 5, 5]
    batches = {(7, 4): [7, 7], (): [1, 1]}.get(shape, [2, 5])
    assert [each.batch for each in found] == [batches[0], 2, batches[1], 5]
    want = {(7, 4): {(7, 4)}, (): {()}, ("batch", "length"): {(2, 8), (5, 8)}}.get(shape, {(2, 4), (5, 4)})
    assert {feeds["x"].shape for feeds in model.feeds} == want


def test_limits_of_axes() -> None:
    model = Sleeper(0.0001)
    found = measure(
        [Contender("m", model, None, {"batch": AxisLimits(2, 16)})], [1, 100], seconds=0.01, seed=0
    )
    assert [(each.asked, each.batch) for each in found] == [(1, 2), (100, 16)]


def test_a_slow_model_is_called_as_often_as_rounds_need() -> None:
    model = Sleeper(0.05)
    [found] = measure([Contender("m", model, None, {})], [1], seconds=0.01, seed=0)
    assert found.calls == 5
    assert len(model.times) == 7


class Refusing(Sleeper):
    """Takes small batches alone."""

    def run(self, feeds: Arrays) -> Arrays:
        if len(feeds["x"]) > 10:
            raise InputError("expected 10 rows at most")
        return super().run(feeds)


def test_a_model_that_fails_does_so_before_anything_is_timed() -> None:
    first, second = Sleeper(0.001), Refusing(0.001)
    contenders = [Contender("a", first, None, {}), Contender("b", second, None, {})]
    with pytest.raises(InputError, match="b, random batch of 100: expected 10 rows at most; pass --inputs"):
        measure(contenders, [1, 100], seconds=1, seed=0)
    assert [len(first.times), len(second.times)] == [2, 1]


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
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
    assert (found.asked, found.batch) == (None, 5)
    for wrong in ({"x": x[:, :4]}, {"z": x}, {"x": x[0, 0]}):
        with pytest.raises(InputError, match=r"model\.onnx, given inputs: expected .*x.*found"):
            lmkan_deploy.bench(stack.onnx, inputs=wrong, seconds=0.01)


def test_mistakes_of_the_call(stack: ExportedStack, tmp_path: Path) -> None:
    for options, message in (
        ({"models": []}, "at least one model"),
        ({"runtimes": ()}, "at least one model"),
        ({"batch_sizes": -1}, "batches of at least 1 row, found -1"),
        ({"runtimes": "onnxruntime-x"}, "found 'onnxruntime-x'"),
        ({"cuda_graphs": True}, "expected an engine with CUDA graphs"),
        ({"plugin": "p.so"}, "expected an engine with a plugin"),
        ({"device": 3}, "with GPU 3"),
    ):
        with pytest.raises(LmkanError, match=message):
            lmkan_deploy.bench(**{"models": stack.onnx, "seconds": 0.01, **options})
    save_model("Gather", TensorProto.FLOAT, tmp_path / "gather.onnx")
    with pytest.raises(InputError, match=r"gather\.onnx, random batch of 3: .*idx=1.*; pass --inputs"):
        lmkan_deploy.bench(tmp_path / "gather.onnx", batch_sizes=3, seconds=0.01)
    save_model("Identity", TensorProto.STRING, tmp_path / "text.onnx")
    with pytest.raises(LmkanError, match=r"tensors of numbers, found x, a tensor\(string\)"):
        lmkan_deploy.bench(tmp_path / "text.onnx", seconds=0.01)


@pytest.mark.parametrize("dtype", ["UINT16", "UINT32", "UINT64", "BOOL", "BFLOAT16"])
def test_types(dtype: str, tmp_path: Path) -> None:
    save_model("Identity", getattr(TensorProto, dtype), tmp_path / "m.onnx")
    [found] = lmkan_deploy.bench(tmp_path / "m.onnx", batch_sizes=3, seconds=0.01)
    assert found.batch == 3


def save_model(op_type: str, dtype: int, path: Path) -> None:
    """Passes x through, or takes its rows out of a single one."""
    x = helper.make_tensor_value_info("x", TensorProto.INT64 if op_type == "Gather" else dtype, ["batch"])
    y = helper.make_tensor_value_info("y", dtype, None)
    table = helper.make_tensor("table", TensorProto.FLOAT, [1], [0.0])
    names, weights = (["table", "x"], [table]) if op_type == "Gather" else (["x"], [])
    graph = helper.make_graph([helper.make_node(op_type, names, ["y"])], "m", [x], [y], weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


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
            Latency("a.onnx", "onnxruntime", 1, 1, 9, **times, rows_per_second=1234.5, ratio=None),
            Latency(
                "b.onnx", "onnxruntime", 1, 64, 9, **times, rows_per_second=2.5e6, ratio=(1.5, 1.25, 20.51)
            ),
        ]
    )
    out = capsys.readouterr().out
    for text in (
        "4.57 µs",
        "1.23 ms",
        "2.5 s",
        "1.23 k",
        "2.5 M",
        "1.50 (1.25 to 20.5)",
        "batch 1 ",
        "batch 64",
    ):
        assert text in out
