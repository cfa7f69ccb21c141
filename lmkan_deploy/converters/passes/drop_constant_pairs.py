"""Pairs of features whose functions are all constant -> a constant in another pair's table.

Such a pair comes from pruning or from features that never varied in training. Where the features come out
of another lookup layer, that layer stops computing them; elsewhere they are cut out of x.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lmkan_deploy.converters.onnx_function import is_lookup
from lmkan_deploy.converters.passes.base import (
    Outcome,
    add_constant,
    constant,
    float32_table,
    fresh_name,
    lookups,
    name_of,
    replace_table,
    used_once,
)


def drop_constant_pairs(model: ir.Model) -> Outcome:
    """Drops the constant pairs of every layer; one pair always stays."""
    outcome = Outcome()
    for node in lookups(model):
        table = constant(node.inputs[1])
        if table is None or table.ndim != 4 or 0 in table.shape:
            continue
        is_constant = constant_pairs(table)
        if not is_constant.any():
            continue
        if float32_table(node) is None:
            outcome.refused.append(
                f"{name_of(node)}: {int(is_constant.sum())} constant pairs stay: the table is not of float32"
            )
            continue
        if is_constant.all():
            is_constant[0] = False
            if len(table) == 1:
                outcome.refused.append(f"{name_of(node)}: a constant pair stays: it is the last one")
                continue
        dropped = without_pairs(table, is_constant)
        if not np.isfinite(dropped.astype(np.float32)).all() and np.isfinite(table).all():
            outcome.refused.append(f"{name_of(node)}: constant pairs stay: the table would not be finite")
            continue
        replace_table(model.graph, node, dropped.astype(np.float32))
        kept = np.flatnonzero(~is_constant)
        features = (2 * kept[:, None] + np.arange(2)).reshape(-1)
        _keep_features(model.graph, node, features)
        outcome.applied.append(f"{name_of(node)}: {int(is_constant.sum())} of {len(table)} pairs")
    return outcome


def constant_pairs(table: NDArray[Any]) -> NDArray[np.bool_]:
    """Which pairs of a table [P, G+1, G+1, N_out] have finite constant functions only."""
    flat = table.reshape(len(table), -1, table.shape[-1])
    return (flat == flat[:, :1]).all(axis=(1, 2)) & np.isfinite(flat[:, 0]).all(axis=1)


def without_pairs(table: NDArray[Any], is_constant: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The table of the other pairs, which share the constants: float64 [kept, G+1, G+1, N_out]."""
    kept = table[~is_constant].astype(np.float64)
    return kept + table[is_constant, 0, 0].astype(np.float64).sum(axis=0) / len(kept)


def _keep_features(graph: ir.Graph, node: ir.Node, features: np.ndarray) -> None:
    x = node.inputs[0]
    assert x is not None
    source = x.producer()
    if source is not None and is_lookup(source) and used_once(x):
        table = float32_table(source)
        if table is not None:
            replace_table(graph, source, table[..., features])
            if x.shape is not None:
                x.shape = ir.Shape([*x.shape[:-1], len(features)])
            return
    name = f"{name_of(node)}.features"
    indices = add_constant(graph, name, features.astype(np.int64))
    gather = ir.node("Gather", [x, indices], {"axis": -1}, name=fresh_name(graph, f"{name}.gather"))
    gather.outputs[0].name = fresh_name(graph, f"{name}.kept")
    gather.outputs[0].type = x.type
    if x.shape is not None:
        gather.outputs[0].shape = ir.Shape([*x.shape[:-1], len(features)])
    graph.insert_before(node, gather)
    node.replace_input_with(0, gather.outputs[0])
