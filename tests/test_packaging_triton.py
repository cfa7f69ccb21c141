"""Repositories for Triton, and a real tritonserver that starts from them where there is one.

Optional, each named by an environment variable:
LMKAN_PYTRITON_VENV, a virtual environment with nvidia-pytriton and onnxruntime, whose server is started;
LMKAN_TRITON_ORT_BACKEND, a folder with Triton's ONNX Runtime backend for that server.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from tritonclient.grpc import model_config_pb2

import lmkan_deploy
from lmkan_deploy.engines.manifest import Manifest, manifest_path
from lmkan_deploy.engines.profiles import ShapeRange
from lmkan_deploy.errors import LmkanError
from lmkan_deploy.packaging import PackageError, package_model
from lmkan_deploy.packaging.source import LIBRARY
from lmkan_deploy.staging import file_sha256
from networks import ExportedStack
from packaged import (
    config_of,
    free_port,
    import_file,
    make_model,
    no_batch,
    running,
    sample,
    two_inputs,
    wait_until_ready,
)

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
            "profiles": [{"x": ShapeRange((1, 10), (64, 10), (512, 10))}],
            "axes": {"x": ("batch", 10), "y": ("batch", 7)},
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
    fixed = {"x": ShapeRange((8, 10), (8, 10), (8, 10))}
    engine = make_engine(tmp_path / "e", stack.onnx, None, profiles=[fixed])
    for options in ({"plugin": tmp_path / "plugin.so"}, {"threads": 2}):
        [option] = options
        with pytest.raises(PackageError, match=f"with --{option}, found .*net.engine.*; leave it out"):
            package_model(engine, tmp_path / "r", **options)
    result = package_model(engine, tmp_path / "r")
    assert config_of(tmp_path / "r" / "net").max_batch_size == 0
    assert result.start == ["tritonserver --model-repository=."]
    assert not list((tmp_path / "r").rglob("*.so"))


@pytest.mark.parametrize(
    ("rows", "max_batch"),
    [
        ([(1, 16), (17, 512)], 512),
        ([(8, 512), (1, 8)], 512),
        ([(1, 16), (32, 512)], 16),  # no profile takes 17 rows
        ([(2, 16), (16, 512)], 0),
        ([(1, 16), (1, 2000)], 1024),  # the user's limit, by default
    ],
)
def test_an_engine_with_several_profiles(
    rows: list[tuple[int, int]], max_batch: int, stack: ExportedStack, tmp_path: Path
) -> None:
    profiles = [{"x": ShapeRange((low, 10), (high, 10), (high, 10))} for low, high in rows]
    engine = make_engine(tmp_path / "e", stack.onnx, None, profiles=profiles)
    package_model(engine, tmp_path / "r")
    config = config_of(tmp_path / "r" / "net")
    assert config.max_batch_size == max_batch
    assert list(config.instance_group[0].profile) == ["0", "1"]


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

    refused("expected a TensorRT plugin library .* found none; .*, or pass --plugin")
    refused("found no file .*gone.so; pass --plugin", plugin=tmp_path / "gone.so")
    for format_name in ("triton-python", "kserve", "ray"):
        refused(f"expected an .onnx file for the format {format_name}", format=format_name)
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


@pytest.mark.parametrize(("given", "found"), [(None, "1"), ("0", "0")])
def test_python_model_lets_onnxruntime_send_nothing(given: str | None, found: str, tmp_path: Path) -> None:
    template = Path(lmkan_deploy.__file__).parent / "packaging" / "templates" / "triton_model.py"
    (tmp_path / "onnxruntime.py").write_text("import os; print(os.environ.get('ORT_DISABLE_TELEMETRY'))")
    (tmp_path / "triton_python_backend_utils.py").touch()
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    if given is not None:
        environment["ORT_DISABLE_TELEMETRY"] = given
    environment["PYTHONPATH"] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, template], capture_output=True, text=True, env=environment, check=True
    )
    assert result.stdout == f"{found}\n"


# --- Triton for real ---------------------------------------------------------------------------------


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
