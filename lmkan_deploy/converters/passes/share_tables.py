"""Equal tables are kept once: a layer that is called several times has one table for all of its nodes, until a
rewrite gives each its own.
"""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
import onnx_ir.passes.common as common

from lmkan_deploy.converters.passes.base import Outcome, all_lookups


def share_tables(model: ir.Model) -> Outcome:
    """Merges equal constants, where some lookup nodes have tables of one shape and type."""
    tables = {id(node.inputs[1]): node.inputs[1] for node in all_lookups(model) if len(node.inputs) > 1}
    kinds = Counter(
        (table.dtype, tuple(table.shape))
        for table in tables.values()
        if table is not None and table.shape is not None
    )
    if max(kinds.values(), default=0) < 2:
        return Outcome()  # reading gigabytes to find nothing takes seconds
    before = len(model.graph.initializers)
    common.DeduplicateHashedInitializersPass(size_limit=1 << 62)(model)
    merged = before - len(model.graph.initializers)
    return Outcome(applied=[f"{merged} constants"] if merged else [])
