"""Transpose(initializer) -> initializer, for the tables of lookup layers.

A PyTorch layer keeps its table as [G+1, G+1, N_out, P] and transposes it in the graph; the exporter's own
constant folding leaves large ones alone.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lmkan_deploy.converters.passes.base import Outcome, is_op, lookups, name_of


def fold_table_transpose(model: ir.Model) -> Outcome:
    """Folds transposes between an initializer and a lookup node's table input."""
    outcome = Outcome()
    folded: dict[ir.Value, ir.Value] = {}
    for node in lookups(model):
        table = node.inputs[1]
        source = None if table is None else _transposed_initializer(table)
        if table is None or source is None:
            continue
        if table not in folded:
            folded[table] = _add_transposed(model.graph, table, source)
            outcome.applied.append(name_of(node))
        node.replace_input_with(1, folded[table])
    return outcome


def _transposed_initializer(table: ir.Value) -> ir.Value | None:
    node = table.producer()
    if node is None or not is_op(node, "Transpose"):
        return None
    source = node.inputs[0]
    return (
        source if source is not None and source.is_initializer() and source.const_value is not None else None
    )


def _add_transposed(graph: ir.Graph, table: ir.Value, source: ir.Value) -> ir.Value:
    node, tensor = table.producer(), source.const_value
    assert node is not None
    assert tensor is not None
    permutation = node.attributes.get_ints("perm", tuple(reversed(range(len(tensor.shape)))))
    # PyTorch layers lay their memory out for this permutation, so the copy is usually none.
    array = np.ascontiguousarray(np.transpose(tensor.numpy(), permutation))
    name = f"{source.name}.table"
    result = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=ir.Tensor(array, dtype=tensor.dtype, name=name),
    )
    graph.register_initializer(result)
    return result
