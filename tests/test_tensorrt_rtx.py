"""TensorRT-RTX, a registry, a parser and a builder that need no GPU: with the plugin, and without it."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_rtx as trt
import torch
from torch import nn

import lmkan_deploy
from lmkan_deploy.converters.onnx_function import PLUGIN_ATTRIBUTES
from lmkan_deploy.nn import LMKANConv2d, PreconditionedLMKAN2D, Preconditioning
from lmkan_deploy.spec import DOMAIN, OP_TYPE, OPSET_VERSION, QUANTIZED_OP_TYPE
from networks import make_stack
from tensorrt_plugins import OPERATORS

# --- With the plugin -----------------------------------------------------------------------------------


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


# --- Without the plugin --------------------------------------------------------------------------------


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
