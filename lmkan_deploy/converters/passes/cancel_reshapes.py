"""Reshapes that flatten all leading axes before a lookup layer, and give them back behind it, go: layers take any
number of leading axes, but batch-last classes take one alone.
"""

from __future__ import annotations

import onnx_ir as ir

from lmkan_deploy.converters.passes.base import (
    Outcome,
    all_lookups,
    bypass,
    is_op,
    known_shape,
    name_of,
    used_once,
)

Shape = list[int | str]


def cancel_reshapes(model: ir.Model) -> Outcome:
    """Removes both reshapes where the axes behind the layer are those before it."""
    outcome = Outcome()
    for lookup in all_lookups(model):
        x, y = lookup.inputs[0] if lookup.inputs else None, lookup.outputs[0]
        before = None if x is None else x.producer()
        if before is None or not is_op(before, "Reshape") or not used_once(y):
            continue
        after, source = next(iter(y.uses())).node, before.inputs[0]
        if not is_op(after, "Reshape") or y is not after.inputs[0] or x is None or source is None:
            continue
        shapes = [known_shape(value) for value in (source, x, y, after.outputs[0])]
        if _undo_each_other(*shapes):
            lookup.replace_input_with(0, source)
            y.shape = after.outputs[0].shape
            bypass(after, y)
            outcome.applied.append(f"{name_of(lookup)}: 2 reshapes")
    return outcome


def _undo_each_other(
    source: Shape | None, flat: Shape | None, flat_outputs: Shape | None, outputs: Shape | None
) -> bool:
    """Whether rows of features stay together before the layer, rows of outputs behind it, and the axes over them
    are the same in the end.
    """
    if not source or not flat or not flat_outputs or not outputs:
        return False
    kept = source[-1] == flat[-1] and flat_outputs[-1] == outputs[-1]
    return (
        kept and all(isinstance(shape[-1], int) for shape in (flat, outputs)) and source[:-1] == outputs[:-1]
    )
