"""Removes nodes that compute nothing, and what nothing uses."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from lmkan_deploy.converters.passes.base import Outcome


def clean_up(model: ir.Model) -> Outcome:
    """Removes Identity nodes, unused nodes, initializers and opsets."""
    before = sum(1 for _ in model.graph.all_nodes())
    ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )(model)
    removed = before - sum(1 for _ in model.graph.all_nodes())
    return Outcome(applied=[f"{removed} nodes"] if removed else [])
