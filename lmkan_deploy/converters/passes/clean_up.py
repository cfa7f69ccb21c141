"""Removes nodes that compute nothing, and what nothing uses."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common


def clean_up(model: ir.Model) -> int:
    """Removes Identity nodes, unused nodes, initializers and opsets; returns the number of nodes removed."""
    before = sum(1 for _ in model.graph.all_nodes())
    ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )(model)
    return before - sum(1 for _ in model.graph.all_nodes())
