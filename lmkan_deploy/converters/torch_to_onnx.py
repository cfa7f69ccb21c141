"""A PyTorch network -> an ONNX model with one `LMKAN2D` node a lookup layer."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import onnx.helper
import onnx_ir as ir
import torch
from torch import nn

from lmkan_deploy.converters.onnx_function import (
    PLUGIN_ATTRIBUTES,
    is_lookup,
    operator_schema,
)
from lmkan_deploy.converters.passes import PASSES, optimize
from lmkan_deploy.converters.passes.base import Pass, used_once
from lmkan_deploy.converters.trace import find_limits, trace
from lmkan_deploy.converters.trace_errors import describe
from lmkan_deploy.converters.trial import check_outputs, check_program
from lmkan_deploy.converters.unfold import simplify_unfold
from lmkan_deploy.errors import ExportError
from lmkan_deploy.runtime.axis_limits import note_limits
from lmkan_deploy.runtime.tensors import TensorSpec
from lmkan_deploy.spec import DOMAIN, OP_TYPE, OPSET_VERSION

DEFAULT_OPSET = 20
"""The newest opset that ONNX Runtime 1.17 and TensorRT 10 both read."""


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
        The model, with passes applied and the operator's function attached. Its metadata notes the limits of free
        axes that can't have every size.

    Raises:
        ExportError: The network can't be called or traced, changes its state, draws random numbers, returns
            something else than tensors, or uses an operator that ONNX lacks.
    """
    if any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()):
        raise ExportError(
            "expected a network of Python modules, found a TorchScript one; leave out torch.jit"
        )
    with _quiet():
        program, limits = trace(module, inputs)
    model = _convert(program, inputs, opset, passes)
    note_limits(model.metadata_props, limits)
    return model


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
        ExportError: It changes its state, draws random numbers, returns something else than tensors, or uses an
            operator that ONNX lacks.
    """
    axes = [size for spec in inputs for size in spec.shape if isinstance(size, str)]
    computed = [axis for axis in axes if not axis.isidentifier()]  # 2*s77
    if computed:
        raise ExportError(
            f"expected free axes with sizes of their own, found {', '.join(dict.fromkeys(computed))} computed of "
            "others, which PyTorch's ONNX exporter can't read; trace the network with Dim.DYNAMIC for them"
        )
    with _quiet():
        check_program(program)
        limits = find_limits(program, inputs)
    model = _convert(program, inputs, opset, passes)
    note_limits(model.metadata_props, limits)
    return model


def _convert(
    program: torch.export.ExportedProgram, inputs: Sequence[TensorSpec], opset: int, passes: Collection[Pass]
) -> ir.Model:
    _check_operators(program)
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
        raise ExportError(
            f"PyTorch could not export the network to ONNX: {describe(error, program)}"
        ) from error
    assert onnx_program is not None
    model = onnx_program.model
    _name_free_axes(model, inputs)
    _name_outputs(model, program)
    _name_lookups(model)
    _drop_trace_metadata(model)
    optimize(model, passes)
    # The exporter's own is 10, which ONNX Runtime 1.17 refuses.
    needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    model.ir_version = min(model.ir_version, needed)
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


def _check_operators(program: torch.export.ExportedProgram) -> None:
    """Refuses what has no form in ONNX."""
    check_outputs(
        [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in _results(program)]
    )
    # Blocks such as torch.no_grad are graphs of their own.
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    for node in (node for graph in graphs for node in graph.nodes):
        if node.target is torch.ops.lmkan.lookup2d.default:
            for argument, what in zip(node.args, ("an input", "a table"), strict=True):
                dtype = argument.meta["val"].dtype
                if dtype not in (torch.float32, torch.float16, torch.bfloat16):
                    raise ExportError(
                        "expected lookup layers of float32, float16 or bfloat16, found one with "
                        f"{what} of type {str(dtype).removeprefix('torch.')}; convert the network with "
                        "model.float(), and say --input-shape ...:float32"
                    )


def _results(program: torch.export.ExportedProgram) -> list[Any]:
    """What a program returns: nodes, and constants such as None."""
    returned = list(program.graph.output_node().args[0])
    changes = len(program.graph_signature.output_specs) - len(program.graph_signature.user_outputs)
    return returned[changes:]


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


def _name_outputs(model: ir.Model, program: torch.export.ExportedProgram) -> None:
    """Names outputs after keys and fields, or y, or y0, y1, ..."""
    inputs = {value.name for value in model.graph.inputs}
    outputs = model.graph.outputs
    names = _keys(program)
    if len(names) != len(outputs) or inputs & set(names):
        base = "output" if "y" in inputs else "y"
        names = [base] if len(outputs) == 1 else [f"{base}{index}" for index in range(len(outputs))]
    others = [value for node in model.graph.all_nodes() for value in node.outputs]
    for value in (*others, *model.graph.initializers.values()):
        if value.name in names:
            value.name = f"{value.name}_inner"
    for value, name in zip(outputs, names, strict=True):
        if not value.is_graph_input():
            value.name = name


def _keys(program: torch.export.ExportedProgram) -> list[str]:
    """Where the tensors that a network returns lie in dicts and named tuples, keys joined by underscores; nothing
    where it returns something else.
    """
    structure = program.call_spec.out_spec
    if structure is None:
        return []
    tree = torch.utils._pytree.tree_unflatten(_results(program), structure)
    leaves, _ = torch.utils._pytree.tree_flatten_with_path(tree)
    names = ["_".join(map(_key, path)) for path, leaf in leaves if leaf is not None]
    return names if len(set(names)) == len(names) and all(map(str.isidentifier, names)) else []


def _key(entry: Any) -> str:
    """One step of a path into nested containers: a key, a field's name, or an index."""
    return str(next(getattr(entry, name) for name in ("key", "name", "idx") if hasattr(entry, name)))


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
        if table is not None and table.is_initializer() and used_once(table):
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
    """Holds back what the network prints, and what the exporter prints, logs and warns about its own internals;
    not where debug messages of `lmkan_deploy` are wanted.
    """
    if logging.getLogger("lmkan_deploy").isEnabledFor(logging.DEBUG):
        yield
        return
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
