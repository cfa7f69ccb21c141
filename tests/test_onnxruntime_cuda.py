"""The library with operators for both providers: on a GPU, and without one, where it serves the CPU's."""

from __future__ import annotations

import json
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import lmkan_deploy
from lmkan_deploy.converters.onnx_function import PLUGIN_ATTRIBUTES
from lmkan_deploy.engines.device import compute_capability
from lmkan_deploy.errors import LibraryError
from lmkan_deploy.reference import dequantize_table, lookup2d
from lmkan_deploy.runtime.libraries import ENVIRONMENT_VARIABLE
from lmkan_deploy.spec import DOMAIN, OP_TYPE, OPSET_VERSION, QUANTIZED_OP_TYPE
from networks import ExportedStack

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest) -> Path:
    """Of the folder that the environment names, if it is there: the build then needs no headers."""
    path = Path(os.environ.get(ENVIRONMENT_VARIABLE, "")) / "liblmkan_onnxruntime_cuda.so"
    if path.is_file():
        return path
    return next(request.getfixturevalue("cuda_build").rglob("liblmkan_onnxruntime_cuda.so"))


def test_it_serves_the_cpu_without_cuda(library: Path, stack: ExportedStack) -> None:
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(stack.onnx, options, providers=["CPUExecutionProvider"])
    runner = lmkan_deploy.load_runner(stack.onnx)
    features = runner.inputs[0].shape[1]
    x = np.random.default_rng(0).standard_normal((33, features), dtype=np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], runner.run({"x": x})["y"])


def test_symbols(library: Path) -> None:
    command = ["nm", "-D", "--defined-only", str(library)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    exported = {line.split()[-1] for line in output.splitlines()}
    assert exported == {"RegisterCustomOps", "lmkan_abi_version", "lmkan_version"}
    command = ["readelf", "-d", str(library)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*?)\.so", output)
    assert set(needed) <= {"libc", "libm", "libdl", "librt", "libpthread", "ld-linux-x86-64"}, needed


def test_a_missing_provider_is_named(stack: ExportedStack) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    with pytest.raises(LibraryError, match=r"with its CUDA provider, found .*; install lmkan-deploy\[gpu\]"):
        lmkan_deploy.load_runner(stack.onnx, "onnxruntime-cuda")


def test_a_missing_library_is_named() -> None:
    with pytest.raises(LibraryError, match=r"found none; .*LMKAN_BUILD_CUDA=ON"):
        lmkan_deploy.get_library_path("onnxruntime-cuda")


# --- On a GPU ----------------------------------------------------------------------------------------

if compute_capability() is None:
    MISSING = "a GPU, found none"
elif CUDA not in ort.get_available_providers():
    MISSING = "ONNX Runtime with its CUDA provider (onnxruntime-gpu), found one without"
else:
    MISSING = ""

on_a_gpu = pytest.mark.skipif(bool(MISSING), reason=f"needs {MISSING}")

FLOATS = {
    "float32": (TensorProto.FLOAT, np.float32),
    "float16": (TensorProto.FLOAT16, np.float16),
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}  # of the largest output, by x's type


def random_table(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, ...]:
    """A table, and its scales where it has integers."""
    if dtype == "int8":
        scale = rng.uniform(0.01, 0.1, (shape[0], shape[3])).astype(np.float32)
        return rng.integers(-127, 128, shape, np.int8), scale
    return (rng.standard_normal(shape).astype(FLOATS[dtype][1]),)


def expected(x: np.ndarray, *layers: tuple[np.ndarray, ...]) -> np.ndarray:
    y = x.astype(np.float64)
    for table, *scale in layers:
        y = lookup2d(y, dequantize_table(table, *scale) if scale else table)
    return y


def model_of(
    *layers: tuple[np.ndarray, ...],
    x_type: str = "float32",
    rows: int | str = "rows",
    between: str = "Identity",
) -> onnx.ModelProto:
    """Lookups with an operator between them; x and y are float32 outside, `x_type` inside."""
    nodes = [helper.make_node("Cast", ["x"], ["h0"], to=FLOATS[x_type][0])]
    initializers = []
    for i, arrays in enumerate(layers):
        if i > 0:
            nodes.append(helper.make_node(between, [f"y{i - 1}"], [f"h{i}"], f"between{i}"))
        names = [f"{name}{i}" for name in ("table", "scale")][: len(arrays)]
        initializers += [numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True)]
        op_type = OP_TYPE if len(arrays) == 1 else QUANTIZED_OP_TYPE
        nodes.append(
            helper.make_node(
                op_type, [f"h{i}", *names], [f"y{i}"], f"layer{i}", domain=DOMAIN, **PLUGIN_ATTRIBUTES
            )
        )
    nodes.append(helper.make_node("Cast", [f"y{len(layers) - 1}"], ["y"], to=TensorProto.FLOAT))
    x_shape, y_shape = (rows, 2 * len(layers[0][0])), (rows, layers[-1][0].shape[3])
    graph = helper.make_graph(
        nodes,
        "lookups",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y_shape)],
        initializers,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, OPSET_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def make_session(
    library: Path, model: onnx.ModelProto, *, mixed: bool = False, profile: Path | None = None, **options: str
) -> ort.InferenceSession:
    """In the CUDA provider, all of it unless it is mixed."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.register_custom_ops_library(str(library))
    if not mixed:
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if profile is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profile)
    providers: list[Any] = [(CUDA, options), *([CPU] if mixed else [])]
    return ort.InferenceSession(model.SerializeToString(), settings, providers=providers)


def rows_of(count: int, features: int, seed: int = 0) -> np.ndarray:
    return 2 * np.random.default_rng(seed).standard_normal((count, features), dtype=np.float32)


def check_close(y: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(y, want, rtol=0, atol=tolerance * np.abs(want).max(initial=1e-30))


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("table_type", [*FLOATS, "int8"])
@pytest.mark.parametrize("x_type", FLOATS)
def test_values(x_type: str, table_type: str, library: Path) -> None:
    layer = random_table(np.random.default_rng(1), (5, 9, 9, 21), table_type)
    session = make_session(library, model_of(layer, x_type=x_type))
    tolerance = max(TOLERANCE[x_type], 1e-3 if table_type == "int8" else 0)
    for count in (1, 9, 3000, 0):
        x = rows_of(count, 10, count).astype(FLOATS[x_type][1]).astype(np.float32)
        y = session.run(None, {"x": x})[0]
        assert y.shape == (count, 21)
        check_close(y, expected(x, layer), tolerance)


def bind(session: ort.InferenceSession, x: np.ndarray, outputs: int) -> tuple[Any, Any, Any]:
    """A binding with x and y on the GPU, y full of NaN."""
    binding = session.io_binding()
    x_value = ort.OrtValue.ortvalue_from_numpy(x, "cuda", 0)
    y_value = ort.OrtValue.ortvalue_from_numpy(np.full((len(x), outputs), np.nan, np.float32), "cuda", 0)
    binding.bind_ortvalue_input("x", x_value)
    binding.bind_ortvalue_output("y", y_value)
    return binding, x_value, y_value


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("table_type", ["float32", "float16", "int8"])
def test_memory_of_the_device_is_bound(table_type: str, library: Path) -> None:
    layer = random_table(np.random.default_rng(1), (8, 13, 13, 40), table_type)
    session = make_session(library, model_of(layer))
    for count in (1, 700):
        x = rows_of(count, 16, 0)
        binding, x_value, y_value = bind(session, x, 40)
        for seed in range(3):
            x = rows_of(count, 16, seed)
            x_value.update_inplace(x)
            session.run_with_iobinding(binding)
            check_close(y_value.numpy(), expected(x, layer), 1e-3 if table_type == "int8" else 1e-5)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("table_type", ["float32", "int8"])
def test_cuda_graphs(table_type: str, library: Path) -> None:
    rng = np.random.default_rng(1)
    layers = [random_table(rng, shape, table_type) for shape in ((8, 13, 13, 40), (20, 9, 9, 6))]
    # ONNX Runtime drops Identity and casts to the same type: only lookups are left.
    session = make_session(library, model_of(*layers, rows=64), enable_cuda_graph="1")
    binding, x_value, y_value = bind(session, rows_of(64, 16), 6)
    # One run, one that is captured, and replays.
    for seed in range(6):
        x = rows_of(64, 16, seed)
        x_value.update_inplace(x)
        y_value.update_inplace(np.full((64, 6), np.nan, np.float32))
        session.run_with_iobinding(binding)
        check_close(y_value.numpy(), expected(x, *layers), 5e-3 if table_type == "int8" else 5e-5)


@pytest.mark.gpu
@on_a_gpu
def test_a_session_of_both_providers(library: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    layers = [random_table(rng, shape, "float32") for shape in ((8, 13, 13, 40), (20, 9, 9, 6))]
    # The CUDA provider has no Atan, so that the CPU's computes what is between the lookups.
    model = model_of(*layers, between="Atan")
    session = make_session(library, model, mixed=True, profile=tmp_path / "profile")
    for count in (1, 300):
        x = rows_of(count, 16, count)
        want = expected(np.arctan(expected(x, layers[0])), layers[1])
        check_close(session.run(None, {"x": x})[0], want, 5e-5)
    events = json.loads(Path(session.end_profiling()).read_text())
    providers = {
        event["args"]["op_name"]: event["args"]["provider"]
        for event in events
        if event.get("cat") == "Node" and event["args"].get("provider")
    }
    assert (providers[OP_TYPE], providers["Atan"]) == (CUDA, CPU)


@pytest.mark.gpu
@on_a_gpu
def test_a_session_of_the_cpu_beside_one_of_the_gpu(library: Path) -> None:
    layer = random_table(np.random.default_rng(1), (8, 13, 13, 40), "float32")
    on_gpu = make_session(library, model_of(layer))
    settings = ort.SessionOptions()
    settings.register_custom_ops_library(str(library))
    on_cpu = ort.InferenceSession(model_of(layer).SerializeToString(), settings, providers=[CPU])
    for seed in range(3):
        x = rows_of(50, 16, seed)
        check_close(on_gpu.run(None, {"x": x})[0], expected(x, layer), 1e-5)
        check_close(on_cpu.run(None, {"x": x})[0], expected(x, layer), 1e-5)


@pytest.mark.gpu
@on_a_gpu
def test_two_threads_share_a_session(library: Path) -> None:
    rng = np.random.default_rng(1)
    layers = [random_table(rng, shape, "float16") for shape in ((8, 13, 13, 40), (20, 9, 9, 6))]
    session = make_session(library, model_of(*layers))
    batches = [rows_of(1 + 37 * i % 500, 16, i) for i in range(40)]
    want = [session.run(None, {"x": x})[0] for x in batches]
    for x, y in zip(batches, want, strict=True):
        check_close(y, expected(x, *layers), 5e-5)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda x: session.run(None, {"x": x})[0], batches))
    for a, b in zip(want, found, strict=True):
        np.testing.assert_array_equal(a, b)
