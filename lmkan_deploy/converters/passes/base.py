"""What a pass is, and what passes share: constants, tables, and single uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lmkan_deploy.converters.onnx_function import is_lookup, is_quantized_lookup


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
    """Lookup nodes of the main graph, safe against changes of the graph meanwhile.

    A node without x or table is not one: what is wrong with it is for the runtime to say.
    """
    yield from [
        node for node in model.graph if is_lookup(node) and len(node.inputs) == 2 and None not in node.inputs
    ]


def name_standard_domain(model: ir.Model) -> None:
    """Renames the domain "ai.onnx" to "", the name of the same domain that passes and tools look for."""
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        if "ai.onnx" in graph.opset_imports:
            graph.opset_imports.setdefault("", graph.opset_imports.pop("ai.onnx"))
        for node in graph.all_nodes():
            node.domain = "" if node.domain == "ai.onnx" else node.domain


def all_lookups(model: ir.Model) -> list[ir.Node]:
    """Lookup nodes of the main graph, those with int8 tables too."""
    return [node for node in model.graph if is_lookup(node) or is_quantized_lookup(node)]


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
    return node is not None and node.domain == "" and node.op_type in op_types


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array of an initializer or constant, None for anything else.

    An initializer that is an input too is a default, which a caller may override: not a constant.
    """
    if value is None or value.is_graph_input():
        return None
    node = value.producer()
    if is_op(node, "Constant") and node is not None and "sparse_value" in node.attributes:
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
    """A lookup node's constant float32 table, None when it is computed, or of another type or shape."""
    table = constant(node.inputs[1]) if len(node.inputs) == 2 else None
    if table is None or table.dtype != np.float32 or table.ndim != 4:
        return None
    return table if table.shape[1] == table.shape[2] > 3 and 0 not in table.shape else None


def fresh_name(graph: ir.Graph, base: str) -> str:
    """`base`, with underscores until no value or node of the graph or of a graph inside it is called that."""
    taken = {node.name for node in graph.all_nodes()}
    for part in (graph, *graph.subgraphs()):
        taken.update(value.name for value in part.inputs)
        taken.update(part.initializers)
    for node in graph.all_nodes():
        taken.update(value.name for value in node.outputs)
    while base in taken:
        base += "_"
    return base


def table_dtype_of(node: ir.Node) -> str:
    """NumPy's name of the type of a lookup node's table."""
    table = node.inputs[1]
    return "float32" if table is None or table.dtype is None else dtype_name(table.dtype)


def dtype_name(dtype: ir.DataType) -> str:
    """NumPy's name of an ONNX type."""
    name = dtype.name.lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def replace_table(graph: ir.Graph, node: ir.Node, table: NDArray[Any]) -> None:
    """Gives a lookup node a new table; other nodes that share the old one keep it."""
    name = drop_table(graph, node)
    node.replace_input_with(1, add_constant(graph, name, table))


def drop_table(graph: ir.Graph, node: ir.Node) -> str:
    """Leaves a lookup node without its table, which goes unless another node uses it; returns its name."""
    old = node.inputs[1]
    assert old is not None
    name = old.name or f"{name_of(node)}.table"
    is_last = used_once(old) and old.is_initializer()
    node.replace_input_with(1, None)
    if is_last:
        graph.initializers.pop(name, None)
    return name


def add_constant(
    graph: ir.Graph, name: str, array: NDArray[Any], dtype: ir.DataType | None = None
) -> ir.Value:
    """A new initializer under a name derived from `name`.

    Args:
        graph: Gets the initializer.
        name: Tried first; see `fresh_name`.
        array: Its value.
        dtype: Its type, where that of the array does not say it; None takes the array's.
    """
    name = fresh_name(graph, name)
    dtype = ir.DataType.from_numpy(array.dtype) if dtype is None else dtype
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(dtype),
        const_value=ir.Tensor(np.asarray(array, order="C"), dtype=dtype, name=name),
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
        identity = ir.node("Identity", [replacement], name=fresh_name(graph, f"{name_of(node)}.identity"))
        identity.outputs[0].type = output.type
        graph.insert_before(node, identity)
        replacement = identity.outputs[0]
    if output.is_graph_output():
        name, output.name = output.name, None
        replacement.name = name
        replacement.shape = output.shape if replacement.shape is None else replacement.shape
        replacement.type = output.type if replacement.type is None else replacement.type
    ir.convenience.replace_all_uses_with(output, replacement, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def known_shape(value: ir.Value) -> list[int | str] | None:
    """Sizes of a value's axes, names where free; None where an axis has no name, or the rank is unknown."""
    axes = [] if value.shape is None else [a if isinstance(a, int) else a.value for a in value.shape]
    return None if value.shape is None or None in axes else [axis for axis in axes if axis is not None]


def static_shape(value: ir.Value | None) -> list[int | None] | None:
    """Sizes of a value's axes, None where free; None when even the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return [size if isinstance(size, int) else None for size in value.shape]
