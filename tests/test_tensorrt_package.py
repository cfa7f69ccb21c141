"""The plugin in TensorRT's own registry, and the interface of TensorRT's Python package; no GPU is needed.

Of TensorRT a package index has the runtime alone ("lean") and both Python modules; the builder and the parser are
elsewhere. TensorRT runs in processes of its own, since TensorRT-RTX has symbols of the same names.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from emulated_gpu import Context, Engine, Registry
from lmkan_deploy.engines import build, plugin
from lmkan_deploy.errors import EngineError, LibraryError
from lmkan_deploy.runtime.tensorrt_plugin import plugin_versions
from lmkan_deploy.spec import OP_TYPE, QUANTIZED_OP_TYPE
from networks import ExportedStack


def python(script: str, *arguments: object) -> Any:
    """What a script prints last, as JSON."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


# --- The registry --------------------------------------------------------------------------------------

LOAD = """
import json, sys
from pathlib import Path
import tensorrt_lean_bindings as trt
from lmkan_deploy.engines.plugin import load_plugin
from lmkan_deploy.engines.tensorrt_api import make_log

library = Path(sys.argv[1])
for _ in range(2):
    load_plugin(trt, make_log(trt), library)
registry = trt.get_plugin_registry()
again = registry.load_library(str(library))
creators = [creator for creator in registry.all_creators if creator.name.startswith("LMKAN")]
plugins = []
for creator in creators:
    for phase in (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME):
        fields = [trt.PluginField("layer_name", b"layer 7", trt.PluginFieldType.CHAR)]
        made = creator.create_plugin("layer", trt.PluginFieldCollection(fields), phase)
        core, build, runtime = (
            made.get_capability_interface(getattr(trt.PluginCapabilityType, kind))
            for kind in ("CORE", "BUILD", "RUNTIME")
        )
        plugins.append([core.plugin_name, core.plugin_version, core.plugin_namespace, build.num_outputs])
wrong = trt.PluginFieldCollection([trt.PluginField("nonsense", b"7", trt.PluginFieldType.CHAR)])
refused = creators[0].create_plugin("layer", wrong, trt.TensorRTPhase.BUILD)
print(json.dumps({
    "creators": sorted([c.name, c.plugin_version, c.plugin_namespace] for c in creators),
    "plugins": sorted(plugins),
    "again": again is not None,
    "refused": refused is None,
}))
"""


def test_tensorrt_loads_the_plugin(cuda_build: Path) -> None:
    found = python(LOAD, next(cuda_build.rglob("liblmkan_tensorrt.so")))
    names = sorted([OP_TYPE, QUANTIZED_OP_TYPE])
    assert found["creators"] == [[name, "1", "lmkan"] for name in names]
    assert found["plugins"] == [[name, "1", "lmkan", 1] for name in names for _ in range(2)]
    assert not found["again"]  # hence load_plugin's notes of what it has loaded
    assert found["refused"]


def test_a_plugin_of_another_release_is_refused(cuda_build: Path) -> None:
    library = next(cuda_build.rglob("liblmkan_tensorrt.so"))
    release = python("import json, tensorrt_lean_bindings as trt; print(json.dumps(trt.__version__))")
    own = plugin_versions(library).tensorrt
    trt = types.SimpleNamespace(__version__=release)
    if own.split(".")[0] == release.split(".")[0]:
        assert plugin.find_plugin(trt, library) == library.resolve()
        return
    message = (
        rf"for TensorRT {re.escape(release)}, found {re.escape(str(library))} for TensorRT {own}; make one"
    )
    with pytest.raises(EngineError, match=message):
        plugin.find_plugin(trt, library)


# --- The Python package --------------------------------------------------------------------------------

# What TensorRT's Python module wants of libraries that no index has.
MISSING_LIBRARIES = ("libnvinfer.so.11", "libnvonnxparser.so.11", "libnvinfer_plugin.so.11")
MISSING_FUNCTIONS = """
#include <stdlib.h>
void createInferBuilder_INTERNAL(void) { abort(); }
void createNvOnnxParser_INTERNAL(void) { abort(); }
void createNvOnnxParserRefitter_INTERNAL(void) { abort(); }
void getBuilderPluginRegistry(void) { abort(); }
void getNvOnnxParserVersion(void) { abort(); }
void initLibNvInferPlugins(void) { abort(); }
"""

DESCRIBE = """
import ctypes, json, sys
from pathlib import Path
import tensorrt_lean_libs

lean = next(Path(tensorrt_lean_libs.__file__).parent.glob("libnvinfer_lean.so*"))
for library in (lean, *sys.argv[1:]):
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
import tensorrt_bindings as trt

def describe(thing):
    return {name: getattr(thing, name).__doc__ or "" for name in dir(thing) if not name.startswith("_")}

print(json.dumps({"": describe(trt)} | {
    name: describe(kind) for name, kind in vars(trt).items() if isinstance(kind, type)
}))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Class -> member -> what its documentation says; the module's own members have the class ""."""
    folder = tmp_path_factory.mktemp("tensorrt")
    source = folder / "missing.c"
    source.write_text(MISSING_FUNCTIONS)
    for name in MISSING_LIBRARIES:
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source]
        subprocess.run(command, check=True)
    return python(DESCRIBE, *(folder / name for name in MISSING_LIBRARIES))


USED = {
    "": "Builder OnnxParser Runtime get_plugin_registry ILogger IProgressMonitor",
    "Builder": "create_network create_builder_config create_optimization_profile build_serialized_network",
    "ExecutionContextAllocationStrategy": "USER_MANAGED",
    "IBuilderConfig": "add_optimization_profile progress_monitor create_timing_cache set_timing_cache "
    "get_timing_cache",
    "ICudaEngine": "num_io_tensors get_tensor_name get_tensor_mode get_tensor_dtype get_tensor_shape "
    "device_memory_size_v2 create_execution_context",
    "IExecutionContext": "set_optimization_profile_async set_device_memory set_input_shape set_tensor_address "
    "get_tensor_shape execute_async_v3",
    "ILayer": "type",
    "ILogger": "log Severity",
    "INetworkDefinition": "num_layers get_layer",
    "IOptimizationProfile": "set_shape",
    "IPluginRegistry": "load_library all_creators",
    "IProgressMonitor": "phase_start phase_finish step_complete",
    "ITimingCache": "serialize",
    "LayerType": "PLUGIN_V3",
    "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
    "OnnxParser": "parse_from_file num_errors get_error",
    "ParserError": "node_operator node_name desc",
    "Runtime": "deserialize_cuda_engine",
    "TensorIOMode": "INPUT",
}
"""What `lmkan_deploy.engines` uses of TensorRT, by class."""


@pytest.mark.parametrize("kind", USED)
def test_tensorrt_has_what_engines_use(package: dict[str, dict[str, str]], kind: str) -> None:
    assert set(USED[kind].split()) - set(package[kind]) == set()


def signatures(documentation: str) -> list[list[str]]:
    """Names of the arguments of each overload, but for self."""
    found = re.findall(r"^(?:\d+\. )?\w+\((.*)\) -> ", documentation, re.MULTILINE)
    # Types may have commas and brackets of their own.
    names = [re.findall(r"(?:^|, )(\w+):", arguments) for arguments in found if "*args" not in arguments]
    return [[name for name in overload if name != "self"] for overload in names]


@pytest.mark.parametrize(
    ("emulated", "kind"),
    [(Engine, "ICudaEngine"), (Context, "IExecutionContext"), (Registry, "IPluginRegistry")],
)
def test_the_emulated_tensorrt_takes_what_tensorrt_takes(
    package: dict[str, dict[str, str]], emulated: type, kind: str
) -> None:
    methods = inspect.getmembers(emulated, inspect.isfunction)
    public = {name: method for name, method in methods if not name.startswith("_")}
    assert public
    for name, method in public.items():
        count = len(inspect.signature(method).parameters) - 1
        overloads = signatures(package[kind][name])
        assert count in {len(overload) for overload in overloads}, (name, overloads)


# --- Without a GPU -------------------------------------------------------------------------------------


def test_tensorrt_is_not_touched_without_a_gpu(
    stack: ExportedStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    monkeypatch.setattr(build, "compute_capability", lambda: None)
    with pytest.raises(
        LibraryError, match=r"expected a GPU .*, found none; .* --runtime tensorrt-rtx, which"
    ):
        build.build_engine(stack.onnx, tmp_path / "m.engine", runtime="tensorrt")
    assert list(tmp_path.iterdir()) == []
