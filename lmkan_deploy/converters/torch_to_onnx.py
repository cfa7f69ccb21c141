"""A PyTorch network -> an ONNX model with one `LMKAN2D` node a lookup layer."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from lmkan_deploy.checkpoints.input_shapes import example_inputs
from lmkan_deploy.converters.onnx_function import (
    PLUGIN_ATTRIBUTES,
    is_lookup,
    operator_schema,
)
from lmkan_deploy.converters.passes import PASSES, optimize
from lmkan_deploy.converters.passes.base import Pass
from lmkan_deploy.converters.unfold import simplify_unfold
from lmkan_deploy.errors import ExportError
from lmkan_deploy.runtime.tensors import TensorSpec
from lmkan_deploy.spec import DOMAIN, OP_TYPE, OPSET_VERSION

DEFAULT_OPSET = 20
"""The newest opset that ONNX Runtime 1.17 and TensorRT 10 both read."""

_TRACE_SIZE = 4
"""Size of the free axes while tracing; 0 and 1 are special to PyTorch."""


def to_onnx(
    module: nn.Module,
    inputs: Sequence[TensorSpec],
    *,
    opset: int = DEFAULT_OPSET,
    passes: Collection[Pass] = PASSES,
) -> ir.Model:
    """Exports a network.

    Args:
        module: In eval mode.
        inputs: Its inputs in the order of its forward's parameters; free axes keep their names.
        opset: Version of ONNX's standard operators.
        passes: Rewrites of the graph.

    Returns:
        The model, with passes applied and the operator's function attached.

    Raises:
        ExportError: The network can't be traced, or uses an operator that ONNX lacks.
    """
    dims = {name: torch.export.Dim(name) for spec in inputs for name in spec.shape if isinstance(name, str)}
    dynamic = tuple(
        {axis: dims[name] for axis, name in enumerate(spec.shape) if isinstance(name, str)} for spec in inputs
    )
    examples = example_inputs(inputs, _TRACE_SIZE)
    try:
        with _quiet():
            # By position and under its own argument's tree, since forward may take *args or defaults.
            program = torch.export.export(module, examples, dynamic_shapes=_by_parameter(module, dynamic))
    except Exception as error:  # tracing runs the user's code, which may raise anything
        raise ExportError(f"PyTorch could not trace the network: {_first_lines(error)}") from error
    return program_to_onnx(program, inputs, opset=opset, passes=passes)


def program_to_onnx(
    program: torch.export.ExportedProgram,
    inputs: Sequence[TensorSpec],
    *,
    opset: int = DEFAULT_OPSET,
    passes: Collection[Pass] = PASSES,
) -> ir.Model:
    """Exports a traced network; its free axes are those it was traced with.

    Args:
        program: From `torch.export`.
        inputs: Its inputs, in order; their names, and the names of their free axes, are those of the model.
        opset: Version of ONNX's standard operators.
        passes: Rewrites of the graph.

    Raises:
        ExportError: It uses an operator that ONNX lacks.
    """
    translation = {torch.ops.lmkan.lookup2d.default: _translation()}
    try:
        with _quiet():
            onnx_program = torch.onnx.export(
                simplify_unfold(program),
                dynamo=True,
                opset_version=opset,
                input_names=[spec.name for spec in inputs],
                custom_translation_table=translation,  # type: ignore[arg-type]
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever its many parts raise
        raise ExportError(f"PyTorch could not export the network to ONNX: {_first_lines(error)}") from error
    assert onnx_program is not None
    model = onnx_program.model
    _name_free_axes(model, inputs)
    _name_outputs(model)
    _name_lookups(model)
    _drop_trace_metadata(model)
    optimize(model, passes)
    return model


def _translation() -> Any:
    """How the exporter writes `torch.ops.lmkan.lookup2d`."""
    import onnxscript

    operator = onnxscript.values.Op(
        onnxscript.values.Opset(DOMAIN, OPSET_VERSION), OP_TYPE, op_schema=operator_schema()
    )

    def lookup2d(x: Any, table: Any) -> Any:
        return operator(x, table, **PLUGIN_ATTRIBUTES)

    return lookup2d


def _by_parameter(module: nn.Module, dynamic: tuple[dict[int, Any], ...]) -> Any:
    """The exporter wants the shapes of *args as one nested tuple."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    if parameters and parameters[0].kind == parameters[0].VAR_POSITIONAL:
        return (dynamic,)
    return dynamic


def _name_free_axes(model: ir.Model, inputs: Sequence[TensorSpec]) -> None:
    """Replaces the tracer's symbols (s77) in all shapes by the names of the inputs' free axes."""
    names: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, inputs, strict=True):
        assert value.shape is not None
        for dim, name in zip(value.shape, spec.shape, strict=True):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None and isinstance(name, str):
                names[str(dim.value)] = name

    def renamed(dim: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(dim, int):
            return dim
        text = None if dim.value is None else str(dim.value)
        return text and re.sub(r"\w+", lambda word: names.get(word[0], word[0]), text)

    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([renamed(dim) for dim in value.shape])


def _name_outputs(model: ir.Model) -> None:
    taken = {value.name for value in model.graph.inputs}
    base = "output" if "y" in taken else "y"
    outputs = model.graph.outputs
    for index, value in enumerate(outputs):
        if value.is_graph_input() or value.is_initializer():
            continue
        value.name = base if len(outputs) == 1 else f"{base}{index}"


def _name_lookups(model: ir.Model) -> None:
    """Names lookup nodes and their tables after their modules, so that messages speak the user's language."""
    taken: set[str] = set()
    for node in model.graph.all_nodes():
        if not is_lookup(node):
            continue
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")
        names = [name for name in scopes.strip("[]").replace("'", "").split(", ") if name]
        base = names[-2] if len(names) > 1 else OP_TYPE
        name, number = base, 2
        while name in taken:  # one layer may be called several times
            name, number = f"{base}_{number}", number + 1
        taken.add(name)
        node.name = name
        table = node.inputs[1]
        if table is not None and table.is_initializer() and len(table.uses()) == 1:
            table.name = f"{name}.table"


def _drop_trace_metadata(model: ir.Model) -> None:
    """Removes the exporter's notes, which quote the user's source and paths."""
    items: list[ir.Model | ir.Graph | ir.Node] = [model, model.graph, *model.graph.all_nodes()]
    for item in items:
        for key in [key for key in item.metadata_props if key.startswith(("pkg.torch", "namespace"))]:
            del item.metadata_props[key]
    for node in model.graph.all_nodes():
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what the exporter prints and warns about its own internals."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _first_lines(error: Exception) -> str:
    """The innermost cause's first lines: the exporter wraps errors several times."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"
