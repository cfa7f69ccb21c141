"""Reshapes that flatten all leading axes before a lookup layer, and give them back behind it, go: layers take any
number of leading axes, but batch-last classes take one alone.
"""

from __future__ import annotations

import onnx_ir as ir

from lmkan_deploy.converters.passes.base import Outcome, all_lookups, bypass, is_op, name_of, used_once


def cancel_reshapes(model: ir.Model) -> Outcome:
    """Removes both reshapes where the axes behind the layer are those before it."""
    outcome = Outcome()
    for lookup in all_lookups(model):
        x, y = lookup.inputs[0], lookup.outputs[0]
        before = None if x is None else x.producer()
        if before is None or not is_op(before, "Reshape") or not used_once(y):
            continue
        after, source = next(iter(y.uses())).node, before.inputs[0]
        if not is_op(after, "Reshape") or y is not after.inputs[0] or x is None or source is None:
            continue
        given_back = after.outputs[0]
        if _keeps_last(source, x) and _keeps_last(y, given_back) and _leading(source) == _leading(given_back):
            lookup.replace_input_with(0, source)
            y.shape = given_back.shape
            bypass(after, y)
            outcome.applied.append(f"{name_of(lookup)}: 2 reshapes")
    return outcome


def _keeps_last(value: ir.Value, reshaped: ir.Value) -> bool:
    """Whether a reshape leaves rows of the last axis as they are."""
    if not value.shape or not reshaped.shape:
        return False
    last = value.shape[-1]
    return isinstance(last, int) and last > 0 and reshaped.shape[-1] == last


def _leading(value: ir.Value) -> list[int | str] | None:
    """Axes but the last; None where one is unknown, which is like no other."""
    assert value.shape is not None
    axes = [size if isinstance(size, int) else size.value for size in value.shape[:-1]]
    return None if None in axes else [axis for axis in axes if axis is not None]
