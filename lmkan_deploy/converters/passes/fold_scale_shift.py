"""Scale and shift of each output after a lookup layer -> its table.

The four corner weights always sum to 1, in the tails too, so a constant c added to an output is c/P in every
table entry of each of the P pairs, and a factor is a factor of every entry. This covers BatchNorm in
inference, γ, biases, and signs; reshapes and transposes may stand between, as after a convolution.

Far beyond the grid a shift is not exact in float32: rounding leaves the sum of the weights off by about 1e-7
|d1 d2|, and c by as much of itself. The layer has errors of that size anyway; measured with rows of up to
1e6, folding c multiplies them by at most about 1 + |c| / (P |T|), T being the table's entries: negligible
while c/P is smaller than these, tenfold where it is ten times larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lmkan_deploy.converters.onnx_function import is_lookup
from lmkan_deploy.converters.passes.base import (
    Outcome,
    bypass,
    constant,
    float32_table,
    is_op,
    name_of,
    replace_table,
    static_shape,
    used_once,
)

_LAYOUT = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Affine:
    """data * scale + shift along one axis of data.

    Attributes:
        data: What is scaled and shifted.
        scale: float64, one value or one for each index of the axis.
        shift: The same.
        axis: None when scale and shift are single values.
    """

    data: ir.Value
    scale: NDArray[np.float64]
    shift: NDArray[np.float64]
    axis: int | None


def fold_scale_shift(model: ir.Model) -> Outcome:
    """Folds what can be folded, one operator after the other."""
    outcome = Outcome()
    for node in list(model.graph):
        affine = _affine(node)
        if affine is None:
            outcome.refused += _why_no_affine(node)
            continue
        found = _find_lookup(affine.data, affine.axis)
        if found is None:
            outcome.refused += _why_it_stays(node, affine)
            continue
        lookup, reason = found
        table = float32_table(lookup)
        if table is None:
            reason = reason or "the table is not a float32 constant"
        size = max(affine.scale.size, affine.shift.size)
        if table is not None and size not in (1, table.shape[-1]):
            reason = reason or f"it has {size} values for {table.shape[-1]} outputs"
        if not (np.isfinite(affine.scale).all() and np.isfinite(affine.shift).all()):
            reason = reason or "its scale or shift is not finite"
        if reason:
            outcome.refused.append(f"{name_of(lookup)}: {node.op_type} stays: {reason}")
            continue
        assert table is not None
        scaled = _scaled(table, affine.scale, affine.shift)
        if not np.isfinite(scaled).all():
            outcome.refused.append(f"{name_of(lookup)}: {node.op_type} stays: the table would not be finite")
            continue
        replace_table(model.graph, lookup, scaled)
        bypass(node, affine.data)
        outcome.applied.append(f"{name_of(lookup)}: {node.op_type}")
    return outcome


def _why_no_affine(node: ir.Node) -> list[str]:
    """Of arithmetic with a constant behind a lookup layer: what its constant is like."""
    if not is_op(node, "Mul", "Add", "Sub", "Div") or len(node.inputs) != 2:
        return []
    for data, other in (tuple(node.inputs), tuple(reversed(node.inputs))):
        found = None if data is None or constant(other) is None else _find_lookup(data, None)
        if found is not None and (node.op_type != "Div" or data is node.inputs[0]):
            return [
                f"{name_of(found[0])}: {node.op_type} stays: its constant does not go along the outputs alone"
            ]
    return []


def _why_it_stays(node: ir.Node, affine: Affine) -> list[str]:
    """Of a BatchNorm, and of what else is before a lookup layer: there is none whose outputs it scales."""
    after = [name_of(user) for user in _users(node.outputs[0]) if is_lookup(user)]
    source = affine.data.producer()
    while source is not None and is_op(source, *_LAYOUT) and source.inputs[0] is not None:
        source = source.inputs[0].producer()
    if source is not None and (after or is_op(node, "BatchNormalization")):
        return [
            f"{name_of(node)}: {node.op_type} stays: it follows {source.op_type}, not a lookup layer alone"
        ]
    if after:
        return [f"{name}: {node.op_type} before it stays: it would move the grid" for name in after]
    return (
        [f"{name_of(node)}: it stays: no lookup layer is before it"]
        if is_op(node, "BatchNormalization")
        else []
    )


def _users(value: ir.Value) -> list[ir.Node]:
    """Nodes that use a value, also behind reshapes and transposes."""
    users = []
    for use in value.uses():
        if is_op(use.node, *_LAYOUT):
            users += _users(use.node.outputs[0])
        elif use.idx == 0 or not is_lookup(use.node):
            users.append(use.node)
    return users


def _scaled(
    table: NDArray[np.float32], scale: NDArray[np.float64], shift: NDArray[np.float64]
) -> NDArray[np.float32]:
    result = np.empty_like(table)
    for pair in range(len(table)):  # pair by pair, since float64 of a whole table may be too much
        with np.errstate(over="ignore"):  # the caller looks for what is not finite
            result[pair] = table[pair].astype(np.float64) * scale + shift / len(table)
    return result


def _affine(node: ir.Node) -> Affine | None:
    if is_op(node, "BatchNormalization"):
        return _batch_norm(node)
    if is_op(node, "Neg") and node.inputs[0] is not None:
        return Affine(node.inputs[0], -np.ones(1), np.zeros(1), None)
    if not is_op(node, "Mul", "Add", "Sub", "Div") or len(node.inputs) != 2:
        return None
    left, right = node.inputs
    assert left is not None
    assert right is not None
    for data, other in ((left, right), (right, left)):
        array = constant(other)
        if array is None or not np.issubdtype(array.dtype, np.floating):
            continue
        axis = _broadcast_axis(data, array.shape)
        if axis == "no":
            return None
        values = array.astype(np.float64).reshape(-1)
        zero, one = np.zeros(1), np.ones(1)
        index = None if axis is None else int(axis)
        if node.op_type == "Mul":
            return Affine(data, values, zero, index)
        if node.op_type == "Add":
            return Affine(data, one, values, index)
        if node.op_type == "Sub":
            return Affine(data, one, -values, index) if data is left else Affine(data, -one, values, index)
        if data is left:
            with np.errstate(divide="ignore"):  # what is not finite is refused later
                return Affine(data, 1.0 / values, zero, index)
    return None


def _batch_norm(node: ir.Node) -> Affine | None:
    data, *parameters = node.inputs
    if data is None or node.attributes.get_int("training_mode", 0) != 0 or len(node.outputs) != 1:
        return None
    arrays = [constant(value) for value in parameters]
    if len(arrays) != 4 or any(array is None for array in arrays):
        return None
    gamma, beta, mean, variance = (np.asarray(array, np.float64) for array in arrays)
    with np.errstate(divide="ignore", invalid="ignore"):  # what is not finite is refused later
        scale = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
        return Affine(data, scale, beta - mean * scale, 1)


def _broadcast_axis(data: ir.Value, shape: tuple[int, ...]) -> int | str | None:
    """Axis of data along which a constant varies; None for a single value, "no" where there is no such axis."""
    if prod(shape) == 1:
        data_rank = None if data.shape is None else len(data.shape)
        return None if len(shape) <= (data_rank if data_rank is not None else 0) else "no"
    axes = [axis for axis, size in enumerate(shape) if size != 1]
    if data.shape is None or len(axes) != 1 or len(shape) > len(data.shape):
        return "no"
    axis = axes[0] + len(data.shape) - len(shape)
    return axis if data.shape[axis] == shape[axes[0]] else "no"


def _find_lookup(value: ir.Value, axis: int | None) -> tuple[ir.Node, str | None] | None:
    """The lookup whose outputs lie along `axis` of a value, and why it can't be changed, if it can't."""
    reason = None
    while True:
        node = value.producer()
        if node is None:
            return None
        if not used_once(value):
            reason = "the layer's output is used elsewhere too"
        if is_lookup(node):
            rank = None if value.shape is None else len(value.shape)
            is_last = axis is None or (rank is not None and axis == rank - 1)
            return node, reason if is_last else "it does not go along the outputs"
        if is_op(node, *_LAYOUT) and node.inputs[0] is not None:
            axis = axis if axis is None else _axis_before(node, axis)
            if axis == -1:
                return None
            value = node.inputs[0]
            continue
        return None


def _axis_before(node: ir.Node, axis: int) -> int:
    """The input's axis that is an output's axis of a layout operator; -1 when none is."""
    source, result = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    if is_op(node, "Transpose"):
        permutation = node.attributes.get_ints("perm", ())
        return int(permutation[axis]) if permutation else -1
    if source is None or result is None:
        return -1
    # The same axis: of the same size, with as many elements behind it.
    behind = result[axis + 1 :]
    if result[axis] is None or any(size is None for size in behind):
        return -1
    wanted = prod(size for size in behind if size is not None)
    for candidate in range(len(source) - 1, -1, -1):
        rest = source[candidate + 1 :]
        if any(size is None for size in rest):
            return -1
        if source[candidate] == result[axis] and prod(size for size in rest if size is not None) == wanted:
            return candidate
    return -1
