"""Folders to deploy from: what is in them, and real servers that start from them where there are any.

Optional, each named by an environment variable:
LMKAN_PYTRITON_VENV, a virtual environment with nvidia-pytriton and onnxruntime, whose server is started;
LMKAN_TRITON_ORT_BACKEND, a folder with Triton's ONNX Runtime backend for that server;
LMKAN_RAY_VENV, a virtual environment with this package and Ray Serve;
LMKAN_KSERVE_CRDS, a folder with KServe's CRDs, servingruntimes.yaml and inferenceservices.yaml.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import typer
import yaml
from google.protobuf import text_format
from starlette.requests import Request
from tritonclient.grpc import model_config_pb2
from typer.testing import CliRunner

import lmkan_deploy
from lmkan_deploy.commands.package import package
from lmkan_deploy.engines.manifest import Manifest, manifest_path
from lmkan_deploy.engines.profiles import Profile
from lmkan_deploy.errors import LmkanError, ModelError
from lmkan_deploy.packaging import PackageError, package_model
from lmkan_deploy.packaging.kserve import kubernetes_name
from lmkan_deploy.packaging.source import LIBRARY
from lmkan_deploy.runtime.tensors import random_inputs
from lmkan_deploy.staging import file_sha256
from networks import ExportedStack, make_stack

TESTS = Path(__file__).parent
FORMATS = ("triton", "triton-python", "kserve", "ray")


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


# --- The folder --------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_folder_appears_complete_or_not_at_all(
    format_name: str, stack: ExportedStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()  # an empty one may be there
    result = package_model(stack.onnx, output, format=format_name, name="net")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    found = sorted(str(file.relative_to(output)) for file in output.rglob("*") if file.is_file())
    assert result.files == found
    assert "README.md" in found
    readme = (output / "README.md").read_text()
    assert all(line in readme for line in result.start)
    assert not re.search(r"\$\{?[a-z_]+\b", readme), "a place was not filled in"
    assert output.stat().st_mode & 0o055 == 0o055, "a server of another user could not read it"
    [model] = output.rglob("model.onnx")
    assert model.read_bytes() == stack.onnx.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lmkan_deploy.packaging.source.shutil.copyfile", fail)
    with pytest.raises(ModelError, match="could not write .*other: No space left"):
        package_model(stack.onnx, tmp_path / "other", format=format_name)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_outputs_that_are_not_free_are_refused(stack: ExportedStack, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for output, fragment in (
        ("full", "expected a new or empty folder, found files in .*; choose another --output"),
        ("file", "expected a folder to write, found the file"),
        ("missing/deep", "found no folder"),
    ):
        with pytest.raises(ModelError, match=fragment) as caught:
            package_model(stack.onnx, tmp_path / output)
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "mine.txt"]


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "a b", "-x", ".x", "é", "x" * 129, "a\n"])
def test_names_that_are_no_folder_names_are_refused(name: str, stack: ExportedStack, tmp_path: Path) -> None:
    for format_name in FORMATS:
        with pytest.raises(PackageError, match="expected a model name of .* found .*; pass --name"):
            package_model(stack.onnx, tmp_path / "out", format=format_name, name=name)
    assert not any(tmp_path.iterdir())


def test_the_name_is_the_files_by_default(stack: ExportedStack, tmp_path: Path) -> None:
    shutil.copyfile(stack.onnx, tmp_path / "net.v2.onnx")
    assert package_model(tmp_path / "net.v2.onnx", tmp_path / "out").name == "net.v2"
    assert config_of(tmp_path / "out" / "net.v2").name == "net.v2"
    shutil.copyfile(stack.onnx, tmp_path / "my net.onnx")
    with pytest.raises(PackageError, match="found 'my net'; pass --name"):
        package_model(tmp_path / "my net.onnx", tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"format": "tar"}, "expected a format of triton, triton-python, kserve, ray, found 'tar'"),
        ({"max_batch": 0}, "expected --max-batch of 1 to 16777216, found 0"),
        ({"max_delay_us": -1}, "expected --max-delay-us of 0 to"),
        ({"threads": 0}, "expected --threads of 1 to 1024, found 0"),
        ({"repository_path": "models"}, "expected an absolute --repository-path of letters"),
        ({"repository_path": "/a; b"}, "expected an absolute --repository-path of letters"),
        ({"format": "kserve", "image": "a b"}, "expected the name of an image"),
        ({"format": "kserve", "name": "x" * 41}, "expected a name of at most 40 characters for kserve"),
        ({"format": "ray", "wheel": "numpy-1.0-py3-none-any.whl"}, "expected a wheel lmkan_deploy-"),
    ],
)
def test_settings_out_of_range_are_refused(
    options: dict[str, Any], fragment: str, stack: ExportedStack, tmp_path: Path
) -> None:
    with pytest.raises(PackageError) as caught:
        package_model(stack.onnx, tmp_path / "out", **options)
    assert fragment in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_models_that_can_not_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"x")
    (tmp_path / "bad.onnx").write_bytes(b"x")
    for name, kind, fragment in (
        ("model.pt", PackageError, "expected an .onnx or .engine file"),
        ("bad.onnx", ModelError, "expected an ONNX"),
        ("none.onnx", ModelError, "found no file"),
    ):
        with pytest.raises(kind, match=fragment):
            package_model(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize("format_name", FORMATS)
def test_external_data_comes_along_under_the_new_name(
    format_name: str, stack: ExportedStack, tmp_path: Path
) -> None:
    lmkan_deploy.optimize(stack.onnx, tmp_path / "big.onnx", external_data=True)
    assert (tmp_path / "big.onnx.data").is_file()
    package_model(tmp_path / "big.onnx", tmp_path / "out", format=format_name)
    [model] = (tmp_path / "out").rglob("model.onnx")
    assert Path(f"{model}.data").stat().st_size > 10_000
    for file in tmp_path.glob("big.onnx*"):
        file.unlink()
    runner, expected = lmkan_deploy.load_runner(model), lmkan_deploy.load_runner(stack.onnx)
    x = sample(runner, 5)
    np.testing.assert_allclose(runner.run(x)["y"], expected.run(x)["y"], rtol=1e-5, atol=1e-5)


def test_the_command(stack: ExportedStack, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(package)
    run = CliRunner().invoke
    result = run(app, [str(stack.onnx), "-o", str(tmp_path / "a"), "--name", "net", "--max-batch", "7"])
    assert result.exit_code == 0, result.output
    assert "net for triton, 4 files" in result.output
    assert config_of(tmp_path / "a" / "net").max_batch_size == 7
    result = run(app, [str(stack.onnx), "-o", str(tmp_path / "b"), "-f", "ray", "--json"])
    assert json.loads(result.output)["files"][0] == "README.md"
    result = run(app, [str(stack.onnx), "-o", str(tmp_path / "c"), "-f", "kserve", "-q"])
    assert result.output == ""
    result = run(app, [str(stack.onnx), "-o", str(tmp_path / "c")])
    assert isinstance(result.exception, LmkanError)
    assert "\n" not in str(result.exception)


# --- Triton, ONNX Runtime backend --------------------------------------------------------------------


def test_triton_configuration(stack: ExportedStack, tmp_path: Path) -> None:
    package_model(stack.onnx, tmp_path / "r", name="net", max_batch=96, max_delay_us=250, threads=3)
    config = config_of(tmp_path / "r" / "net")
    assert (config.name, config.backend, config.max_batch_size) == ("net", "onnxruntime", 96)
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [
        ("x", model_config_pb2.TYPE_FP32, [10])
    ]
    assert [(t.name, t.data_type, list(t.dims)) for t in config.output] == [
        ("y", model_config_pb2.TYPE_FP32, [7])
    ]
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    [group] = config.instance_group
    assert (group.kind, group.count) == (model_config_pb2.ModelInstanceGroup.KIND_CPU, 1)
    assert list(config.model_operations.op_library_filename) == ["net/liblmkan_onnxruntime.so"]
    assert config.parameters["intra_op_thread_count"].string_value == "3"


def test_triton_finds_the_library_from_inside_the_repository(stack: ExportedStack, tmp_path: Path) -> None:
    """Triton hands the name to ONNX Runtime as it stands; so does this."""
    package_model(stack.onnx, tmp_path / "made", name="net")
    (tmp_path / "made").rename(tmp_path / "moved")
    [library] = config_of(tmp_path / "moved" / "net").model_operations.op_library_filename
    runner = lmkan_deploy.load_runner(stack.onnx)
    x = sample(runner, 9)
    np.save(tmp_path / "x.npy", x["x"])
    code = f"""
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.register_custom_ops_library({library!r})
session = ort.InferenceSession("net/1/model.onnx", options, providers=["CPUExecutionProvider"])
np.save("../y.npy", session.run(None, {{"x": np.load("../x.npy")}})[0])
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path / "moved")
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), runner.run(x)["y"])


def test_a_repository_for_a_known_place(stack: ExportedStack, tmp_path: Path) -> None:
    result = package_model(stack.onnx, tmp_path / "r", name="net", repository_path="/srv/models")
    config = config_of(tmp_path / "r" / "net")
    assert list(config.model_operations.op_library_filename) == ["/srv/models/net/liblmkan_onnxruntime.so"]
    assert result.start == ["tritonserver --model-repository=/srv/models"]


def test_dimensions_of_other_models(tmp_path: Path) -> None:
    package_model(two_inputs(tmp_path / "two.onnx"), tmp_path / "two")
    config = config_of(tmp_path / "two" / "two")
    assert config.max_batch_size == 1024
    assert [(t.name, list(t.dims)) for t in config.input] == [("x", [-1]), ("y", [-1])]
    # A row without axes is sent as one of size 1.
    [z] = config.output
    assert (list(z.dims), z.HasField("reshape"), list(z.reshape.shape)) == ([1], True, [])

    package_model(no_batch(tmp_path / "sum.onnx"), tmp_path / "sum")
    config = config_of(tmp_path / "sum" / "sum")
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (0, False)
    assert [(t.data_type, list(t.dims)) for t in config.input] == [(model_config_pb2.TYPE_FP64, [-1, 3])]
    for format_name in ("triton", "triton-python"):
        with pytest.raises(
            PackageError, match="expected tensors with an axis or more, .* none in total; export"
        ):
            package_model(no_batch(tmp_path / "s.onnx", scalar=True), tmp_path / "s", format=format_name)


@pytest.mark.parametrize("name", ['a"b', "a\\b", "x\u00e9", "layer/x:0"])
def test_tensor_names_are_quoted(name: str, tmp_path: Path) -> None:
    node = onnx.helper.make_node("Relu", [name], ["y"])
    tensor = (onnx.TensorProto.FLOAT, ["n", 2])
    make_model(tmp_path / "m.onnx", [node], {name: tensor}, {"y": tensor})
    package_model(tmp_path / "m.onnx", tmp_path / "r")
    assert config_of(tmp_path / "r" / "m").input[0].name == name


@pytest.mark.parametrize(
    "dtype", ["FLOAT16", "BFLOAT16", "FLOAT", "DOUBLE", "INT8", "INT64", "UINT8", "BOOL"]
)
def test_types(dtype: str, tmp_path: Path) -> None:
    tensor = (getattr(onnx.TensorProto, dtype), ["n", 2])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    make_model(tmp_path / "m.onnx", [node], {"x": tensor}, {"y": tensor})
    package_model(tmp_path / "m.onnx", tmp_path / "r")
    short = {"FLOAT16": "FP16", "BFLOAT16": "BF16", "FLOAT": "FP32", "DOUBLE": "FP64"}.get(dtype, dtype)
    assert config_of(tmp_path / "r" / "m").input[0].data_type == getattr(model_config_pb2, f"TYPE_{short}")
    if dtype == "BFLOAT16":
        with pytest.raises(PackageError, match="expected types that NumPy has"):
            package_model(tmp_path / "m.onnx", tmp_path / "p", format="triton-python")


def test_types_without_a_name_are_refused(tmp_path: Path) -> None:
    tensor = (onnx.TensorProto.STRING, ["n", 2])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    make_model(tmp_path / "m.onnx", [node], {"x": tensor}, {"y": tensor})
    with pytest.raises(PackageError, match="found type string in x"):
        package_model(tmp_path / "m.onnx", tmp_path / "r")


# --- Triton, TensorRT backend ------------------------------------------------------------------------


def make_engine(folder: Path, model: Path, plugin: Path | None, **changes: Any) -> Path:
    """A stand-in for an engine: packaging looks at the manifest alone."""
    folder.mkdir(exist_ok=True)
    engine = folder / "net.engine"
    engine.write_bytes(b"plan")
    manifest = Manifest(
        **{
            "runtime": "tensorrt",
            "runtime_version": "10.14.1.48",
            "cuda_version": 13000,
            "compute_capability": "9.0",
            "plugin_sha256": None if plugin is None else file_sha256(plugin),
            "model": model.name,
            "model_sha256": file_sha256(model),
            "engine_sha256": file_sha256(engine),
            "profiles": {"x": Profile((1, 10), (64, 10), (512, 10))},
            "lookup_layers": 2,
            **changes,
        }
    )
    manifest_path(engine).write_text(json.dumps(asdict(manifest)))
    return engine


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "liblmkan_tensorrt.so").write_bytes(b"plugin")
    (tmp_path / "lib" / "liblmkan_tensorrt_register.so").write_bytes(b"register")
    return tmp_path / "lib" / "liblmkan_tensorrt.so"


def test_triton_repository_of_an_engine(stack: ExportedStack, tmp_path: Path, plugin: Path) -> None:
    engine = make_engine(tmp_path / "e", stack.onnx, plugin)
    result = package_model(engine, tmp_path / "r", plugin=plugin, repository_path="/models")
    folder = tmp_path / "r" / "net"
    assert (folder / "1" / "model.plan").read_bytes() == b"plan"
    assert (folder / "liblmkan_tensorrt.so").read_bytes() == b"plugin"
    assert (folder / "liblmkan_tensorrt_register.so").read_bytes() == b"register"
    config = config_of(folder)
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 512)  # the profile's largest
    assert not config.input, "Triton reads them from the engine"
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    [command] = result.start
    assert command.endswith("--backend-config=tensorrt,plugins=/models/net/liblmkan_tensorrt_register.so"), (
        command
    )

    # With the ONNX file at hand the tensors are known.
    shutil.copyfile(stack.onnx, engine.parent / stack.onnx.name)
    package_model(engine, tmp_path / "s", plugin=plugin, max_batch=100)
    config = config_of(tmp_path / "s" / "net")
    assert ([list(t.dims) for t in config.input], config.max_batch_size) == ([[10]], 100)


def test_an_engine_without_plugin(stack: ExportedStack, tmp_path: Path) -> None:
    fixed = {"x": Profile((8, 10), (8, 10), (8, 10))}
    engine = make_engine(tmp_path / "e", stack.onnx, None, profiles=fixed)
    result = package_model(engine, tmp_path / "r")
    assert config_of(tmp_path / "r" / "net").max_batch_size == 0
    assert result.start == ["tritonserver --model-repository=."]
    assert not list((tmp_path / "r").rglob("*.so"))


def test_engines_that_triton_could_not_run_are_refused(
    stack: ExportedStack, tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LMKAN_DEPLOY_LIBRARY_DIR", str(tmp_path / "nothing"))
    lmkan_deploy.get_library_path.cache_clear()
    engine = make_engine(tmp_path / "e", stack.onnx, plugin)
    out = tmp_path / "out"

    def refused(fragment: str, **options: Any) -> None:
        with pytest.raises(LmkanError, match=fragment) as caught:
            package_model(engine, out, **options)
        assert "\n" not in str(caught.value)
        assert not out.exists()

    refused("expected the plugin library .* found none; pass --plugin")
    refused("found no file .*gone.so; pass --plugin", plugin=tmp_path / "gone.so")
    for format_name in ("triton-python", "kserve", "ray"):
        refused(f"expected an .onnx file for the format {format_name}", format=format_name, plugin=plugin)
    plugin.with_name("liblmkan_tensorrt_register.so").rename(tmp_path / "away")
    refused("found no file .*_register.so", plugin=plugin)
    (tmp_path / "away").rename(plugin.with_name("liblmkan_tensorrt_register.so"))
    plugin.write_bytes(b"another")
    refused("SHA-256", plugin=plugin)
    engine.write_bytes(b"other")
    refused("found another or a damaged file", plugin=plugin)
    make_engine(tmp_path / "e", stack.onnx, None, runtime="tensorrt-rtx")
    refused("expected an engine for tensorrt, .* found one for tensorrt-rtx")
    manifest_path(engine).unlink()
    refused("expected a manifest beside the engine")
    lmkan_deploy.get_library_path.cache_clear()


# --- Triton, Python backend: its model.py with a stand-in for Triton ----------------------------------


@dataclass(frozen=True)
class _Tensor:
    tensor_name: str
    array: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.array


@dataclass(frozen=True)
class _Response:
    output_tensors: list[_Tensor]
    error: str | None = None

    def array(self, name: str) -> np.ndarray:
        assert self.error is None, self.error
        return next(tensor.array for tensor in self.output_tensors if tensor.tensor_name == name)


@dataclass(frozen=True)
class _Request:
    inputs: dict[str, np.ndarray]
    wanted: list[str] = field(default_factory=list)

    def requested_output_names(self) -> list[str]:
        return self.wanted


def _backend_utils() -> ModuleType:
    module = ModuleType("triton_python_backend_utils")
    types_by_name = {"TYPE_FP32": np.float32, "TYPE_FP64": np.float64}

    def get_input(request: _Request, name: str) -> _Tensor | None:
        return _Tensor(name, request.inputs[name]) if name in request.inputs else None

    module.Tensor = _Tensor  # type: ignore[attr-defined]
    module.InferenceResponse = _Response  # type: ignore[attr-defined]
    module.TritonError = str  # type: ignore[attr-defined]
    module.get_input_tensor_by_name = get_input  # type: ignore[attr-defined]
    module.triton_string_to_numpy = types_by_name.__getitem__  # type: ignore[attr-defined]
    return module


def import_file(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", _backend_utils())

    def start(model: Path, **options: Any) -> Any:
        package_model(model, tmp_path / "repository", format="triton-python", name="net", **options)
        folder = tmp_path / "repository" / "net"
        config = config_of(folder)
        assert config.backend == "python"
        tensors = [
            {"name": t.name, "data_type": model_config_pb2.DataType.Name(t.data_type)} for t in config.input
        ]
        parameters = {key: {"string_value": v.string_value} for key, v in config.parameters.items()}
        content = {"max_batch_size": config.max_batch_size, "input": tensors, "parameters": parameters}
        served = import_file(folder / "1" / "model.py", "packaged_model").TritonPythonModel()
        served.initialize(
            {
                "model_config": json.dumps(content),
                "model_repository": str(folder),
                "model_version": "1",
            }
        )
        return served

    return start


def count_runs(served: Any) -> list[int]:
    """Rows of each session run from now on."""
    runs: list[int] = []
    run = served._run

    def counted(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        runs.append(len(next(iter(feeds.values()))))
        return run(feeds)

    served._run = counted
    return runs


def test_python_model_joins_requests(stack: ExportedStack, start_model: Callable[..., Any]) -> None:
    served = start_model(stack.onnx, threads=1)
    runs = count_runs(served)
    runner = lmkan_deploy.load_runner(stack.onnx)
    feeds = [sample(runner, rows, seed) for seed, rows in enumerate((1, 5, 0, 2, 64))]
    responses = served.execute([_Request(x) for x in feeds])
    assert runs == [72]
    for x, response in zip(feeds, responses, strict=True):
        np.testing.assert_allclose(response.array("y"), runner.run(x)["y"], rtol=1e-6, atol=1e-6)
    [response] = served.execute([_Request(feeds[0], ["y"])])
    assert [tensor.tensor_name for tensor in response.output_tensors] == ["y"]
    assert served.execute([]) == []


def test_python_model_answers_each_bad_request(stack: ExportedStack, start_model: Callable[..., Any]) -> None:
    served = start_model(stack.onnx)
    runner = lmkan_deploy.load_runner(stack.onnx)
    good = sample(runner, 3)
    bad = [
        _Request({}),
        _Request({"x": good["x"].astype(np.float64)}),
        _Request({"x": good["x"][:, :4]}),
        _Request({"x": np.float32(1)}),
    ]
    responses = served.execute([bad[0], _Request(good), *bad[1:], _Request(good)])
    for index in (1, 5):
        np.testing.assert_allclose(responses[index].array("y"), runner.run(good)["y"], rtol=1e-6, atol=1e-6)
    fragments = ("found no x", "expected float32 as input x, found float64", "", "")
    for index, fragment in zip((0, 2, 3, 4), fragments, strict=True):
        assert responses[index].error is not None
        assert fragment in responses[index].error


def test_python_model_runs_each_alone_when_the_joined_run_fails(
    stack: ExportedStack, start_model: Callable[..., Any]
) -> None:
    served = start_model(stack.onnx)
    run = served._run

    def fragile(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if np.isnan(feeds["x"]).any():
            raise RuntimeError("out of memory")
        return run(feeds)

    served._run = fragile
    good = sample(lmkan_deploy.load_runner(stack.onnx), 3)
    responses = served.execute([_Request(good), _Request({"x": good["x"] * np.nan}), _Request(good)])
    assert [response.error for response in responses] == [None, "out of memory", None]


def test_python_model_groups_by_shape(tmp_path: Path, start_model: Callable[..., Any]) -> None:
    served = start_model(two_inputs(tmp_path / "two.onnx"))
    runs = count_runs(served)
    arrays = [np.full((rows, width), 1.0, np.float32) for rows, width in ((1, 3), (2, 4), (5, 3), (1, 4))]
    odd = _Request({"x": arrays[0], "y": arrays[2]})
    responses = served.execute([*(_Request({"x": a, "y": a}) for a in arrays), odd])
    assert sorted(runs) == [3, 6]
    for array, response in zip(arrays, responses, strict=False):
        np.testing.assert_array_equal(response.array("z"), 2 * array.sum(axis=1))
    assert "same number of rows" in responses[4].error


def test_python_model_without_a_batch_axis(tmp_path: Path, start_model: Callable[..., Any]) -> None:
    served = start_model(no_batch(tmp_path / "sum.onnx"))
    assert not served.joins
    arrays = [np.ones((rows, 3)) for rows in (1, 4)]
    responses = served.execute([_Request({"x": a}) for a in arrays])
    assert [response.array("total").item() for response in responses] == [3.0, 12.0]


def test_python_model_needs_nothing_but_numpy_and_onnxruntime() -> None:
    text = (Path(lmkan_deploy.__file__).parent / "packaging" / "templates" / "triton_model.py").read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    third_party = imported - set(sys.stdlib_module_names)
    assert third_party == {"numpy", "onnxruntime", "triton_python_backend_utils"}


# --- Triton for real ---------------------------------------------------------------------------------


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


def pytriton() -> tuple[Path, Path]:
    """The environment, and its tritonserver's folder."""
    name = os.environ.get("LMKAN_PYTRITON_VENV")
    if not name:
        pytest.skip("LMKAN_PYTRITON_VENV is not set: no tritonserver to start")
    found = list(Path(name).glob("lib/python3*/site-packages/pytriton/tritonserver"))
    assert len(found) == 1, f"expected nvidia-pytriton in {name}"
    return Path(name), found[0]


@pytest.fixture(params=["triton-python", "triton"])
def triton(request: pytest.FixtureRequest, stack: ExportedStack, tmp_path: Path) -> Iterator[str]:
    """A tritonserver with three models in one of the formats; yields its address."""
    venv, server = pytriton()
    onnxruntime_backend = os.environ.get("LMKAN_TRITON_ORT_BACKEND")
    if request.param == "triton" and not onnxruntime_backend:
        pytest.skip("LMKAN_TRITON_ORT_BACKEND is not set: no ONNX Runtime backend for tritonserver")
    backends = tmp_path / "backends" / "python"
    backends.mkdir(parents=True)
    for file in (server / "backends" / "python").iterdir():
        (backends / file.name).symlink_to(file)
    release = server.parents[2].name.removeprefix("python")
    stub = "triton_python_backend_stub"
    (backends / stub).symlink_to(server / "python_backend_stubs" / release / stub)
    if onnxruntime_backend:
        (tmp_path / "backends" / "onnxruntime").symlink_to(onnxruntime_backend)
    repository = tmp_path / "repository"
    package_model(stack.onnx, repository, format=request.param, name="net", max_delay_us=2000, threads=1)
    for model in (two_inputs(tmp_path / "two.onnx"), no_batch(tmp_path / "sum.onnx")):
        package_model(model, tmp_path / model.stem, format=request.param)
        (tmp_path / model.stem / model.stem).rename(repository / model.stem)
    port = free_port()
    environment = {
        **os.environ,
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(server / "external_libs"),
    }
    environment.pop("PYTHONPATH", None)  # the model must not find this package
    command = [str(server / "bin" / "tritonserver"), "--model-repository=.", "--http-address=127.0.0.1",
               f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false",
               f"--backend-directory={backends.parent}"]  # fmt: skip
    log = tmp_path / "triton.log"
    with running(command, log, cwd=repository, env=environment) as process:
        wait_until_ready(f"http://127.0.0.1:{port}/v2/health/ready", process, log)
        if request.param == "triton":
            assert LIBRARY in Path(f"/proc/{process.pid}/maps").read_text()
        yield f"127.0.0.1:{port}"


def test_a_real_triton_serves_the_repository(stack: ExportedStack, triton: str) -> None:
    http = pytest.importorskip("tritonclient.http")
    url = triton
    runner = lmkan_deploy.load_runner(stack.onnx)

    def ask(client: Any, model: str, arrays: dict[str, np.ndarray], output: str, dtype: str = "FP32") -> Any:
        inputs = []
        for name, array in arrays.items():
            inputs.append(http.InferInput(name, list(array.shape), dtype))
            inputs[-1].set_data_from_numpy(array)
        return client.infer(model, inputs).as_numpy(output)

    client = http.InferenceServerClient(url)
    metadata = client.get_model_metadata("net")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 10]}]
    for rows in (1, 7, 1024):
        x = sample(runner, rows, rows)
        np.testing.assert_allclose(
            ask(client, "net", x, "y"), runner.run(x)["y"], rtol=1e-5, atol=1e-5, err_msg=f"{rows} rows"
        )

    def many(seed: int) -> int:
        own = http.InferenceServerClient(url)
        for step in range(50):
            x = sample(runner, 1 + step % 3, 1000 * seed + step)
            np.testing.assert_allclose(ask(own, "net", x, "y"), runner.run(x)["y"], rtol=1e-5, atol=1e-5)
        own.close()
        return 50

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(many, range(8))) == 400
    statistics = client.get_inference_statistics("net")["model_stats"][0]
    print(f"{statistics['inference_count']} rows in {statistics['execution_count']} runs")
    assert statistics["execution_count"] < 300, "requests were not joined"

    # A bad request is answered as one, and the next one is served.
    with pytest.raises(http.InferenceServerException, match="unexpected shape"):
        ask(client, "net", {"x": np.zeros((2, 4), np.float32)}, "y")
    with pytest.raises(http.InferenceServerException, match="batch-size must be <= 1024"):
        ask(client, "net", {"x": np.zeros((1025, 10), np.float32)}, "y")
    assert client.is_model_ready("net")

    ones = np.ones((2, 5), np.float32)
    np.testing.assert_array_equal(ask(client, "two", {"x": ones, "y": ones}, "z"), [[10.0], [10.0]])
    narrow = np.ones((2, 4), np.float32)
    with pytest.raises(http.InferenceServerException, match="Add"):  # found by ONNX Runtime alone
        ask(client, "two", {"x": ones, "y": narrow}, "z")
    np.testing.assert_array_equal(ask(client, "two", {"x": narrow, "y": narrow}, "z"), [[8.0], [8.0]])
    np.testing.assert_array_equal(ask(client, "sum", {"x": np.ones((4, 3))}, "total", "FP64"), [[12.0]])
    client.close()  # the server waits for open connections


# --- KServe ------------------------------------------------------------------------------------------


@pytest.fixture
def kserve(stack: ExportedStack, tmp_path: Path) -> Path:
    package_model(stack.onnx, tmp_path / "kserve", format="kserve", name="Net_v1.2", threads=2)
    return tmp_path / "kserve"


def manifests(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    runtime, service = (
        yaml.safe_load((folder / f"{name}.yaml").read_text())
        for name in ("servingruntime", "inferenceservice")
    )
    return runtime, service


def test_kserve_manifests_fit_together(kserve: Path) -> None:
    runtime, service = manifests(kserve)
    assert (runtime["apiVersion"], runtime["kind"]) == ("serving.kserve.io/v1alpha1", "ServingRuntime")
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert service["metadata"]["name"] == "net-v1-2"
    for manifest in (runtime, service):
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", manifest["metadata"]["name"])
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"] == ["v2", "grpc-v2"]
    [known] = runtime["spec"]["supportedModelFormats"]
    assert model["modelFormat"] == {key: known[key] for key in ("name", "version")}
    [container] = runtime["spec"]["containers"]
    assert (container["name"], container["image"]) == ("kserve-container", "net-v1-2:1")
    assert container["command"] == ["lmkan-deploy"]
    line = " ".join(container["args"])
    assert "serve --models /mnt/models --host 0.0.0.0 --http-port 8080 --grpc-port 8081" in line
    assert "--threads 2" in line
    [port] = container["ports"]
    for probe, path in (("startup", "ready"), ("readiness", "ready"), ("liveness", "live")):
        check = container[f"{probe}Probe"]["httpGet"]
        assert check == {"path": f"/v2/health/{path}", "port": port["containerPort"]}
    for kind in ("requests", "limits"):
        assert container["resources"][kind]["cpu"] == "2"
        assert re.fullmatch(r"\d+Mi", container["resources"][kind]["memory"])
    security = container["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["allowPrivilegeEscalation"] is False


def test_kserve_image(kserve: Path, stack: ExportedStack, tmp_path: Path) -> None:
    assert (kserve / "models" / "Net_v1.2" / "1" / "model.onnx").is_file()
    text = (kserve / "Dockerfile").read_text()
    for line in (
        "FROM python:3.12-slim",
        "COPY models/ /mnt/models/",
        "USER 1000",
        f'--find-links /wheels "lmkan-deploy[cpu,serve]=={lmkan_deploy.__version__}"',
    ):
        assert line in text
    for source in re.findall(r"^COPY (\S+) ", text, re.MULTILINE):
        assert (kserve / source).is_dir(), f"the build would miss {source}"
    # What an image's own command starts is what the runtime starts.
    [command] = re.findall(r"^CMD (.*)$", text, re.MULTILINE)
    [container] = manifests(kserve)[0]["spec"]["containers"]
    assert json.loads(command) == container["args"][: len(json.loads(command))]
    wheel = tmp_path / f"lmkan_deploy-{lmkan_deploy.__version__}-py3-none-linux_x86_64.whl"
    wheel.write_bytes(b"wheel")
    result = package_model(
        stack.onnx, tmp_path / "w", format="kserve", wheel=wheel, image="r.example:5000/a/b@sha256:0"
    )
    assert f"wheels/{wheel.name}" in result.files
    assert manifests(tmp_path / "w")[0]["spec"]["containers"][0]["image"] == "r.example:5000/a/b@sha256:0"


@pytest.mark.parametrize(
    ("name", "expected"), [("net", "net"), ("Net_2.x", "net-2-x"), ("9lives", "model-9lives"), ("a-", "a")]
)
def test_kubernetes_names(name: str, expected: str) -> None:
    assert kubernetes_name(name) == expected


def test_kserve_memory_grows_with_the_model(tmp_path: Path) -> None:
    torch.save(make_stack(64, 256, num_grids=12).state_dict(), tmp_path / "m.pt")  # 5.5 MB
    lmkan_deploy.export(tmp_path / "m.pt", tmp_path / "m.onnx", check=False)
    package_model(tmp_path / "m.onnx", tmp_path / "k", format="kserve", max_batch=20000)
    [container] = manifests(tmp_path / "k")[0]["spec"]["containers"]
    assert container["resources"]["requests"]["memory"] == "266Mi"
    # The server refuses a queue that holds less than a batch.
    assert container["args"][-2:] == ["--max-queue", "20000"]


def _strict(schema: Any) -> Any:
    """A CRD's schema as kubectl applies it: fields that it does not name are mistakes."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        result.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return result


def test_kserve_manifests_fit_the_schemas_of_kserve(kserve: Path) -> None:
    folder = os.environ.get("LMKAN_KSERVE_CRDS")
    if not folder:
        pytest.skip("LMKAN_KSERVE_CRDS is not set: no CRDs of KServe to check against")
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    for manifest, file in zip(manifests(kserve), ("servingruntimes", "inferenceservices"), strict=True):
        crd = yaml.load((Path(folder) / f"{file}.yaml").read_text(), yaml.CSafeLoader)
        release = manifest["apiVersion"].rpartition("/")[2]
        [version] = [v for v in crd["spec"]["versions"] if v["name"] == release]
        schema = _strict(version["schema"]["openAPIV3Schema"])
        # A CRD leaves these two to Kubernetes.
        schema["properties"]["metadata"] = {"type": "object"}
        validator = jsonschema_rs.Draft4Validator(schema)
        assert not [error.message for error in validator.iter_errors(manifest)]
        spec = manifest["spec"]
        container = spec["containers"][0] if "containers" in spec else spec["predictor"]["model"]
        container["prots"] = []
        assert not validator.is_valid(manifest), "a misspelt field passed"


def test_the_runtimes_command_serves_the_model(kserve: Path, stack: ExportedStack, tmp_path: Path) -> None:
    """What the container would run, with the folder and the ports of this machine."""
    for module in ("uvicorn", "starlette", "orjson", "prometheus_client", "httptools"):
        pytest.importorskip(module)
    [container] = manifests(kserve)[0]["spec"]["containers"]
    http, grpc = free_port(), free_port()
    here = {
        "/mnt/models": str(kserve / "models"),
        "0.0.0.0": "127.0.0.1",
        "8080": str(http),
        "8081": str(grpc),
    }
    arguments = [here.get(argument, argument) for argument in container["args"]]
    command = [sys.executable, "-m", "lmkan_deploy.cli", *arguments]
    log = tmp_path / "serve.log"
    with running(command, log) as process:
        address = f"http://127.0.0.1:{http}"
        wait_until_ready(address + container["readinessProbe"]["httpGet"]["path"], process, log)
        assert urllib.request.urlopen(address + container["livenessProbe"]["httpGet"]["path"]).status == 200
        runner = lmkan_deploy.load_runner(stack.onnx)
        x = sample(runner, 3)
        answer = post(f"{address}/v2/models/Net_v1.2/infer", infer_request(x))
        np.testing.assert_allclose(read_output(answer), runner.run(x)["y"], rtol=1e-5, atol=1e-5)


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


# --- Ray Serve ---------------------------------------------------------------------------------------


def test_ray_files(stack: ExportedStack, tmp_path: Path) -> None:
    package_model(
        stack.onnx, tmp_path / "r", format="ray", name="1.0", max_batch=64, max_delay_us=300, threads=2
    )
    config = yaml.safe_load((tmp_path / "r" / "serve_config.yaml").read_text())
    [application] = config["applications"]
    assert (application["name"], application["import_path"]) == ("1.0", "app:build")
    assert application["args"] == {"name": "1.0", "max_batch": 64, "max_delay_us": 300, "threads": 2}
    [deployment] = application["deployments"]
    assert deployment["name"] == "Model"
    assert deployment["ray_actor_options"] == {"num_cpus": 2}
    requirements = (tmp_path / "r" / "requirements.txt").read_text().splitlines()
    assert {"ray[serve]", "protobuf<7", "grpcio-reflection<1.82"} <= set(requirements)
    assert f"lmkan-deploy[cpu]=={lmkan_deploy.__version__}" in requirements
    readme = (tmp_path / "r" / "README.md").read_text()
    assert "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING=0" in readme
    assert "PYTHONPATH=$PWD" in readme


def _ray_stand_in() -> ModuleType:
    """Ray's decorators without Ray: a batch is what `infer.many` is called with, or one request."""

    class Batched:
        def __init__(self, function: Callable[..., Any]) -> None:
            self.function = function
            self.options: dict[str, float] = {}

        def __get__(self, owner: Any, _: type) -> Any:
            async def infer(request: Any) -> Any:
                [answer] = await self.function(owner, [request])
                return answer

            infer.many = types.MethodType(self.function, owner)  # type: ignore[attr-defined]
            for name in ("max_batch_size", "batch_wait_timeout_s"):
                setattr(infer, f"set_{name}", lambda value, name=name: self.options.update({name: value}))
            return infer

    class Deployment:
        def __init__(self, function: type) -> None:
            self.bind = function

    ray = ModuleType("ray")
    ray.serve = types.SimpleNamespace(  # type: ignore[attr-defined]
        deployment=lambda **_: Deployment, batch=lambda **_: Batched
    )
    return ray


@pytest.fixture
def ray_app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    pytest.importorskip("starlette")
    monkeypatch.setitem(sys.modules, "ray", _ray_stand_in())

    def start(model: Path, **args: Any) -> Any:
        package_model(model, tmp_path / "app", format="ray", name="net")
        return import_file(tmp_path / "app" / "app.py", "packaged_app").build({"name": "net", **args})

    return start


def call(app: Any, method: str, path: str, content: Any = None, root: str = "") -> tuple[int, Any]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {"type": "http", "method": method, "path": path, "root_path": root, "query_string": b"",
             "headers": [], "server": ("localhost", 80), "scheme": "http"}  # fmt: skip
    response = asyncio.run(app(Request(scope, receive)))
    return response.status_code, json.loads(response.body)


INFER = "/v2/models/net/infer"


def test_ray_app_answers(stack: ExportedStack, ray_app: Callable[..., Any]) -> None:
    app = ray_app(stack.onnx)
    runner = lmkan_deploy.load_runner(stack.onnx)
    x = sample(runner, 3)
    status, answer = call(app, "POST", INFER, {"id": "a", **infer_request(x)})
    assert (status, answer["id"], answer["model_name"]) == (200, "a", "net")
    np.testing.assert_array_equal(read_output(answer), runner.run(x)["y"])
    nested = infer_request(x, data=x["x"].tolist())
    nested["outputs"] = [{"name": "y"}]
    status, answer = call(app, "POST", "/app/v2/models/net/versions/1/infer", nested, root="/app")
    np.testing.assert_array_equal(read_output(answer), runner.run(x)["y"])
    status, metadata = call(app, "GET", "/v2/models/net")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 10]}]
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/net/ready"):
        assert call(app, "GET", path)[0] == 200
    for method, path in (
        ("GET", "/"),
        ("GET", INFER),
        ("POST", "/v2/models/nets/infer"),
        ("GET", "/v2/models/n"),
    ):
        status, answer = call(app, method, path)
        assert status == 404
        assert "expected GET /v2/models/net" in answer["error"]


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"{", "expected a JSON object"),
        (b"[" * 100_000, "expected a JSON object"),
        (b'{"inputs": [NaN]}', "NaN is no JSON"),
        ([], "expected a JSON object with a list of inputs"),
        ({"inputs": {}}, "expected a JSON object with a list of inputs"),
        ({"inputs": []}, "expected the inputs x, found none"),
        ({"inputs": ["x"]}, "expected the inputs x"),
        ({"datatype": "FP64"}, "expected datatype FP32 of input x, found 'FP64'"),
        ({"name": "z"}, "expected the inputs x"),
        ({"name": []}, "expected the inputs x"),
        ({"data": [1.0]}, "cannot reshape"),
        ({"data": [1e300] * 20}, "out of range"),
        ({"data": ["1"] * 20}, "found <U1 values"),
        ({"data": [[1.0], [1.0, 2.0]]}, "could not read them"),
        ({"shape": [20]}, "found shape [20]"),
        ({"shape": "a"}, "could not read them"),
        ({"shape": None}, "found shape None"),
        ({"shape": [-1, 10]}, "found shape [-1, 10]"),
        ({"data": [True] * 20}, "found bool values"),
        ({"outputs": [{"name": "z"}]}, "expected outputs of y, found 'z'"),
        ({"outputs": ["y"]}, "expected a list of objects as outputs"),
    ],
)
def test_ray_app_refuses_bad_requests(
    content: Any, fragment: str, stack: ExportedStack, ray_app: Callable[..., Any]
) -> None:
    app = ray_app(stack.onnx)
    x = {"x": np.ones((2, 10), np.float32)}
    if isinstance(content, dict) and "inputs" not in content:
        outputs = {"outputs": content["outputs"]} if "outputs" in content else {}
        content = {**infer_request(x, **({} if outputs else content)), **outputs}
    status, answer = call(app, "POST", INFER, content)
    assert status == 400
    assert fragment in answer["error"]
    assert "\n" not in answer["error"]


def test_ray_app_joins_requests(stack: ExportedStack, ray_app: Callable[..., Any]) -> None:
    app = ray_app(stack.onnx, max_batch=8)
    runner = lmkan_deploy.load_runner(stack.onnx)
    feeds = [sample(runner, rows, seed) for seed, rows in enumerate((3, 4, 2, 20, 1, 0))]
    runs: list[int] = []
    run = app.runner.run

    def counted(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        runs.append(len(inputs["x"]))
        return run(inputs)

    app.runner.run = counted
    answers = asyncio.run(app.infer.many(feeds))
    assert sorted(runs) == [1, 2, 7, 20]
    for x, (outputs, problem) in zip(feeds, answers, strict=True):
        assert problem is None
        np.testing.assert_allclose(outputs["y"], runner.run(x)["y"], rtol=1e-6, atol=1e-6)
    wrong = {"x": np.ones((2, 10), np.float64)}
    (_, first), (outputs, second) = asyncio.run(app.infer.many([wrong, feeds[0]]))
    assert "float64" in first
    assert second is None
    assert len(outputs["y"]) == 3


def test_ray_app_without_a_batch_axis(tmp_path: Path, ray_app: Callable[..., Any]) -> None:
    app = ray_app(no_batch(tmp_path / "sum.onnx"))
    answers = asyncio.run(app.infer.many([{"x": np.ones((rows, 3))} for rows in (1, 4)]))
    assert [outputs["total"].item() for outputs, _ in answers] == [3.0, 12.0]


@pytest.fixture
def ray_environment() -> dict[str, str]:
    venv = os.environ.get("LMKAN_RAY_VENV")
    if not venv:
        pytest.skip("LMKAN_RAY_VENV is not set: no Ray to start")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {
        **environment,
        "PATH": f"{venv}/bin:{os.environ['PATH']}",
        "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def test_a_real_ray_runs_the_configuration(
    stack: ExportedStack, tmp_path: Path, ray_environment: dict[str, str]
) -> None:
    package_model(stack.onnx, tmp_path / "app", format="ray", name="net")
    port = free_port()
    config = tmp_path / "app" / "serve_config.yaml"
    config.write_text(config.read_text().replace("0.0.0.0", "127.0.0.1").replace("8000", str(port)))
    log = tmp_path / "ray.log"
    command = ["serve", "run", "serve_config.yaml"]
    # Found by the shell: a process is looked for in this process's PATH.
    command[0] = shutil.which("serve", path=ray_environment["PATH"]) or "serve"
    with running(command, log, cwd=config.parent, env=ray_environment) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{url}/v2/models/net/ready", process, log)
        runner = lmkan_deploy.load_runner(stack.onnx)
        for rows in (1, 100):
            x = sample(runner, rows, rows)
            answer = post(url + INFER, infer_request(x))
            np.testing.assert_allclose(read_output(answer), runner.run(x)["y"], rtol=1e-5, atol=1e-5)
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(url + INFER, infer_request({"x": np.ones((1, 4), np.float32)}))
        assert caught.value.code == 400
        assert "found shape [1, 4]" in json.loads(caught.value.read())["error"]


def test_a_real_ray_survives_the_loss_of_a_node(
    stack: ExportedStack, tmp_path: Path, ray_environment: dict[str, str]
) -> None:
    package_model(stack.onnx, tmp_path / "app", format="ray", name="net")
    python = shutil.which("python", path=ray_environment["PATH"])
    result = subprocess.run(
        [str(python), str(TESTS / "ray_cluster.py"), str(tmp_path / "app"), str(free_port())],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        cwd=tmp_path,
        env={**ray_environment, "PYTHONPATH": str(tmp_path / "app")},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout.splitlines()[-1])
    print(report)
    assert report["both_nodes_used"]
    assert report["failed_before"] == 0
    assert report["answered_before"] > 0
    assert report["answered_after"] > 0
    assert (report["wrong"], report["lost"]) == (0, 0)
