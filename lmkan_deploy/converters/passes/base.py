"""What a pass is, and what passes share: constants, tables, and single uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lmkan_deploy.converters.onnx_function import is_lookup


@dataclass
class Outcome:
    """What a pass did to a model.

    Attributes:
        applied: One line for each application.
        refused: One line for each place where the pattern is there but the rewrite is not exact, or not
            possible, with the reason.
    """

    applied: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Pass:
    """A rewrite that keeps the function a model computes.

    Attributes:
        name: On the command line and in metadata.
        summary: One line.
        run: Rewrites the model in place.
    """

    name: str
    summary: str
    run: Callable[[ir.Model], Outcome]


def lookups(model: ir.Model) -> Iterator[ir.Node]:
    """Lookup nodes of the main graph, safe against changes of the graph meanwhile."""
    yield from [node for node in model.graph if is_lookup(node)]


def infer_lookup_shapes(model: ir.Model) -> None:
    """Fills in types and shapes of lookup outputs, which a file that another tool wrote may lack."""
    for node in lookups(model):
        x, table, y = node.inputs[0], node.inputs[1], node.outputs[0]
        if x is None or table is None or x.shape is None or table.shape is None:
            continue
        if len(x.shape) > 0 and len(table.shape) == 4:
            y.type = x.type
            y.shape = ir.Shape([*x.shape[:-1], table.shape[3]])


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether a node is a standard operator of one of these types."""
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in op_types


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array of an initializer or constant, None for anything else."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def used_once(value: ir.Value) -> bool:
    """Whether a single node, and no output of the model, uses a value."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def name_of(node: ir.Node) -> str:
    """What to call a node in a message."""
    return node.name or node.op_type


def float32_table(node: ir.Node) -> NDArray[np.float32] | None:
    """A lookup node's constant float32 table, None when it is computed or of another type."""
    table = constant(node.inputs[1])
    return table if table is not None and table.dtype == np.float32 else None


def replace_table(graph: ir.Graph, node: ir.Node, table: NDArray[Any]) -> None:
    """Gives a lookup node a new table; other nodes that share the old one keep it."""
    old = node.inputs[1]
    assert old is not None
    name = old.name or f"{name_of(node)}.table"
    if used_once(old) and old.is_initializer():
        node.replace_input_with(1, None)
        graph.initializers.pop(name, None)
    while name in graph.initializers:
        name += "_"
    value = ir.Value(
        name=name,
        shape=ir.Shape(table.shape),
        type=ir.TensorType(ir.DataType.from_numpy(table.dtype)),
        const_value=ir.Tensor(np.ascontiguousarray(table), name=name),
    )
    graph.register_initializer(value)
    node.replace_input_with(1, value)


def add_constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """A new initializer under a name derived from `name`."""
    while name in graph.initializers:
        name += "_"
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.Tensor(array, name=name),
    )
    graph.register_initializer(value)
    return value


def bypass(node: ir.Node, replacement: ir.Value) -> None:
    """Lets every user of a node's output use another value, and removes the node.

    A model's output keeps its name; where it would be an input or another output, an Identity stays.
    """
    output, graph = node.outputs[0], node.graph
    assert graph is not None
    if output.is_graph_output() and (replacement.producer() is None or replacement.is_graph_output()):
        identity = ir.node("Identity", [replacement], name=f"{name_of(node)}.identity")
        identity.outputs[0].type = output.type
        graph.insert_before(node, identity)
        replacement = identity.outputs[0]
    if output.is_graph_output():
        name, output.name = output.name, None
        replacement.name = name
        replacement.shape = output.shape if replacement.shape is None else replacement.shape
    ir.convenience.replace_all_uses_with(output, replacement, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def static_shape(value: ir.Value | None) -> list[int | None] | None:
    """Sizes of a value's axes, None where free; None when even the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return [size if isinstance(size, int) else None for size in value.shape]
