"""What tests of packages share: models, imports of generated files, servers and requests."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from lmkan_deploy.runtime.tensors import random_inputs


def config_of(folder: Path) -> Any:
    """A model's configuration, read as Triton reads it."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def sample(runner: Any, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    return random_inputs(runner.inputs, {None: rows}, np.random.default_rng(seed))


def make_model(path: Path, nodes: list[onnx.NodeProto], inputs: dict, outputs: dict) -> Path:
    """An ONNX file; inputs and outputs are name -> (type, shape)."""
    values = [
        [onnx.helper.make_tensor_value_info(name, *spec) for name, spec in specs.items()]
        for specs in (inputs, outputs)
    ]
    graph = onnx.helper.make_graph(nodes, "g", *values)
    opset = onnx.helper.make_opsetid("", 20)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return path


def two_inputs(path: Path) -> Path:
    """Sums x and y, of any number of rows and columns, over the columns: its output has one axis."""
    node = onnx.helper.make_node
    nodes = [
        node("Add", ["x", "y"], ["s"]),
        node("Constant", [], ["one"], value_ints=[1]),
        node("ReduceSum", ["s", "one"], ["z"], keepdims=0),
    ]
    float32 = onnx.TensorProto.FLOAT
    tensor = (float32, ["n", "m"])
    return make_model(path, nodes, {"x": tensor, "y": tensor}, {"z": (float32, ["n"])})


def no_batch(path: Path, *, scalar: bool = False) -> Path:
    """Sums all rows: what one request gets would depend on another's rows."""
    nodes = [onnx.helper.make_node("ReduceSum", ["x"], ["total"], keepdims=int(not scalar))]
    double = onnx.TensorProto.DOUBLE
    return make_model(path, nodes, {"x": (double, ["n", 3])}, {"total": (double, [] if scalar else [1, 1])})


def import_file(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own, stopped at the end of the block."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    pytest.fail(f"{url} did not become ready:\n{log.read_text(errors='replace')[-4000:]}")


def infer_request(feeds: dict[str, np.ndarray], **changes: Any) -> dict[str, Any]:
    inputs = [
        {"name": name, "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist(), **changes}
        for name, x in feeds.items()
    ]
    return {"inputs": inputs}


def read_output(answer: dict[str, Any], index: int = 0) -> np.ndarray:
    output = answer["outputs"][index]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def post(url: str, content: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())
