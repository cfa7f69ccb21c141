"""Equal tables are kept once: a layer that is called several times has one table for all of its nodes, until a
rewrite gives each its own.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from lmkan_deploy.converters.passes.base import Outcome, all_lookups, constant, name_of


def share_tables(model: ir.Model) -> Outcome:
    """Merges equal tables and equal scales of lookup nodes."""
    outcome = Outcome()
    kinds: dict[object, dict[int, ir.Value]] = defaultdict(dict)
    for node in all_lookups(model):
        for value in node.inputs[1:]:
            if value is not None and value.is_initializer() and value.shape is not None:
                kinds[value.dtype, tuple(value.shape)][id(value)] = value
    for values in kinds.values():
        if len(values) > 1:  # reading gigabytes to find nothing takes seconds
            outcome.applied += _merge(model, values.values())
    return outcome


def _merge(model: ir.Model, values: Iterable[ir.Value]) -> list[str]:
    first: dict[bytes, ir.Value] = {}
    lines = []
    for value in values:
        array = constant(value)
        if array is None:
            continue
        digest = hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).digest()
        kept = first.setdefault(digest, value)
        if kept is value or value.is_graph_output():
            continue
        users = [use.node for use in value.uses()]
        ir.convenience.replace_all_uses_with(value, kept)
        model.graph.initializers.pop(str(value.name), None)
        lines.append(f"{name_of(users[0])}: has {kept.name}")
    return lines
