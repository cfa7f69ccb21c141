"""Removes nodes that compute nothing, and what nothing uses."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from lmkan_deploy.converters.passes.base import Outcome, bypass, is_op


def clean_up(model: ir.Model) -> Outcome:
    """Removes Identity nodes, unused nodes, initializers and opsets."""
    before = sum(1 for _ in model.graph.all_nodes())
    for node in list(model.graph):
        if is_op(node, "Identity") and _is_needless(node):
            assert node.inputs[0] is not None
            bypass(node, node.inputs[0])
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )(model)
    removed = before - sum(1 for _ in model.graph.all_nodes())
    return Outcome(applied=[f"{removed} nodes removed"] if removed else [])


def _is_needless(identity: ir.Node) -> bool:
    """An output that is an input, a weight or another output needs its Identity to have a name of its own."""
    source = identity.inputs[0]
    if source is None:
        return False
    return not identity.outputs[0].is_graph_output() or (
        source.producer() is not None and not source.is_graph_output()
    )
