"""Transpose(initializer) -> initializer, for the tables of lookup layers.

A PyTorch layer keeps its table as [G+1, G+1, N_out, P] and transposes it in the graph; the exporter's own
constant folding leaves large ones alone.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lmkan_deploy.converters.passes.base import Outcome, add_constant, is_op, lookups, name_of


def fold_table_transpose(model: ir.Model) -> Outcome:
    """Folds transposes between an initializer and a lookup node's table input."""
    outcome = Outcome()
    folded: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
    for node in lookups(model):
        table = node.inputs[1]
        transpose = None if table is None else table.producer()
        if transpose is None or not is_op(transpose, "Transpose"):
            continue
        source = transpose.inputs[0]
        if source is None or source.const_value is None or not source.is_initializer():
            continue
        if source.is_graph_input():
            outcome.refused.append(
                f"{name_of(node)}: Transpose stays: {source.name} is an input of the model, whose value a "
                "caller may override"
            )
            continue
        rank = len(source.const_value.shape)
        permutation = tuple(transpose.attributes.get_ints("perm", tuple(reversed(range(rank)))))
        if (source, permutation) not in folded:
            folded[source, permutation] = _add_transposed(model.graph, source, permutation)
        node.replace_input_with(1, folded[source, permutation])
        outcome.applied.append(name_of(node))
    return outcome


def _add_transposed(graph: ir.Graph, source: ir.Value, permutation: tuple[int, ...]) -> ir.Value:
    tensor = source.const_value
    assert tensor is not None
    # PyTorch layers lay their memory out for this permutation, so the copy is usually none.
    return add_constant(
        graph, f"{source.name}.table", np.transpose(tensor.numpy(), permutation), ir.DataType(tensor.dtype)
    )
