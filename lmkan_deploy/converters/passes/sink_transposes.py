"""Transposes of matrices move behind what follows them, until two meet and cancel: networks of batch-last layers
become batch-first ones, whose patterns the other passes know.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lmkan_deploy.converters.passes.base import (
    Outcome,
    add_constant,
    bypass,
    constant,
    fresh_name,
    is_op,
    name_of,
)

_UNARY = ("Relu", "Neg", "Sigmoid", "Tanh")
_BINARY = ("Add", "Sub", "Mul", "Div")
_MOST_USES = 3


def sink_transposes(model: ir.Model) -> Outcome:
    """Moves each such transpose behind the nodes that use it."""
    outcome = Outcome()
    for node in list(model.graph):
        inner = _source(node)
        twice = None if inner is None else _source(inner.producer())
        if twice is not None:
            bypass(node, twice)
            outcome.applied.append(f"{name_of(node)}: two transposes cancel")
            continue
        operands = _operands(node)
        if operands is None:
            continue
        graph, output = model.graph, node.outputs[0]
        inputs = [
            x if isinstance(x, ir.Value) else add_constant(graph, f"{name_of(node)}.operand", x)
            for x in operands
        ]
        if is_op(node, "MatMul"):  # W · xᵀ = (x · Wᵀ)ᵀ
            inputs.reverse()
        moved = ir.node(node.op_type, inputs, name=node.name)  # none of these operators has attributes
        transpose = ir.node(
            "Transpose",
            [moved.outputs[0]],
            attributes={"perm": [1, 0]},
            name=fresh_name(graph, f"{name_of(node)}.T"),
        )
        moved.outputs[0].type = transpose.outputs[0].type = output.type
        if output.shape is not None and len(output.shape) == 2:
            moved.outputs[0].shape = ir.Shape([output.shape[1], output.shape[0]])
        transpose.outputs[0].shape = output.shape
        graph.insert_before(node, [moved, transpose])
        name, is_output = output.name, output.is_graph_output()
        ir.convenience.replace_all_uses_with(output, transpose.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
        if is_output:
            transpose.outputs[0].name = name
        outcome.applied.append(f"{name_of(moved)}: its transpose is behind it")
    return outcome


def _operands(node: ir.Node) -> list[ir.Value | np.ndarray] | None:
    """What a node's operands are transposed of, constants transposed; None where its transposes stay."""
    inputs = list(node.inputs)
    if is_op(node, *_UNARY):
        source = _transposed(inputs[0])
        return None if source is None else [source]
    if is_op(node, "MatMul"):
        weight, source = constant(inputs[0]), _transposed(inputs[1])
        return None if weight is None or weight.ndim != 2 or source is None else [weight.T, source]
    if not is_op(node, *_BINARY):
        return None
    sources = [_transposed(x) for x in inputs]
    if all(source is None for source in sources):
        return None
    found: list[ir.Value | np.ndarray] = []
    for value, source in zip(inputs, sources, strict=True):
        array = None if source is not None else constant(value)
        if source is not None:
            found.append(source)
        elif array is not None and array.ndim <= 2:
            turned = np.atleast_2d(array).T
            found.append(array if array.size == 1 else turned[0] if len(turned) == 1 else turned)
        else:
            return None
    return found


def _transposed(value: ir.Value | None) -> ir.Value | None:
    """The matrix that a value is the transpose of, where that can move away from everything that uses it."""
    source = None if value is None else _source(value.producer())
    if value is None or source is None or value.is_graph_output():
        return None
    # More would make more transposes than there are, if they meet no others.
    movable = all(is_op(use.node, "Transpose", "MatMul", *_UNARY, *_BINARY) for use in value.uses())
    return source if movable and len(value.uses()) <= _MOST_USES else None


def _source(node: ir.Node | None) -> ir.Value | None:
    """What a node transposes, if it is a matrix."""
    if node is None or not is_op(node, "Transpose"):
        return None
    source = node.inputs[0]
    is_matrix = source is not None and source.shape is not None and len(source.shape) == 2
    return source if is_matrix and list(node.attributes.get_ints("perm", [1, 0])) == [1, 0] else None
