"""The runner of engines: on an emulated GPU for what happens between Python and TensorRT, and on a real one."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

import lmkan_deploy
from emulated_gpu import COMPUTE_CAPABILITY, Context, emulated_gpu
from lmkan_deploy import cli as command_line
from lmkan_deploy.engines.build import build_engine
from lmkan_deploy.engines.device import compute_capability
from lmkan_deploy.engines.lane import MAX_GRAPHS
from lmkan_deploy.engines.manifest import Manifest, manifest_path
from lmkan_deploy.engines.profiles import Profile, ShapeRange
from lmkan_deploy.engines.runner import MAX_IDLE_LANES, EngineRunner
from lmkan_deploy.errors import EngineError, InputError, LibraryError, ModelError
from lmkan_deploy.serving.batching import BatchingOptions
from lmkan_deploy.serving.metrics import Metrics
from lmkan_deploy.serving.models import ModelStore
from lmkan_deploy.staging import file_sha256
from networks import ExportedStack
from served import Served, json_request

LARGEST = 64
PADDED_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def gpu(request: pytest.FixtureRequest, stack: ExportedStack, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A GPU with an engine on it."""
    profiles = [{"x": ShapeRange((1, 10), (8, 10), (LARGEST, 10))}]
    with engine_on_gpu(tmp_path / "m.engine", stack.onnx, profiles, request.param) as found:
        yield found


@contextlib.contextmanager
def engine_on_gpu(
    path: Path, model: Path, profiles: Sequence[Profile], runtime: str
) -> Iterator[SimpleNamespace]:
    path.write_bytes(b"engine")
    of_model = lmkan_deploy.load_runner(model)
    manifest = Manifest(
        runtime=runtime,
        runtime_version="10.14.1",
        cuda_version=13000,
        compute_capability=COMPUTE_CAPABILITY,
        plugin_sha256=None,
        model="model.onnx",
        model_sha256="0" * 64,
        engine_sha256=file_sha256(path),
        profiles=list(profiles),
        axes={spec.name: spec.shape for spec in (*of_model.inputs, *of_model.outputs)},
        lookup_layers=2,
    )
    manifest_path(path).write_text(json.dumps(manifest.to_json()))
    with emulated_gpu(runtime, model, profiles) as (trt, driver):
        yield SimpleNamespace(
            path=path, trt=trt, driver=driver, memory=trt.cuda.memory, runtime=runtime, model=trt.model
        )


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, count]).standard_normal((count, 10)).astype(np.float32)


def check(runner: lmkan_deploy.Runner, model: lmkan_deploy.Runner, x: np.ndarray, rtol: float = 1e-6) -> None:
    expected = model.run({"x": x})["y"]
    y = runner.run({"x": x})["y"]
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(y, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_values(cuda_graphs: bool, gpu: SimpleNamespace) -> None:
    runner = lmkan_deploy.load_runner(gpu.path, cuda_graphs=cuda_graphs)
    assert (runner.name, [str(s) for s in runner.inputs]) == (gpu.runtime, ["x float32[batch, 10]"])
    # Smaller batches after larger ones; shapes that come back with other values; batches that are split.
    for seed, count in enumerate([7, 64, 1, 7, 7, 63, 65, 200, 64, 0, 1]):
        check(runner, gpu.model, rows(count, seed))
    check(runner, gpu.model, np.asfortranarray(rows(9)))
    with pytest.raises(InputError, match=r"expected input x float32\[batch, 10\]"):
        runner.run({"x": rows(3)[:, :9]})


def test_graphs_are_launched_from_the_second_run_of_a_shape(gpu: SimpleNamespace) -> None:
    runner = lmkan_deploy.load_runner(gpu.path, cuda_graphs=True)
    for count in (4, 5, 4, 5, 4):
        check(runner, gpu.model, rows(count))
    captures = gpu.runtime == "tensorrt"
    assert gpu.trt.contexts == [None if captures else "whole graph"] * 2
    assert len(gpu.driver.graphs) == (2 if captures else 0)
    if captures:
        # Launches alone: TensorRT would refuse a run now.
        gpu.trt.refuses = lambda _: True
        check(runner, gpu.model, rows(5, seed=1))


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_memory_stays_bounded(cuda_graphs: bool, gpu: SimpleNamespace) -> None:
    runner = lmkan_deploy.load_runner(gpu.path, cuda_graphs=cuda_graphs)
    for repetition in range(2):
        for count in range(1, MAX_GRAPHS + 6):
            check(runner, gpu.model, rows(count, repetition))
    # The input and the output of each shape, and what the contexts share.
    assert gpu.memory.allocations == 1 + (2 * MAX_GRAPHS if cuda_graphs else 2)
    assert len(gpu.driver.graphs) == (MAX_GRAPHS if cuda_graphs and gpu.runtime == "tensorrt" else 0)
    del runner
    gc.collect()
    assert (gpu.memory.allocations, gpu.driver.graphs) == (0, set())


@pytest.mark.parametrize("gpu", ["tensorrt"], indirect=True)
def test_the_shape_that_was_not_used_for_longest_makes_room(gpu: SimpleNamespace) -> None:
    runner = lmkan_deploy.load_runner(gpu.path, cuda_graphs=True)

    def made(count: int) -> bool:
        before = len(gpu.trt.contexts)
        check(runner, gpu.model, rows(count))
        return len(gpu.trt.contexts) > before

    assert all(made(count) for count in range(1, MAX_GRAPHS + 1))
    assert not made(1)
    assert made(MAX_GRAPHS + 1)  # in the place of 2
    assert not made(1)
    assert not made(3)
    assert not made(MAX_GRAPHS + 1)
    assert made(2)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_threads_share_nothing(cuda_graphs: bool, gpu: SimpleNamespace) -> None:
    runner = lmkan_deploy.load_runner(gpu.path, cuda_graphs=cuda_graphs)
    barrier = threading.Barrier(4)

    def work(thread: int) -> None:
        barrier.wait()
        for step in range(30):
            check(runner, gpu.model, rows(1 + (step + thread) % 5, thread))

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, thread) for thread in range(4)]:
            future.result()


def in_a_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_burst_leaves_few_lanes(cuda_graphs: bool, gpu: SimpleNamespace) -> None:
    burst = MAX_IDLE_LANES + 3
    runner = lmkan_deploy.load_runner(gpu.path, cuda_graphs=cuda_graphs)
    barrier = threading.Barrier(burst, timeout=20)
    gpu.trt.refuses = lambda captured: not captured and barrier.wait() < 0  # runs all at the same time
    with ThreadPoolExecutor(burst) as pool:
        for answer in pool.map(lambda seed: (seed, runner.run({"x": rows(2, seed)})["y"]), range(burst)):
            expected = gpu.model.run({"x": rows(2, answer[0])})["y"]
            np.testing.assert_allclose(answer[1], expected, rtol=1e-6, atol=1e-6)
    # An input and an output each, and what contexts share.
    assert gpu.memory.allocations == MAX_IDLE_LANES * 3


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_inputs_without_axes(cuda_graphs: bool, tmp_path: Path) -> None:
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Mul", ["x", "scale"], ["y"])],
        "scaled",
        [
            onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 3]),
            onnx.helper.make_tensor_value_info("scale", onnx.TensorProto.FLOAT, []),
        ],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 3])],
    )
    opsets = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    profiles = [{"x": ShapeRange((1, 3), (1, 3), (4, 3)), "scale": ShapeRange((), (), ())}]
    with engine_on_gpu(tmp_path / "m.engine", tmp_path / "m.onnx", profiles, "tensorrt") as gpu:
        runner = lmkan_deploy.load_runner(gpu.path, cuda_graphs=cuda_graphs)
        x = np.arange(6, dtype=np.float32).reshape(2, 3)
        for scale in (2, 3):
            y = runner.run({"x": x, "scale": np.array(scale, np.float32)})["y"]
            np.testing.assert_array_equal(y, scale * x)


@pytest.mark.parametrize("name", ["x", "y"])
def test_refused_memory(name: str, gpu: SimpleNamespace) -> None:
    runner = lmkan_deploy.load_runner(gpu.path)
    gpu.trt.unknown_tensors = {name}
    with pytest.raises(EngineError, match=f"TensorRT refused the memory of {name}"):
        runner.run({"x": rows(3)})


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_thread_goes_on_with_what_another_one_made(cuda_graphs: bool, gpu: SimpleNamespace) -> None:
    runner = in_a_thread(lambda: lmkan_deploy.load_runner(gpu.path, cuda_graphs=cuda_graphs))
    held = [runner]
    for seed in range(3):
        in_a_thread(partial(check, runner, gpu.model, rows(5, seed)))
    check(runner, gpu.model, rows(5, 3))
    assert len(gpu.trt.contexts) == 1
    del runner
    in_a_thread(held.clear)
    assert (gpu.memory.allocations, gpu.driver.graphs) == (0, set())


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_padded_batches(cuda_graphs: bool, gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[np.ndarray] = []
    run = gpu.trt.model.run
    runner = EngineRunner(gpu.path, cuda_graphs=cuda_graphs, pad_batches=True)
    assert runner.batch_sizes == PADDED_SIZES
    for count in (64, 33, 5, 5, 1, 0, 64, 65, 133, 7, 63):
        ran.clear()
        monkeypatch.setattr(gpu.trt.model, "run", lambda feeds: ran.append(feeds["x"]) or run(feeds))
        x = rows(count)
        y = runner.run({"x": x})["y"]
        monkeypatch.undo()
        np.testing.assert_allclose(y, run({"x": x})["y"], rtol=1e-5, atol=1e-6)
        # The rows in their order, and zeros behind them, whatever ran before.
        assert {len(part) for part in ran} <= set(PADDED_SIZES)
        joined = np.concatenate([x[:0], *ran])
        np.testing.assert_array_equal(joined[:count], x)
        assert not joined[count:].any()
        assert len(joined) - count < max(count / 2, 2)
    if cuda_graphs:
        for count in range(1, 4 * LARGEST):
            runner.run({"x": rows(count)})
        assert len(gpu.trt.contexts) == len(PADDED_SIZES)


def test_batches_below_the_profile_are_padded(gpu: SimpleNamespace) -> None:
    manifest = json.loads(manifest_path(gpu.path).read_text())
    manifest["profiles"][0]["x"]["smallest"] = [5, 10]
    manifest_path(gpu.path).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="expected batches of 5 to 64 rows"):
        EngineRunner(gpu.path).run({"x": rows(3)})
    runner = EngineRunner(gpu.path, pad_batches=True)
    assert runner.batch_sizes == (5, *PADDED_SIZES[4:])
    check(runner, gpu.model, rows(3), rtol=1e-5)


SMALL, MIDDLE, LARGE = 0, 1, 2
PROFILES: list[Profile] = [
    {"x": ShapeRange((1, 10), (1, 10), (4, 10))},
    {"x": ShapeRange((3, 10), (16, 10), (20, 10))},
    {"x": ShapeRange((32, 10), (64, 10), (64, 10))},
]


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def three(request: pytest.FixtureRequest, stack: ExportedStack, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A GPU with an engine of three profiles."""
    with engine_on_gpu(tmp_path / "m.engine", stack.onnx, [*PROFILES], request.param) as found:
        yield found


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_several_profiles(cuda_graphs: bool, three: SimpleNamespace) -> None:
    runner = lmkan_deploy.load_runner(three.path, cuda_graphs=cuda_graphs)
    ran = {
        1: [(SMALL, 1)],
        3: [(SMALL, 3)],
        4: [(SMALL, 4)],  # as near to both: the first one
        5: [(MIDDLE, 5)],
        40: [(LARGE, 40)],
        65: [(LARGE, 32), (LARGE, 33)],
        130: [(LARGE, 43), (LARGE, 43), (LARGE, 44)],
        30: [(MIDDLE, 15), (MIDDLE, 15)],
        0: [],
    }
    for rows_of_call, parts in ran.items():
        three.trt.runs.clear()
        check(runner, three.model, rows(rows_of_call))
        if not cuda_graphs:
            assert sorted(three.trt.runs) == sorted(parts), rows_of_call
        assert set(three.trt.runs) <= set(parts)
    if not cuda_graphs:
        assert len(three.trt.contexts) == len(PROFILES)
        # The input, the output, and what all contexts share.
        assert three.memory.allocations == 3
    tensor = on_device(three, rows(40, 1))
    three.trt.runs.clear()
    y = EngineRunner(three.path, cuda_graphs=cuda_graphs).run_on_device({"x": tensor})["y"]
    assert {profile for profile, _ in three.trt.runs} == {LARGE}
    found = three.trt.read(y.__cuda_array_interface__["data"][0], y.shape, y.dtype)
    np.testing.assert_array_equal(found, three.model.run({"x": rows(40, 1)})["y"])
    with pytest.raises(InputError, match="expected 1 to 4 or 3 to 20 or 32 to 64 rows on the GPU, found 21"):
        EngineRunner(three.path).run_on_device({"x": on_device(three, rows(21))})


def test_padding_with_several_profiles(three: SimpleNamespace) -> None:
    runner = EngineRunner(three.path, cuda_graphs=True, pad_batches=True)
    assert runner.batch_sizes == (1, 2, 3, 4, 6, 8, 12, 16, 20, 32, 48, 64)
    for count in (1, 5, 19, 21, 33, 65, 130):
        check(runner, three.model, rows(count), rtol=1e-5)
    assert (LARGE, 32) in three.trt.runs  # 21 rows
    assert (MIDDLE, 6) in three.trt.runs


def test_a_profile_that_tensorrt_refuses(three: SimpleNamespace) -> None:
    runner = EngineRunner(three.path)
    del three.trt.profiles[LARGE]
    check(runner, three.model, rows(2))
    with pytest.raises(EngineError, match="TensorRT refused profile 2"):
        runner.run({"x": rows(64)})
    check(runner, three.model, rows(2))


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_tensors_on_the_device(cuda_graphs: bool, gpu: SimpleNamespace) -> None:
    runner = EngineRunner(gpu.path, cuda_graphs=cuda_graphs)
    held = []
    for seed in range(3):
        x = rows(6, seed)
        tensor = on_device(gpu, x)
        y = runner.run_on_device({"x": tensor})["y"]
        address = y.__cuda_array_interface__["data"][0]
        held.append((x, y))
        assert (y.shape, y.dtype) == ((6, 7), "float32")
        np.testing.assert_array_equal(gpu.trt.read(address, y.shape, y.dtype), gpu.model.run({"x": x})["y"])
    # What was handed out is the caller's: later runs leave it alone.
    for x, y in held:
        address = y.__cuda_array_interface__["data"][0]
        np.testing.assert_array_equal(gpu.trt.read(address, y.shape, y.dtype), gpu.model.run({"x": x})["y"])
    # Wherever it is dropped.
    del runner, tensor, y
    in_a_thread(held.clear)
    assert gpu.memory.allocations == 0


def on_device(gpu: SimpleNamespace, x: np.ndarray, **changes: Any) -> SimpleNamespace:
    memory = gpu.memory.allocate(max(x.nbytes, 1))
    gpu.memory.at(int(memory), x.nbytes)[:] = x.reshape(-1).view(np.uint8)
    interface = {"shape": x.shape, "typestr": x.dtype.str, "data": (int(memory), False), "version": 3}
    return SimpleNamespace(memory=memory, __cuda_array_interface__=interface | changes)


class NeedsGradient:
    @property
    def __cuda_array_interface__(self) -> None:
        raise RuntimeError("use detach")  # as PyTorch does


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_inputs_that_others_are_writing(cuda_graphs: bool, gpu: SimpleNamespace) -> None:
    runner = EngineRunner(gpu.path, cuda_graphs=cuda_graphs)

    absent = object()

    def waited(stream: int | None = None, of_interface: object = absent) -> tuple[list[int], list[int]]:
        gpu.trt.cuda.waited.clear()
        gpu.driver.waited.clear()
        changes = {} if of_interface is absent else {"stream": of_interface}
        runner.run_on_device({"x": on_device(gpu, rows(3), **changes)}, stream)
        return gpu.trt.cuda.waited, gpu.driver.waited

    legacy = [1], []
    assert waited() == legacy  # PyTorch's interface names no stream
    assert waited(0) == legacy
    assert waited(0x1234) == ([], [0x1234])
    assert waited(0x1234, None) == ([], [0x1234])
    assert waited(None, None) == ([], [])  # complete
    assert waited(None, 1) == legacy
    assert waited(None, 2) == ([], [2])  # the thread's default stream
    assert waited(None, 0x1234) == ([], [0x1234])
    gpu.driver.failing = {"cuStreamSynchronize"}
    with pytest.raises(EngineError, match="to wait for stream 0x1234, but cuStreamSynchronize gave"):
        runner.run_on_device({"x": on_device(gpu, rows(3))}, 0x1234)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_tensors_that_begin_anywhere(cuda_graphs: bool, gpu: SimpleNamespace) -> None:
    runner = EngineRunner(gpu.path, cuda_graphs=cuda_graphs)
    x = rows(5)
    whole = on_device(gpu, x)
    interface = whole.__cuda_array_interface__
    tail = interface | {"shape": (4, 10), "data": (interface["data"][0] + x[0].nbytes, False)}
    y = runner.run_on_device({"x": SimpleNamespace(__cuda_array_interface__=tail)})["y"]
    found = gpu.trt.read(y.__cuda_array_interface__["data"][0], y.shape, y.dtype)
    np.testing.assert_array_equal(found, gpu.model.run({"x": x[1:]})["y"])


def test_bad_tensors_on_the_device(gpu: SimpleNamespace) -> None:
    runner = EngineRunner(gpu.path)
    for tensor, message in [
        (rows(3), "expected a tensor on the GPU for input x"),
        (on_device(gpu, rows(3), strides=(4, 12)), "expected a contiguous tensor"),
        (on_device(gpu, rows(3).astype(np.float64)), "found elements of type <f8"),
        (on_device(gpu, rows(3).view(np.int32)), "found elements of type <i4"),
        (torch.ones(3, 10, requires_grad=True), "expected a tensor on the GPU|without a gradient"),
        (NeedsGradient(), "expected a tensor without a gradient .*: use detach"),
        (on_device(gpu, rows(3)[:, :9]), "found shape|from 1x10 to 64x10"),
        (on_device(gpu, rows(3)[0]), r"expected input x .*found shape \[10\]"),
        (on_device(gpu, rows(3)[..., None]), r"expected input x .*found shape \[3, 10, 1\]"),
        (on_device(gpu, rows(65)), "expected 1 to 64 rows on the GPU, found 65; split the batch"),
        (on_device(gpu, rows(0)), "expected 1 to 64 rows on the GPU, found 0"),
    ]:
        with pytest.raises(InputError, match=message):
            runner.run_on_device({"x": tensor})


# --- The plugin ----------------------------------------------------------------------------------------


def stand_in_plugin(path: Path, tensorrt: str = "10.14.1", more: bytes = b"") -> Path:
    path.write_bytes(f"lmkan-deploy {lmkan_deploy.__version__} for TensorRT {tensorrt}\0".encode() + more)
    return path


def needs_plugin(engine: Path, plugin: Path) -> None:
    content = json.loads(manifest_path(engine).read_text())
    content["plugin_sha256"] = file_sha256(plugin)
    manifest_path(engine).write_text(json.dumps(content))


@pytest.mark.parametrize("gpu", ["tensorrt"], indirect=True)
def test_a_plugin_is_loaded_once(gpu: SimpleNamespace, tmp_path: Path) -> None:
    plugin = stand_in_plugin(tmp_path / "plugin.so")
    needs_plugin(gpu.path, plugin)
    for _ in range(3):  # TensorRT's registry would refuse a second time
        check(lmkan_deploy.load_runner(gpu.path, plugin=plugin), gpu.model, rows(3))
    copied = stand_in_plugin(tmp_path / "copied.so")
    check(lmkan_deploy.load_runner(gpu.path, plugin=copied), gpu.model, rows(3))
    assert gpu.trt.registry.libraries == [str(plugin)]
    another = stand_in_plugin(tmp_path / "another.so", more=b"newer")
    with pytest.raises(EngineError, match="expected the plugin library that .*m.engine was built with"):
        lmkan_deploy.load_runner(gpu.path, plugin=another)
    needs_plugin(gpu.path, another)
    with pytest.raises(
        EngineError, match="that this process has loaded, .*plugin.so .*; start another process"
    ):
        lmkan_deploy.load_runner(gpu.path, plugin=another)


@pytest.mark.parametrize("gpu", ["tensorrt"], indirect=True)
def test_plugins_that_cannot_be_loaded(gpu: SimpleNamespace, tmp_path: Path) -> None:
    newer = stand_in_plugin(tmp_path / "newer.so", "11.1.0")
    needs_plugin(gpu.path, newer)
    with pytest.raises(EngineError, match="for TensorRT 10.14.1, found .*newer.so for TensorRT 11.1.0; make"):
        lmkan_deploy.load_runner(gpu.path, plugin=newer)
    newer.write_bytes(b"other")
    with pytest.raises(
        LibraryError, match="expected a TensorRT plugin library of lmkan-deploy, found another"
    ):
        lmkan_deploy.load_runner(gpu.path, plugin=newer)
    with pytest.raises(EngineError, match="expected a plugin library, found no file .*gone.so"):
        lmkan_deploy.load_runner(gpu.path, plugin=tmp_path / "gone.so")
    # Somebody else has loaded one, of which nothing is known.
    gpu.trt.registry.load_library("foreign.so")
    plugin = stand_in_plugin(tmp_path / "plugin.so")
    needs_plugin(gpu.path, plugin)
    with pytest.raises(EngineError, match="found one in this process that was loaded otherwise"):
        lmkan_deploy.load_runner(gpu.path, plugin=plugin)


def test_tensorrt_opens_nothing_without_a_gpu(
    stack: ExportedStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.engine"
    profiles: list[Profile] = [{"x": ShapeRange((1, 10), (1, 10), (16, 10))}]
    with engine_on_gpu(path, stack.onnx, profiles, "tensorrt") as gpu:
        manifest = json.loads(manifest_path(path).read_text())
        manifest_path(path).write_text(json.dumps({**manifest, "compute_capability": None}))
        monkeypatch.setattr("lmkan_deploy.engines.runner.compute_capability", lambda _: None)
        monkeypatch.setattr(gpu.trt, "Runtime", lambda _: pytest.fail("TensorRT was asked"))
        with pytest.raises(LibraryError, match=r"expected a GPU .*, found none; run nvidia-smi"):
            lmkan_deploy.load_runner(path)


def test_options_of_engines_are_refused_elsewhere(stack: ExportedStack) -> None:
    with pytest.raises(ModelError, match="expected an engine with a plugin, found .*model.onnx"):
        lmkan_deploy.load_runner(stack.onnx, plugin="plugin.so")
    with pytest.raises(
        ModelError, match="runtime onnxruntime-cuda with GPU 1, found .*onnx and onnxruntime;"
    ):
        lmkan_deploy.load_runner(stack.onnx, device=1)


# --- Failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_failing_run(cuda_graphs: bool, gpu: SimpleNamespace) -> None:
    runner = lmkan_deploy.load_runner(gpu.path, cuda_graphs=cuda_graphs)
    gpu.trt.refuses = lambda _: True
    with pytest.raises(InputError, match="TensorRT could not run the engine: no reason was given"):
        runner.run({"x": rows(3)})
    gpu.trt.refuses = lambda _: False
    check(runner, gpu.model, rows(3))


@pytest.mark.parametrize("gpu", ["tensorrt"], indirect=True)
def test_what_is_dropped_during_a_capture_is_released_after_it(gpu: SimpleNamespace) -> None:
    runner = EngineRunner(gpu.path, cuda_graphs=True)
    other = EngineRunner(gpu.path, cuda_graphs=True)
    check(other, gpu.model, rows(3))
    tensor = on_device(gpu, rows(3))
    held = [other, other.run_on_device({"x": tensor})]
    del other, tensor

    def refuses(capturing: bool) -> bool:
        if capturing:
            assert gpu.driver.graphs
            held.clear()
        return False

    gpu.trt.refuses = refuses
    check(runner, gpu.model, rows(3))
    assert not held
    check(runner, gpu.model, rows(3, 1))
    assert len(gpu.driver.graphs) == 1
    del runner
    assert (gpu.memory.allocations, gpu.driver.graphs) == (0, set())


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_refused_request_costs_no_graphs(cuda_graphs: bool, gpu: SimpleNamespace) -> None:
    runner = lmkan_deploy.load_runner(gpu.path, cuda_graphs=cuda_graphs)
    check(runner, gpu.model, rows(3))
    gpu.trt.refuses = lambda _: True
    with pytest.raises(InputError, match="could not run the engine"):
        runner.run({"x": rows(4)})
    gpu.trt.refuses = lambda _: False
    before = len(gpu.trt.contexts)
    check(runner, gpu.model, rows(3))
    check(runner, gpu.model, rows(4))
    assert len(gpu.trt.contexts) == before


def test_an_error_that_is_kept_keeps_no_graphs(gpu: SimpleNamespace) -> None:
    runner = lmkan_deploy.load_runner(gpu.path, cuda_graphs=True)
    for count in range(1, 8):
        runner.run({"x": rows(count)})
    gpu.trt.cuda.capacity = gpu.memory.allocations
    with pytest.raises(EngineError, match="free memory") as kept:
        runner.run({"x": rows(9)})
    assert kept.tb is not None
    assert gpu.memory.allocations <= 2  # the workspace, and what the traceback has of the failed call


def test_padded_outputs_have_a_row_for_each(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = lmkan_deploy.load_runner(gpu.path, pad_batches=True)
    monkeypatch.setattr(Context, "get_tensor_shape", lambda *_: (16, 7))
    with pytest.raises(
        EngineError, match=r"output y with a row for each of the 8 .* found \[16, 7\]; leave pad"
    ):
        runner.run({"x": rows(7)})


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_full_gpu(cuda_graphs: bool, gpu: SimpleNamespace) -> None:
    runner = lmkan_deploy.load_runner(gpu.path, cuda_graphs=cuda_graphs)
    check(runner, gpu.model, rows(3))
    gpu.trt.cuda.capacity = gpu.memory.allocations + cuda_graphs  # of a graph for its input, not its output
    with pytest.raises(
        EngineError, match="expected more free memory on the GPU: cuMemAlloc failed.*; run small"
    ):
        runner.run({"x": rows(4)})
    # What failed holds nothing.
    check(runner, gpu.model, rows(3))
    check(runner, gpu.model, rows(3, 1))
    del runner
    gc.collect()
    assert gpu.memory.allocations == 0


@pytest.mark.parametrize("gpu", ["tensorrt"], indirect=True)
@pytest.mark.parametrize(
    "failing",
    ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphLaunch", "enqueue"],
)
def test_a_failing_graph(failing: str, gpu: SimpleNamespace) -> None:
    runner = lmkan_deploy.load_runner(gpu.path, cuda_graphs=True)
    gpu.driver.failing = {failing}
    gpu.trt.refuses = lambda capturing: capturing and failing == "enqueue"
    expected = InputError if failing == "enqueue" else EngineError
    message = "could not run" if failing == "enqueue" else (
        f"a CUDA graph, but {failing} gave CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED; leave CUDA graphs out"
    )  # fmt: skip
    if failing == "cuGraphLaunch":
        runner.run({"x": rows(3)})  # captures; the next one launches
    with pytest.raises(expected, match=message):
        runner.run({"x": rows(3)})
    gpu.driver.failing, gpu.trt.refuses = set(), lambda _: False
    for seed in range(3):
        check(runner, gpu.model, rows(3, seed))
    assert len(gpu.driver.graphs) == 1


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_outputs_of_unknown_shapes(cuda_graphs: bool, gpu: SimpleNamespace) -> None:
    runner = lmkan_deploy.load_runner(gpu.path, cuda_graphs=cuda_graphs)
    gpu.trt.unknown_shapes = {"y"}
    with pytest.raises(EngineError, match=r"follow from those of the inputs, found y \[-1, 1\]"):
        runner.run({"x": rows(3)})


def test_the_server_uses_graphs_for_engines_alone(gpu: SimpleNamespace, stack: ExportedStack) -> None:
    sources = {"engine": gpu.path, "onnx": stack.onnx}

    async def load() -> None:
        store = ModelStore(sources, options=BatchingOptions(), metrics=Metrics(), cuda_graphs=True)
        for name in sources:
            await store.load(name)
        await store.close()

    asyncio.run(load())
    # It was tried on every size that batches are padded to.
    whole = None if gpu.runtime == "tensorrt" else "whole graph"
    assert gpu.trt.contexts == [whole] * len(PADDED_SIZES)


@pytest.mark.parametrize("gpu", ["tensorrt"], indirect=True)
@pytest.mark.parametrize("option", [[], ["--cuda-graphs"]])
def test_serving(option: list[str], gpu: SimpleNamespace, stack: ExportedStack) -> None:
    program = ("emulated_cli", stack.onnx, LARGEST)
    with Served(gpu.path, *option, program=program, PYTHONPATH=str(Path(__file__).parent)) as served:
        for seed in range(4):
            x = rows(3, seed)
            expected = gpu.model.run({"x": x})["y"]
            np.testing.assert_allclose(served.infer("m", x), expected, rtol=1e-5, atol=1e-6)
        assert served.stop() == 0
    served.wait_for(lambda: "graph launches: " in served.log)
    assert ("graph launches: 0\n" not in served.log) == bool(option), served.log


@pytest.mark.parametrize("gpu", ["tensorrt"], indirect=True)
def test_a_server_whose_gpu_is_lost_ends(gpu: SimpleNamespace, stack: ExportedStack, tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    more = {"PYTHONPATH": str(Path(__file__).parent), "EMULATED_GPU_LOST": str(lost)}
    program = ("emulated_cli", stack.onnx, LARGEST)
    with Served(gpu.path, program=program, **more) as served:
        served.infer("m", rows(3))
        lost.touch()
        request = json_request(rows(3))
        served.wait_for(lambda: served.request("/v2/models/m/infer", request)[0] == 503)
        reason = "fails on every input: the GPU failed: an illegal memory access was encountered"
        assert reason in served.request("/v2/models/m/infer", request)[1]["error"]
        assert served.process.wait(30) == 2
        served.wait_for(lambda: "to be started anew" in served.log)


@pytest.mark.parametrize("gpu", ["tensorrt"], indirect=True)
@pytest.mark.parametrize("option", [[], ["--cuda-graphs"]])
def test_the_option(option: list[str], gpu: SimpleNamespace, stack: ExportedStack, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.concatenate([rows(LARGEST), rows(LARGEST)]))
    for arguments in (
        ["run", gpu.path, "-i", tmp_path / "x.npy", "-o", tmp_path / "y.npy"],
        ["verify", gpu.path, "--reference", stack.onnx, "--batch", str(2 * LARGEST)],
    ):
        gpu.driver.launches = 0
        result = CliRunner().invoke(command_line.app, [*map(str, arguments), *option], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert (gpu.driver.launches > 0) == bool(option)


def test_padding_needs_an_engine(stack: ExportedStack) -> None:
    with pytest.raises(ModelError, match="expected an engine with padded batches, found .*model.onnx"):
        lmkan_deploy.load_runner(stack.onnx, pad_batches=True)


def test_graphs_need_an_engine(stack: ExportedStack) -> None:
    with pytest.raises(ModelError, match="expected an engine with CUDA graphs, found .*model.onnx"):
        lmkan_deploy.load_runner(stack.onnx, cuda_graphs=True)


@pytest.mark.parametrize("gpu", ["tensorrt"], indirect=True)
def test_graphs_need_the_bindings(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cuda.bindings")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(LibraryError, match="expected cuda-bindings for CUDA graphs.*install it"):
        lmkan_deploy.load_runner(gpu.path, cuda_graphs=True)
    check(lmkan_deploy.load_runner(gpu.path), gpu.model, rows(3))


# --- NVIDIA's bindings -------------------------------------------------------------------------------


def test_nvidias_bindings_take_the_calls(tmp_path: Path) -> None:
    """The real `cuda.bindings`, with a driver that writes down what it is asked."""
    source = Path(__file__).parent / "cuda_driver.c"
    command = ["gcc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source]
    subprocess.run(command, check=True)
    program = (
        "from lmkan_deploy.engines.cuda_graph import CudaGraph\n"
        "graph = CudaGraph(0x1234, lambda: print('enqueue', flush=True))\n"
        "graph.launch(0x1234)\n"
        "graph.launch(0x5678)\n"
        "del graph\n"
        "try: CudaGraph(0xBAD, lambda: None)\n"
        "except Exception as error: print(type(error).__name__, error, flush=True)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={"LD_LIBRARY_PATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.splitlines() == [
        "cuStreamBeginCapture 0x1234 1",
        "enqueue",
        "cuStreamEndCapture 0x1234",
        "cuGraphInstantiate 0xa 0",
        "cuGraphDestroy 0xa",
        "cuGraphLaunch 0xb 0x1234",
        "cuGraphLaunch 0xb 0x5678",
        "cuGraphExecDestroy 0xb",
        "cuStreamBeginCapture 0xbad 1",
        "EngineError expected the engine to run as a CUDA graph, but cuStreamBeginCapture gave "
        "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED; leave CUDA graphs out",
    ], result.stderr


# --- On a GPU ----------------------------------------------------------------------------------------


CAPABILITY = compute_capability()
# 7.5, 8.x and 12.x, as its documents list them: 9.0 and 10.x are not among them.
RTX_TAKES_IT = CAPABILITY is not None and (CAPABILITY == "7.5" or CAPABILITY.split(".")[0] in ("8", "12"))


@pytest.mark.gpu
@pytest.mark.skipif(CAPABILITY is None, reason="needs a GPU")
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize(
    "runtime",
    [
        "tensorrt",
        pytest.param(
            "tensorrt-rtx",
            marks=pytest.mark.skipif(
                not RTX_TAKES_IT,
                reason="needs a GPU of compute capability 7.5, 8.x or 12.x, which are those of TensorRT-RTX, "
                f"found {CAPABILITY or 'none'}",
            ),
        ),
    ],
)
def test_on_a_gpu(runtime: Any, cuda_graphs: bool, stack: ExportedStack, tmp_path: Path) -> None:
    pytest.importorskip(runtime.replace("-", "_"))
    pytest.importorskip("pycuda")
    shapes = ["x:1x10,1x10,16x10", "x:2x10,32x10,64x10"]
    build_engine(stack.onnx, tmp_path / "m.engine", runtime=runtime, shapes=shapes)
    runner = lmkan_deploy.load_runner(tmp_path / "m.engine", cuda_graphs=cuda_graphs)
    model = lmkan_deploy.load_runner(stack.onnx)
    for seed, count in enumerate([7, 64, 1, 7, 7, 63, 65, 200, 64, 0, 1]):
        check(runner, model, rows(count, seed), rtol=1e-4)
