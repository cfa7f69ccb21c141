"""The TensorRT plugin's contract, and engines that need no plugin; no GPU is needed.

NVIDIA's TensorRT-RTX loads the library, creates plugins and parses models. The methods that only an engine
calls are called by a driver of our own. There the plugin has kernels that compute on host memory, so that
values come out; the library with the CUDA kernels is checked for all that needs no device.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
import pytest
import tensorrt_rtx as trt
import torch
from torch import nn

import lmkan_deploy
from lmkan_deploy.converters.onnx_function import PLUGIN_ATTRIBUTES
from lmkan_deploy.errors import LibraryError
from lmkan_deploy.nn import LMKANConv2d, PreconditionedLMKAN2D, Preconditioning
from lmkan_deploy.reference import dequantize_table, lookup2d
from lmkan_deploy.runtime.tensorrt_plugin import (
    PluginVersions,
    build_tensorrt_plugin,
    find_tensorrt_plugin,
    plugin_versions,
)
from lmkan_deploy.spec import DOMAIN, OP_TYPE, OPSET_VERSION, QUANTIZED_OP_TYPE
from networks import make_stack
from tensorrt_driver import Library, Plugin, PluginField, PluginTensorDesc, dynamic_tensor, tensor

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "plugins/tensorrt"
OPERATORS = (OP_TYPE, QUANTIZED_OP_TYPE)  # in the order of their creators

FLOAT, HALF, BF16, INT8 = (
    int(kind) for kind in (trt.DataType.FLOAT, trt.DataType.HALF, trt.DataType.BF16, trt.DataType.INT8)
)
ALL_TYPES = [int(kind) for kind in trt.DataType.__members__.values()]
FLOATS = (FLOAT, HALF, BF16)
NUMPY = {FLOAT: np.float32, HALF: np.float16, BF16: ml_dtypes.bfloat16, INT8: np.int8}
RTOL = {FLOAT: 1e-5, HALF: 2e-3, BF16: 2e-2}  # of the largest output, by x's type
AUTO, GATHER, SHARED, NARROW, SPLIT = 0, 1, 2, 3, 4
CHAR = int(trt.PluginFieldType.CHAR)
INT32 = int(trt.PluginFieldType.INT32)

# --- Libraries -----------------------------------------------------------------------------------------


def run(*command: object, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def headers() -> Path:
    """TensorRT's headers; the build finds them in the same way."""
    return Path(
        os.environ.get("TENSORRT_INCLUDE_DIR")
        or run(sys.executable, ROOT / "plugins/cmake/fetch_headers.py", "tensorrt").strip()
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensorrt")


@pytest.fixture(scope="session")
def host_kernels(folder: Path) -> Path:
    """An archive with the interface of the CUDA kernels over the CPU's kernels."""
    run("g++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-c", "-I", ROOT / "plugins/include",
        PLUGIN / "tests/host_kernels.cc", "-o", folder / "host_kernels.o")  # fmt: skip
    run("ar", "rcs", folder / "liblmkan_host_kernels.a", folder / "host_kernels.o")
    return folder / "liblmkan_host_kernels.a"


def needed_by_host_kernels() -> str:
    """The linker's options for what they call."""
    cpu = lmkan_deploy.get_library_path("cpu")
    return f"-L{cpu.parent} -l:{cpu.name} -Wl,-rpath,{cpu.parent}"


@pytest.fixture(scope="session")
def host_plugin(folder: Path, headers: Path, host_kernels: Path) -> Path:
    """The plugin around them, as a user's machine compiles it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDFLAGS", needed_by_host_kernels())
        return build_tensorrt_plugin(headers, folder / "liblmkan_tensorrt_host.so", kernels=host_kernels)


@pytest.fixture(scope="session")
def cuda_plugin(cuda_build: Path) -> Path:
    """The plugin with the CUDA kernels inside, as the project builds it."""
    return next(cuda_build.rglob("liblmkan_tensorrt.so"))


@pytest.fixture(scope="session")
def driver(folder: Path, headers: Path) -> Path:
    path = folder / "libdriver.so"
    run("g++", "-std=c++17", "-fPIC", "-shared", "-isystem", headers, "-idirafter", PLUGIN / "cuda_types",
        PLUGIN / "tests/driver.cc", "-o", path)  # fmt: skip
    return path


@pytest.fixture(scope="session")
def host_library(driver: Path, host_plugin: Path) -> Library:
    return Library(driver, host_plugin)


@pytest.fixture(scope="session")
def cuda_library(driver: Path, cuda_plugin: Path) -> Library:
    return Library(driver, cuda_plugin)


@pytest.fixture
def host(host_library: Library) -> Iterator[Library]:
    """A test must have looked at every line that is logged, here and below."""
    host_library.listen()
    yield host_library
    assert host_library.lines == []


@pytest.fixture
def cuda(cuda_library: Library) -> Iterator[Library]:
    cuda_library.listen()
    yield cuda_library
    assert cuda_library.lines == []


@pytest.fixture(params=["host", "cuda"])
def library(request: pytest.FixtureRequest) -> Library:
    return request.getfixturevalue(request.param)


def create(library: Library, quantized: bool = False, **arguments: Any) -> Plugin:
    plugin = library.create(int(quantized), **arguments)
    assert plugin is not None, library.lines
    return plugin


@pytest.mark.parametrize("which", ["host_plugin", "cuda_plugin"])
def test_the_library_exports_two_symbols_and_needs_neither_tensorrt_nor_cuda(
    which: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(which)
    exported = {line.split()[-1] for line in run("nm", "-D", "--defined-only", path).splitlines()}
    assert exported == {"getCreators", "setLoggerFinder"}
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", path)))
    system = {"libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "ld-linux-x86-64.so.2"}
    assert needed - system == ({"liblmkan_cpu.so"} if which == "host_plugin" else set())
    assert "undefined symbol" not in run("ldd", "-r", path)


# --- Loaded by TensorRT-RTX ----------------------------------------------------------------------------


@pytest.fixture
def registry(cuda_plugin: Path) -> Iterator[Any]:
    """TensorRT's registry with the plugin library, which it unloads afterwards."""
    found = trt.get_plugin_registry()
    handle = found.load_library(str(cuda_plugin))
    yield found
    found.deregister_library(handle)
    assert OP_TYPE not in {creator.name for creator in found.all_creators}


def get_creator(registry: Any, name: str) -> Any:
    creator = registry.get_creator(name, str(OPSET_VERSION), DOMAIN)
    assert creator is not None
    return creator


def test_tensorrt_finds_the_creators(registry: Any) -> None:
    ours = [creator for creator in registry.all_creators if creator.name.startswith("LMKAN")]
    assert sorted(creator.name for creator in ours) == sorted(OPERATORS)
    for creator in ours:
        assert type(creator) is trt.IPluginCreatorV3One
        assert {
            "plugin_namespace": creator.plugin_namespace,
            "plugin_version": creator.plugin_version,
        } == PLUGIN_ATTRIBUTES
        assert len(creator.field_names) == 0  # the parser warns of each that a node lacks
    assert registry.get_creator(OP_TYPE, "2", DOMAIN) is None
    assert registry.get_creator(OP_TYPE, "1", "") is None


@pytest.mark.parametrize("phase", [trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME])
@pytest.mark.parametrize("name", OPERATORS)
def test_tensorrt_creates_plugins(registry: Any, name: str, phase: Any) -> None:
    creator = get_creator(registry, name)
    field = trt.PluginField("layer_name", b"layer 7", trt.PluginFieldType.CHAR)
    for fields in ([], [field]):
        plugin = creator.create_plugin("layer", trt.PluginFieldCollection(fields), phase)
        core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
        build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
        runtime = plugin.get_capability_interface(trt.PluginCapabilityType.RUNTIME)
        assert (core.plugin_name, core.plugin_version, core.plugin_namespace) == (name, "1", DOMAIN)
        assert [i.interface_info.kind for i in (plugin, core, build, runtime)] == [
            "PLUGIN",
            "PLUGIN_V3ONE_CORE",
            "PLUGIN_V3ONE_BUILD",
            "PLUGIN_V3ONE_RUNTIME",
        ]
        assert build.num_outputs == 1
        assert build.timing_cache_id == f"lmkan-{lmkan_deploy.__version__}"
        assert build.metadata_string == f"lmkan-deploy {lmkan_deploy.__version__}"
        assert build.format_combination_limit >= 9  # types of x times types of table


@pytest.mark.parametrize(
    "field",
    [
        trt.PluginField("nonsense", b"layer 7", trt.PluginFieldType.CHAR),
        trt.PluginField("layer_name", np.array([7], np.int32), trt.PluginFieldType.INT32),
    ],
    ids=["name", "type"],
)
def test_tensorrt_gets_no_plugin_for_bad_fields(registry: Any, field: Any) -> None:
    creator = get_creator(registry, OP_TYPE)
    collection = trt.PluginFieldCollection([field])
    assert creator.create_plugin("layer", collection, trt.TensorRTPhase.BUILD) is None


# TensorRT-RTX has no plugin layers: it ends the process once the parser has created the plugin.
PARSE = """
import sys, tensorrt_rtx as trt
class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
    def log(self, severity, message):
        print(severity.name, message, flush=True)
logger = Logger()
builder = trt.Builder(logger)
assert trt.get_plugin_registry().load_library(sys.argv[1])
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
print("parsed", parser.parse_from_file(sys.argv[2]), network.num_layers)
"""


def parse_with_plugin(plugin: Path, model: Path) -> str:
    command = [sys.executable, "-c", PARSE, str(plugin), str(model)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("function", [True, False], ids=["with the function", "without"])
@pytest.mark.parametrize("attributes", [True, False], ids=["with attributes", "without"])
def test_the_parser_takes_the_plugin(
    stack: Any, cuda_plugin: Path, tmp_path: Path, attributes: bool, function: bool
) -> None:
    model = onnx.load(stack.onnx)
    if not function:
        del model.functions[:]
    for node in model.graph.node:
        if node.op_type == OP_TYPE and not attributes:
            del node.attribute[:]
    onnx.save(model, tmp_path / "model.onnx")
    output = parse_with_plugin(cuda_plugin, tmp_path / "model.onnx")
    assert "not found in plugin node" not in output
    if function and not attributes:  # nothing tells this parser to prefer the plugin
        assert "created plugin" not in output
        assert "parsed True" in output
    else:
        assert f"Successfully created plugin: {OP_TYPE}\n" in output


def test_the_parser_takes_the_plugin_of_quantized_tables(
    stack: Any, cuda_plugin: Path, tmp_path: Path
) -> None:
    lmkan_deploy.export(stack.checkpoint, tmp_path / "model.onnx", table_dtype="int8", check=False)
    output = parse_with_plugin(cuda_plugin, tmp_path / "model.onnx")
    assert f"Successfully created plugin: {QUANTIZED_OP_TYPE}\n" in output


# --- Opened by a program that does not register plugins -------------------------------------------------


def open_libraries(*paths: object) -> subprocess.CompletedProcess[str]:
    code = "import ctypes, sys; [ctypes.CDLL(path) for path in sys.argv[1:]]"
    command = [sys.executable, "-c", code, *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_opening_the_second_library_registers_the_plugin(
    folder: Path, headers: Path, host_plugin: Path, tmp_path: Path
) -> None:
    major = re.search(r"define TRT_MAJOR_ENTERPRISE (\d+)", (headers / "NvInferVersion.h").read_text())[1]
    soname = f"libnvinfer.so.{major}"
    run("g++", "-std=c++17", "-fPIC", "-shared", "-isystem", headers, "-idirafter", PLUGIN / "cuda_types",
        PLUGIN / "tests/registry.cc", f"-Wl,-soname,{soname}", "-o", folder / soname)  # fmt: skip
    register = host_plugin.with_name(f"{host_plugin.stem}_register.so")
    opened = open_libraries(folder / soname, register)
    assert (opened.stdout, opened.stderr) == (f"loadLibrary {host_plugin}\n", "")

    opened = open_libraries(register)
    expected = f"lmkan: expected a process with {soname}, found none; load the plugin after TensorRT\n"
    assert (opened.stdout, opened.stderr) == ("", expected)

    alone = tmp_path / register.name
    alone.write_bytes(register.read_bytes())
    opened = open_libraries(folder / soname, alone)
    plugin = tmp_path / host_plugin.name
    assert opened.stderr == f'lmkan: expected TensorRT to load "{plugin}", but it refused; see its log\n'


# --- Creation ------------------------------------------------------------------------------------------


def layer_name(text: bytes, kind: int = CHAR, length: int | None = None) -> PluginField:
    data = ctypes.create_string_buffer(text, max(len(text), 1))
    field = PluginField(b"layer_name", ctypes.addressof(data), kind, len(text) if length is None else length)
    field.keep = data
    return field


def test_the_library_has_a_creator_for_each_operator(library: Library) -> None:
    assert library.count == len(OPERATORS)
    for index, name in enumerate(OPERATORS):
        plugin = create(library, bool(index))
        assert plugin.name == name
        assert [plugin.has_capability(kind) for kind in (0, 1, 2, 3)] == [True, True, True, False]
    assert create(library, name=None).name == OP_TYPE


@pytest.mark.parametrize(
    ("field", "found"),
    [
        (
            PluginField(b"nonsense", None, CHAR, 0),
            'expected no field other than layer_name, found "nonsense"',
        ),
        (PluginField(None, None, CHAR, 0), 'expected no field other than layer_name, found ""'),
        (layer_name(b"a", INT32), "found length 1 of type 5"),
        (layer_name(b""), "found length 0 of type 6"),
        (layer_name(b"a", length=-1), "found length -1 of type 6"),
        (layer_name(b"a" * 1025), "found length 1025 of type 6"),
        (PluginField(b"layer_name", None, CHAR, 1), "found length 1 of type 6 without data"),
    ],
    ids=["name", "no name", "type", "empty", "negative", "long", "no data"],
)
def test_bad_fields_are_refused(library: Library, field: PluginField, found: str) -> None:
    assert library.create(1, "layer 3", [field]) is None
    line = library.only_line()
    assert line.startswith(f'{QUANTIZED_OP_TYPE} layer "layer 3": expected ')
    assert line.endswith(found)


@pytest.mark.parametrize("quantized", [False, True])
def test_an_engine_keeps_the_layers_name(library: Library, quantized: bool) -> None:
    plugin = create(library, quantized, name="encoder/layer 5")
    (field,) = plugin.fields()
    assert (field.name, field.type, field.length) == (b"layer_name", CHAR, 15)
    again = create(library, quantized, name="", fields=[field], phase=1)
    for each in (again, again.clone(), again.attach()):
        assert each.name == OPERATORS[quantized]
        (kept,) = each.fields()
        assert ctypes.string_at(kept.data, kept.length) == b"encoder/layer 5"
        assert each.output_types([]) is None
        assert 'layer "encoder/layer 5": ' in library.only_line()
    assert create(library, quantized, name="").fields() == []
    assert create(library, name="x" * 5000).fields()[0].length == 1024
    plugin = create(library, name="é" * 1000 + "x")  # cut between characters
    (field,) = plugin.fields()
    assert ctypes.string_at(field.data, field.length).decode() == "é" * 512
    assert plugin.output_types([]) is None
    assert f'layer "{"é" * 80}": ' in library.only_line()


def test_clones_outlive_their_original_and_share_nothing_with_it(host: Library) -> None:
    original = create(host)
    tensors = profile([-1, 6], [3, 5, 5, 7])
    assert original.configure(tensors) == 0
    original.set_tactic(SPLIT)
    clones = [original.clone(), original.attach()]
    original.set_tactic(GATHER)
    addresses = {field.data for each in (original, *clones) for field in each.fields()}
    assert len(addresses) == 3
    assert original.configure(profile([-1, 6], [3, 5, 5, 7], x_type=HALF)) == 0
    del original
    for clone in clones:
        assert clone.tactics() == [NARROW, SHARED, SPLIT, GATHER]
        inputs = arrays(FLOAT, FLOAT, (4, 6), (3, 5, 5, 7))
        assert evaluate(clone, *inputs, workspace=0) is None
        assert "expected a workspace" in host.only_line()  # SPLIT
        assert evaluate(clone, *inputs, workspace=4 * 7 * 4) is not None


def test_messages_go_to_stderr_where_no_logger_is_found(
    host: Library, capfd: pytest.CaptureFixture[str]
) -> None:
    host.driver.driver_log_to(None)
    assert create(host).output_types([INT8, FLOAT]) is None
    expected = 'LMKAN2D layer "layer 1": expected x of type float32, float16 or bfloat16, found int8\n'
    assert capfd.readouterr().err == expected


# --- Types and formats ---------------------------------------------------------------------------------

# The contract: types by position. y, the last position, has x's type.
ACCEPTED = {
    False: ((FLOAT, HALF, BF16), (FLOAT, HALF, BF16)),
    True: ((FLOAT, HALF, BF16), (INT8,), (FLOAT,)),
}
SHAPES = ((-1, 6), (3, 5, 5, 7), (3, 7))
NAMES = {FLOAT: "float32", HALF: "float16", BF16: "bfloat16", INT8: "int8"}


def test_the_readme_has_the_contract() -> None:
    rows = re.findall(r"^\| (LMKAN2D.*) \|$", (PLUGIN / "README.md").read_text(), re.MULTILINE)
    assert [[cell.strip() for cell in row.split("|")] for row in rows] == [
        [name, str(OPSET_VERSION), DOMAIN]
        + [", ".join(NAMES[kind] for kind in kinds) for kinds in (*ACCEPTED[quantized], ())[:3]]
        + ["as x"]
        for quantized, name in enumerate(OPERATORS)
    ]


@pytest.mark.parametrize("quantized", [False, True])
def test_building_needs_no_memory(library: Library, quantized: bool) -> None:
    """TensorRT configures a plugin before any tensor has an address."""
    plugin = create(library, quantized)
    accepted = ACCEPTED[quantized]
    for types in itertools.product(*accepted):
        tensors = [
            dynamic_tensor(shape, kind, low=fixed(shape, 1), high=fixed(shape, 64))
            for shape, kind in zip((*SHAPES[: len(types)], (-1, 7)), (*types, types[0]), strict=True)
        ]
        assert plugin.configure(tensors) == 0
        assert plugin.workspace_size(tensors) < 2**30


@pytest.mark.parametrize("quantized", [False, True])
def test_output_type_of_every_combination(library: Library, quantized: bool) -> None:
    plugin = create(library, quantized)
    accepted = ACCEPTED[quantized]
    for types in itertools.product(ALL_TYPES, repeat=len(accepted)):
        if all(kind in kinds for kind, kinds in zip(types, accepted, strict=True)):
            assert plugin.output_types(types) == [types[0]]
        else:
            assert plugin.output_types(types) is None
            assert re.search(r"expected (x|table|scale) of type .*, found ", library.only_line())


@pytest.mark.parametrize("quantized", [False, True])
def test_format_combinations(library: Library, quantized: bool) -> None:
    plugin = create(library, quantized)
    accepted = ACCEPTED[quantized]
    num_inputs = len(accepted)
    supported = 0
    for x_type, position in itertools.product(FLOATS, range(num_inputs + 1)):
        first = [x_type, *(kinds[0] for kinds in accepted[1:]), x_type]
        expected = (*accepted, (x_type,))[position]
        for kind, layout in itertools.product(ALL_TYPES, trt.TensorFormat.__members__.values()):
            types = [*first[:position], kind]
            layouts = [0] * position + [int(layout)]
            tensors = [
                dynamic_tensor(shape, each, form)
                for shape, each, form in zip((*SHAPES[:num_inputs], (-1, 7)), types, layouts, strict=False)
            ]
            found = plugin.supports(position, tensors, num_inputs)
            assert found == (kind in expected and layout == trt.TensorFormat.LINEAR), (position, kind, layout)
            supported += found
    assert supported == len(FLOATS) * (sum(map(len, accepted)) + 1)
    tensors = [dynamic_tensor((2, 2), FLOAT)] * 6
    assert not plugin.supports(-1, tensors, num_inputs)
    assert not plugin.supports(num_inputs + 1, tensors, num_inputs)
    assert not plugin.supports(0, tensors, num_inputs + 1)
    assert not plugin.supports(0, tensors, num_inputs, 2)


@pytest.mark.parametrize("quantized", [False, True])
def test_numbers_of_tensors(library: Library, quantized: bool) -> None:
    plugin = create(library, quantized)
    right = len(ACCEPTED[quantized])
    names = "x, table, scale" if quantized else "x, table"
    for num_inputs, num_outputs in ((right - 1, 1), (right + 1, 1), (right, 2)):
        assert plugin.output_types([FLOAT] * num_inputs, num_outputs) is None
        expected = f"expected {right} inputs ({names}) and 1 output, found {num_inputs} and {num_outputs}"
        assert library.only_line().endswith(expected)
    too_many = [tensor((2, 2), FLOAT)] * (right + 2)
    assert plugin.output_shape(*[(2, 2)] * (right + 1)) is None
    assert plugin.configure([dynamic_tensor((2, 2), FLOAT)] * (right + 2)) != 0
    assert plugin.shape_change(too_many) != 0
    assert plugin.workspace_size([dynamic_tensor((2, 2), FLOAT)] * (right + 2)) == 0
    assert len(library.lines) == 4
    library.lines.clear()


# --- Shapes --------------------------------------------------------------------------------------------

X = (-1, 6)
TABLE = (3, 5, 5, 7)
TABLES = r"expected table \[pairs, G\+1, G\+1, outputs\] with equal grid axes, G >= 3"


class Refused(NamedTuple):
    quantized: bool
    shapes: tuple[Sequence[int], ...]
    message: str


REFUSED = {
    "odd features": Refused(False, ((-1, 7), TABLE), r"even number of features, found \[\?, 7\]"),
    "no features": Refused(False, ((2, 0), TABLE), r"even number of features, found \[2, 0\]"),
    "no axis": Refused(False, ((), TABLE), r"expected x \[..., features\].*, found \[\]"),
    "pairs": Refused(False, ((2, 8), TABLE), r"expected x \[..., 6\] because .* 3 pairs.*, found \[2, 8\]"),
    "table rank": Refused(False, (X, (3, 5, 5)), TABLES + r".*, found \[3, 5, 5\]"),
    "grid axes": Refused(False, (X, (3, 5, 6, 7)), TABLES + r".*, found \[3, 5, 6, 7\]"),
    "small grid": Refused(False, (X, (3, 3, 3, 7)), TABLES + r".*, found \[3, 3, 3, 7\]"),
    "small grid, other unknown": Refused(False, (X, (3, -1, 3, 7)), TABLES + r".*, found \[3, \?, 3, 7\]"),
    "other unknown, small grid": Refused(False, (X, (3, 3, -1, 7)), TABLES + r".*, found \[3, 3, \?, 7\]"),
    "no outputs": Refused(False, (X, (3, 5, 5, 0)), TABLES + r".*, found \[3, 5, 5, 0\]"),
    "no pairs": Refused(False, ((2, 0), (0, 5, 5, 7)), TABLES + r".*, found \[0, 5, 5, 7\]"),
    "scale pairs": Refused(True, (X, TABLE, (4, 7)), r"expected scale \[3, 7\], .*, found \[4, 7\]"),
    "scale outputs": Refused(True, (X, TABLE, (3, 1)), r"expected scale \[3, 7\], .*, found \[3, 1\]"),
    "scale rank": Refused(True, (X, TABLE, (3,)), r"expected scale \[3, 7\], .*, found \[3\]"),
}


def fixed(shape: Sequence[int], batch: int = 2) -> tuple[int, ...]:
    return tuple(batch if size < 0 else size for size in shape)


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_bad_shapes_are_refused_wherever_tensorrt_tells_them(library: Library, case: Refused) -> None:
    plugin = create(library, case.quantized, name="bad layer")
    pattern = rf'{OPERATORS[case.quantized]} layer "bad layer": .*{case.message}'
    types = [FLOAT, INT8, FLOAT] if case.quantized else [FLOAT, FLOAT]
    described = list(zip(case.shapes, types, strict=True))

    assert plugin.output_shape(*case.shapes) is None
    assert re.fullmatch(pattern, library.only_line())
    y = (2, 7)
    tensors = [dynamic_tensor(shape, kind) for shape, kind in described]
    assert plugin.configure([*tensors, dynamic_tensor(y, FLOAT)]) != 0
    assert re.fullmatch(pattern, library.only_line())
    known = [tensor(fixed(shape), kind) for shape, kind in described]
    assert plugin.shape_change([*known, tensor(y, FLOAT)]) != 0
    assert re.fullmatch(pattern.replace(r"\?", "2"), library.only_line())
    assert plugin.enqueue([*known, tensor(y, FLOAT)], [0] * (len(known) + 1), 0, 0) != 0
    assert re.fullmatch(pattern.replace(r"\?", "2"), library.only_line())


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (((6,), TABLE), [7]),
        (((4, 6), TABLE), [4, 7]),
        (((0, 6), TABLE), [0, 7]),
        (((-1, 6), TABLE), [-1, 7]),
        (((-1, -1), (-1, -1, -1, -1)), [-1, -1]),
        (((-1, 6), (-1, -1, -1, 7)), [-1, 7]),
        (((-1, 2, 3, 4, 5, 6, 7, 6), TABLE), [-1, 2, 3, 4, 5, 6, 7, 7]),
        (((2**40, 6), TABLE), [2**40, 7]),
    ],
)
def test_shape_of_y(library: Library, shapes: tuple[Sequence[int], ...], expected: list[int]) -> None:
    assert create(library).output_shape(*shapes) == expected
    scale = (shapes[1][0], shapes[1][3])
    assert create(library, quantized=True).output_shape(*shapes, scale) == expected


def test_types_are_checked_wherever_tensorrt_tells_them(library: Library) -> None:
    plugin = create(library)
    assert plugin.configure(profile(X, TABLE, table_type=INT8)) != 0
    assert library.only_line().endswith("expected table of type float32, float16 or bfloat16, found int8")
    tensors = [
        tensor((2, 6), int(trt.DataType.INT32)),
        tensor(TABLE, FLOAT),
        tensor((2, 7), int(trt.DataType.INT32)),
    ]
    assert plugin.shape_change(tensors) != 0
    assert library.only_line().endswith("expected x of type float32, float16 or bfloat16, found int32")


def profile(
    x: Sequence[int], table: Sequence[int], *, x_type: int = FLOAT, table_type: int = FLOAT, most: int = 64
) -> list[Any]:
    """x, table and y, from 1 to `most` rows."""
    y = (*x[:-1], table[3])
    return [
        dynamic_tensor(x, x_type, low=fixed(x, 1), high=fixed(x, most)),
        dynamic_tensor(table, table_type),
        dynamic_tensor(y, x_type, low=fixed(y, 1), high=fixed(y, most)),
    ]


def test_limits_of_a_profile_are_checked(library: Library) -> None:
    plugin = create(library)
    tensors = profile(X, TABLE)
    assert plugin.configure(tensors) == 0
    tensors[0] = dynamic_tensor((-1, -1), FLOAT, low=(1, 4), high=(64, 6))
    assert plugin.configure(tensors) != 0
    assert re.search(r"expected x \[..., 6\] because .*, found \[1, 4\]", library.only_line())
    tensors[0] = dynamic_tensor((-1, -1), FLOAT, low=(1, 6), high=(64, 8))
    assert plugin.configure(tensors) != 0
    assert re.search(r"expected x \[..., 6\] because .*, found \[64, 8\]", library.only_line())


# --- Tactics and workspace -----------------------------------------------------------------------------


def test_tactics_are_the_kernels(host: Library) -> None:
    plugin = create(host)
    assert plugin.tactics() == []
    assert plugin.configure(profile(X, TABLE)) == 0
    assert plugin.tactics() == [NARROW, SHARED, SPLIT, GATHER]


def test_tactics_without_a_device(cuda: Library) -> None:
    """None, so that TensorRT uses its default, 0: the kernels then choose at run time."""
    plugin = create(cuda)
    assert plugin.configure(profile(X, TABLE)) == 0
    if torch.cuda.is_available():
        assert set(plugin.tactics()) <= {GATHER, SHARED, NARROW, SPLIT}
    else:
        assert plugin.tactics() == []


def test_the_workspace_is_what_the_largest_batch_needs(host: Library) -> None:
    plugin = create(host)
    for most in (1, 64, 10**6):
        tensors = profile((-1, 5, 6), TABLE, most=most)
        assert plugin.configure(tensors) == 0
        assert plugin.workspace_size(tensors) == 4 * 7 * 5 * most  # SPLIT's, in host_kernels.cc
    tensors[1] = dynamic_tensor((3, 5, 5, -1), FLOAT, low=(3, 5, 5, 1), high=(3, 5, 5, 90))
    assert plugin.workspace_size(tensors) == 4 * 90 * 5 * most


# --- Values --------------------------------------------------------------------------------------------


def arrays(
    x_type: int, table_type: int, x_shape: Sequence[int], table_shape: Sequence[int]
) -> tuple[np.ndarray, ...]:
    """x and table, and scale where the table has integers."""
    rng = np.random.default_rng(7)
    x = (3.0 * rng.standard_normal(x_shape)).astype(NUMPY[x_type])
    if table_type == INT8:
        scale = rng.uniform(0.01, 0.1, (table_shape[0], table_shape[3])).astype(np.float32)
        return x, rng.integers(-127, 128, table_shape, np.int8), scale
    return x, rng.standard_normal(table_shape).astype(NUMPY[table_type])


def trt_type(array: np.ndarray) -> int:
    return next(kind for kind, dtype in NUMPY.items() if array.dtype == dtype)


def describe(*tensors: np.ndarray) -> list[PluginTensorDesc]:
    return [tensor(array.shape, trt_type(array)) for array in tensors]


def evaluate(plugin: Plugin, *inputs: np.ndarray, workspace: int, stream: int = 1) -> np.ndarray | None:
    """y, or None where the plugin refuses; all in host memory."""
    x, table = inputs[:2]
    y = np.full((*x.shape[:-1], table.shape[3]), 77, x.dtype)
    descs = describe(*inputs, y)
    memory = np.zeros(workspace, np.uint8)
    assert plugin.shape_change(descs) == 0
    addresses = [array.ctypes.data for array in (*inputs, y)]
    status = plugin.enqueue(descs, addresses, memory.ctypes.data if workspace else 0, stream)
    return y if status == 0 else None


def expected_y(x: np.ndarray, table: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
    return lookup2d(x, table if scale is None else dequantize_table(table, scale))


@pytest.mark.parametrize("table_type", [*FLOATS, INT8], ids=["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("x_type", FLOATS, ids=["float32", "float16", "bfloat16"])
def test_values(host: Library, x_type: int, table_type: int) -> None:
    plugin = create(host, quantized=table_type == INT8)
    for shape in ((6,), (19, 6), (2, 3, 1, 6)):
        inputs = arrays(x_type, table_type, shape, TABLE)
        expected = expected_y(*inputs)
        for tactic in (AUTO, GATHER, SHARED, NARROW, SPLIT):
            assert plugin.set_tactic(tactic) == 0
            y = evaluate(plugin, *inputs, workspace=4 * 7 * 19)
            assert y is not None, host.lines
            rtol = max(RTOL[x_type], 1e-2 if table_type == INT8 else 0.0)
            np.testing.assert_allclose(y.astype(np.float64), expected, atol=rtol * np.abs(expected).max())


def test_no_rows(library: Library) -> None:
    y = evaluate(create(library), *arrays(FLOAT, FLOAT, (0, 6), TABLE), workspace=0)
    assert y is not None
    assert y.shape == (0, 7)


def test_failures_of_the_kernels_are_reported(host: Library) -> None:
    plugin = create(host)
    inputs = arrays(FLOAT, FLOAT, (4, 6), TABLE)
    assert plugin.set_tactic(SPLIT) == 0
    assert evaluate(plugin, *inputs, workspace=0) is None
    assert host.only_line() == 'LMKAN2D layer "layer 1": expected a workspace of 112 bytes, found 0'
    assert plugin.set_tactic(GATHER) == 0
    assert evaluate(plugin, *inputs, workspace=0, stream=0) is None
    assert host.only_line().endswith("expected the stream that TensorRT gave, found none")
    assert plugin.set_tactic(9) == 0
    assert evaluate(plugin, *inputs, workspace=0) is None
    assert host.only_line().endswith("expected tactic 0 to 4, found 9")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so that CUDA does not refuse")
def test_without_a_device_the_kernels_status_is_returned(cuda: Library) -> None:
    assert evaluate(create(cuda), *arrays(FLOAT, FLOAT, (4, 6), TABLE), workspace=0) is None
    assert cuda.only_line().startswith('LMKAN2D layer "layer 1": ')


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0, for which the kernels are built, and PyTorch with CUDA",
)
@pytest.mark.parametrize("table_type", [*FLOATS, INT8], ids=["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("x_type", FLOATS, ids=["float32", "float16", "bfloat16"])
def test_values_on_a_gpu(cuda: Library, x_type: int, table_type: int) -> None:
    plugin = create(cuda, quantized=table_type == INT8)
    inputs = arrays(x_type, table_type, (989, 6), TABLE)
    expected = expected_y(*inputs)
    y = np.zeros((989, 7), inputs[0].dtype)
    descs = describe(*inputs, y)
    dynamic = [dynamic_tensor(array.shape, trt_type(array)) for array in (*inputs, y)]
    assert plugin.configure(dynamic) == 0
    stream = torch.cuda.Stream()
    memory = [torch.from_numpy(array.view(np.uint8).copy()).cuda() for array in (*inputs, y)]
    workspace = torch.empty(max(plugin.workspace_size(dynamic), 1), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    for tactic in (AUTO, *plugin.tactics()):
        assert plugin.set_tactic(tactic) == 0
        assert plugin.shape_change(descs) == 0
        addresses = [block.data_ptr() for block in memory]
        assert plugin.enqueue(descs, addresses, workspace.data_ptr(), stream.cuda_stream) == 0, cuda.lines
        stream.synchronize()
        found = memory[-1].cpu().numpy().view(y.dtype).reshape(y.shape)
        rtol = max(RTOL[x_type], 1e-2 if table_type == INT8 else 0.0)
        np.testing.assert_allclose(found.astype(np.float64), expected, atol=rtol * np.abs(expected).max())


# --- Compiling the plugin on a user's machine ----------------------------------------------------------


def test_the_cached_plugin_has_both_versions_in_its_name(
    headers: Path, host_kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LDFLAGS", needed_by_host_kernels())
    path = build_tensorrt_plugin(headers, kernels=host_kernels)
    version = version_of(headers)
    name = f"liblmkan_tensorrt-{lmkan_deploy.__version__}-trt{version}.so"
    assert path == tmp_path / "lmkan-deploy/plugins" / name
    assert set(path.parent.iterdir()) == {path, path.with_name(name.replace(".so", "_register.so"))}
    assert ctypes.CDLL(str(path)).getCreators


def version_of(headers: Path) -> str:
    content = (headers / "NvInferVersion.h").read_text()
    parts = ("MAJOR", "MINOR", "PATCH")
    return ".".join(re.search(rf"define TRT_{part}_ENTERPRISE (\d+)", content)[1] for part in parts)


@pytest.mark.parametrize("which", ["host_plugin", "cuda_plugin"])
def test_a_plugin_says_what_it_was_made_from(
    which: str, headers: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    versions = plugin_versions(request.getfixturevalue(which))
    assert versions == PluginVersions(lmkan_deploy.__version__, version_of(headers))
    major = versions.tensorrt.split(".")[0]
    assert versions.fits(f"{major}.99.1")
    assert not versions.fits(f"{int(major) + 1}.0.0")
    (tmp_path / "other.so").write_bytes(b"other")
    with pytest.raises(
        LibraryError, match="expected a TensorRT plugin library of lmkan-deploy, found another"
    ):
        plugin_versions(tmp_path / "other.so")
    with pytest.raises(LibraryError, match="could not read .*: No such file"):
        plugin_versions(tmp_path / "none.so")


def test_the_plugin_for_a_release_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, package = tmp_path / "lmkan-deploy/plugins", tmp_path / "package"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LMKAN_DEPLOY_LIBRARY_DIR", str(package))
    lmkan_deploy.get_library_path.cache_clear()
    release = lmkan_deploy.__version__

    def add(folder: Path, tensorrt: str, made_by: str = release) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"liblmkan_tensorrt-{release}-trt{tensorrt}.so" if folder == cache else "liblmkan_tensorrt.so"
        (folder / name.replace(".so", "_register.so")).touch()
        (folder / name).write_bytes(f"lmkan-deploy {made_by} for TensorRT {tensorrt}\0".encode())
        return folder / name

    with pytest.raises(LibraryError, match="found none; make one with lmkan-deploy plugins build"):
        find_tensorrt_plugin()
    own = add(package, "10.14.1")
    assert find_tensorrt_plugin() == find_tensorrt_plugin("10.13.0.35") == own
    older, newest = add(cache, "10.9.0"), add(cache, "11.1.0")
    assert find_tensorrt_plugin("10.9.0.34") == older
    assert find_tensorrt_plugin("10.13.0") == own  # the newest of the same major release
    assert find_tensorrt_plugin("11.0.0") == newest
    built = add(cache, "10.14.1")
    assert find_tensorrt_plugin("10.14.1") == built  # before the package's
    with pytest.raises(LibraryError, match="plugin libraries for 10.14.1, 10.9.0, 11.1.0; name one"):
        find_tensorrt_plugin()
    with pytest.raises(
        LibraryError, match="for TensorRT 12.0.0, found those for 10.14.1, 10.9.0, 11.1.0, which"
    ):
        find_tensorrt_plugin("12.0.0")
    for path in cache.iterdir():
        path.unlink()
    add(package, "10.14.1", made_by="0.0.9")
    with pytest.raises(LibraryError, match="found none; make one"):
        find_tensorrt_plugin()
    lmkan_deploy.get_library_path.cache_clear()


LOAD = """
import shutil, sys
from pathlib import Path
import tensorrt_rtx as trt
from lmkan_deploy.engines.plugin import load_plugin
from lmkan_deploy.engines.tensorrt_api import make_log
from lmkan_deploy.errors import LmkanError
plugin, folder, broken = map(Path, sys.argv[1:4])
log = make_log(trt)
builder = trt.Builder(log)
def load(path):
    try:
        load_plugin(trt, log, path)
        creators = [c.name for c in trt.get_plugin_registry().all_creators if c.name.startswith("LMKAN")]
        print("loaded", *sorted(creators), flush=True)
    except LmkanError as error:
        print(error, flush=True)
load(broken)
load(plugin)
load(plugin)
load(Path(shutil.copy(plugin, folder / "copied.so")))
(folder / "another.so").write_bytes(plugin.read_bytes() + b"0")
load(folder / "another.so")
"""
LOADED_BEFORE = """
import sys
from pathlib import Path
import tensorrt_rtx as trt
from lmkan_deploy.engines.plugin import load_plugin
from lmkan_deploy.engines.tensorrt_api import make_log
log = make_log(trt)
builder = trt.Builder(log)
assert trt.get_plugin_registry().load_library(sys.argv[1])
load_plugin(trt, log, Path(sys.argv[1]))
print("accepted", flush=True)
load_plugin(trt, log, Path(sys.argv[2]))
"""


def test_a_process_loads_the_plugin_once(cuda_plugin: Path, tmp_path: Path) -> None:
    (tmp_path / "needed.c").write_text("int needed(void) { return 1; }")
    (tmp_path / "broken.c").write_text("int needed(void); int getCreators(void) { return needed(); }")
    run("gcc", "-shared", "-fPIC", tmp_path / "needed.c", "-o", tmp_path / "libneeded.so")
    broken = tmp_path / "broken.so"
    run("gcc", "-shared", "-fPIC", tmp_path / "broken.c", f"-L{tmp_path}", "-lneeded", "-o", broken)
    (tmp_path / "libneeded.so").unlink()
    lines = run(sys.executable, "-c", LOAD, cuda_plugin, tmp_path, broken).splitlines()
    assert re.search(r"could not load the plugin library .*broken\.so: .*libneeded\.so", lines[0]), lines
    assert lines[1:4] == [f"loaded {OP_TYPE} {QUANTIZED_OP_TYPE}"] * 3
    assert re.search(r"that this process has loaded, .* found .*another\.so", lines[4]), lines
    # One that the program itself has loaded is recognized; another one is not taken for it.
    command = [sys.executable, "-c", LOADED_BEFORE, str(cuda_plugin), str(tmp_path / "another.so")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout == "accepted\n", result.stderr
    assert "that this process has loaded" in result.stderr


# The command line of a package in a folder, instead of the one that is installed for editing.
INSTALLED = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
sys.path.insert(0, sys.argv.pop(1))
from lmkan_deploy.cli import main
main()
"""


def test_an_installed_package_makes_plugins(cuda_build: Path, headers: Path, tmp_path: Path) -> None:
    """As in a wheel that was built with CUDA: its libraries, and the sources that it brings."""
    run("cmake", "--install", cuda_build, "--prefix", tmp_path / "site")
    package = tmp_path / "site/lmkan_deploy"
    assert {path.name for path in (package / "lib").iterdir()} == {
        "libcudart_static.a", "liblmkan_cpu.so", "liblmkan_cuda.a", "liblmkan_cuda.so", "liblmkan_onnxruntime.so",
        "liblmkan_onnxruntime_cuda.so", "liblmkan_tensorrt.so", "liblmkan_tensorrt_register.so",
    }  # fmt: skip
    for folder in (package / "plugins").rglob("*"):
        assert folder.name not in ("tests", "CMakeLists.txt")
    shutil.copytree(Path(lmkan_deploy.__file__).parent, package, dirs_exist_ok=True)

    def plugins(*arguments: object) -> str:
        return run(sys.executable, "-c", INSTALLED, package.parent, "plugins", *arguments,
                   XDG_CACHE_HOME=str(tmp_path / "cache"))  # fmt: skip

    assert plugins("path", "tensorrt").strip() == str(package / "lib/liblmkan_tensorrt.so")
    built = Path(plugins("build", "--tensorrt-include", headers).strip())
    assert built.parent == tmp_path / "cache/lmkan-deploy/plugins"
    assert plugins("path", "tensorrt").strip() == str(built)
    assert plugins("path", "tensorrt", "--tensorrt", version_of(headers)).strip() == str(built)
    # It needs nothing of what it was made from.
    shutil.rmtree(package)
    moved = shutil.move(built, tmp_path / "moved.so")
    assert "not found" not in run("ldd", "-r", moved)
    assert not re.search(r"RUNPATH|RPATH|liblmkan", run("readelf", "-d", moved))
    assert run(sys.executable, "-c", "import sys, tensorrt_rtx as trt; b = trt.Builder(trt.Logger()); "
               "print(bool(trt.get_plugin_registry().load_library(sys.argv[1])))", moved) == "True\n"  # fmt: skip


def fake_headers(folder: Path, version: str, body: str = "") -> Path:
    major, minor, patch = version.split(".")
    (folder / "NvInferRuntime.h").write_text(body)
    (folder / "NvInferVersion.h").write_text(
        f"#define NV_TENSORRT_MAJOR {major} //!< major\n"
        f"#define NV_TENSORRT_MINOR {minor}\n#define NV_TENSORRT_PATCH {patch}\n"
    )
    return folder


def test_what_cannot_be_compiled_leaves_nothing(
    headers: Path, host_kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "plugin.so"

    def refused(include_dir: Path, message: str) -> None:
        with pytest.raises(LibraryError, match=message) as caught:
            build_tensorrt_plugin(include_dir, output, kernels=host_kernels)
        assert "\n" not in str(caught.value)
        assert not output.exists()

    folder = tmp_path / "include"
    folder.mkdir()
    refused(folder, r"expected TensorRT's headers \(NvInferRuntime.h, NvInferVersion.h\) in .*, found none")
    (folder / "NvInferRuntime.h").touch()
    (folder / "NvInferVersion.h").touch()
    refused(folder, "expected the version of TensorRT in .*NvInferVersion.h, found none")
    refused(fake_headers(folder, "8.6.1"), "expected TensorRT 10 or later, found 8.6.1")
    broken = fake_headers(folder, "12.0.0", "#error not these\n")
    refused(broken, r"could not compile the plugin against TensorRT 12.0.0 of .*error: #error not these")
    with pytest.raises(LibraryError, match=r"expected an output that ends in \.so, found .*plugin"):
        build_tensorrt_plugin(headers, tmp_path / "plugin", kernels=host_kernels)
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    refused(headers, "expected a C\\+\\+ compiler, could not run no-such-compiler")
    assert [path.name for path in tmp_path.iterdir()] == ["include"]


# --- Engines without the plugin ------------------------------------------------------------------------


def conv_network(
    channels: Sequence[int], kernel: int, num_grids: int, num_classes: int, form: Preconditioning
) -> nn.Sequential:
    """The paper's convolutional networks: BatchNorm before each lookup layer but the first."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for index, (c_in, c_out) in enumerate(itertools.pairwise(channels)):
        if index:
            layers.append(nn.BatchNorm2d(c_in, affine=False))
        layers.append(LMKANConv2d(num_grids, c_in, c_out, kernel, preconditioning=form))
    layers.append(nn.Flatten())
    for width in (channels[-1], num_classes):
        layers.append(nn.BatchNorm1d(channels[-1], affine=False))
        layers.append(PreconditionedLMKAN2D(num_grids, channels[-1], width, form))
    return nn.Sequential(*layers).eval()


NETWORKS = {
    "function approximation": (lambda: make_stack(32, 16, 16, 1, num_grids=12), "batch,32"),
    "methane": (lambda: make_stack(12, 16, 16, 1, num_grids=28), "batch,12"),
    "CIFAR-10": (lambda: conv_network([3, *[8] * 5], 2, 6, 10, "relu_first"), "batch,3,32,32"),
    "ImageNet": (lambda: conv_network([3, 2, 6, 18, 54], 3, 4, 1000, "relu_last"), "batch,3,81,81"),
}
"""Widths are small: the kinds and shapes of layers are what matters here."""


def build_engine(model: Path) -> Any:
    """A serialized engine for batches of 1 to 64, or an error of TensorRT's."""
    logger = Errors()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(model)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    x = network.get_input(0)
    if x.shape[0] == -1:
        profile.set_shape(x.name, *[(batch, *tuple(x.shape)[1:]) for batch in (1, 8, 64)])
        config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)  # without it TensorRT asks the device
    return builder.build_serialized_network(network, config), logger.lines


class Errors(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: Any, line: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.lines.append(line)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_papers_networks_build_without_the_plugin(name: str, tmp_path: Path) -> None:
    make, input_shape = NETWORKS[name]
    torch.save(make(), tmp_path / "model.pt")
    model = tmp_path / "model.onnx"
    lmkan_deploy.export(
        tmp_path / "model.pt", model, input_shapes=[input_shape], trust_pickle=True, check=False
    )
    operators = {node.op_type for node in onnx.load(model).graph.node}
    assert OP_TYPE in operators
    engine, errors = build_engine(model)
    assert engine is not None, errors
    assert engine.nbytes > 10_000
    assert errors == []


@pytest.mark.parametrize("table_dtype", ["float16", "bfloat16"])
def test_a_fixed_batch_and_narrow_tables_build_without_the_plugin(table_dtype: Any, tmp_path: Path) -> None:
    torch.save(make_stack(10, 8, 3).state_dict(), tmp_path / "model.pt")
    lmkan_deploy.export(
        tmp_path / "model.pt",
        tmp_path / "model.onnx",
        input_shapes=["5,10"],
        table_dtype=table_dtype,
        check=False,
    )
    engine, errors = build_engine(tmp_path / "model.onnx")
    assert engine is not None, errors


def test_int8_tables_need_the_plugin(stack: Any, tmp_path: Path) -> None:
    """TensorRT takes an int8 constant at a plugin, which is what the operator's README says."""
    lmkan_deploy.export(stack.checkpoint, tmp_path / "model.onnx", table_dtype="int8", check=False)
    engine, errors = build_engine(tmp_path / "model.onnx")
    assert engine is None
    assert any("is only allowed before DQ or PLUGIN_V2 or kPLUGIN_V3 node" in line for line in errors)
