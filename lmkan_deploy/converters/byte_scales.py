"""Scales of int8 tables of small grids, stored in a byte each.

A scale of float32 takes 4 bytes beside (G + 1)² entries of one byte: 8% at G = 6, 25% at G = 3. Such tables keep
multiples of a step instead, one step for all outputs or for each. `Cast` and `Mul` make the operator's scales
of them; runtimes compute these once, when they load the model.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lmkan_deploy.converters.passes.base import add_constant, constant, fresh_name, is_op

_LARGEST_GRID = 6
"""Up to this G float32 scales would make an int8 table larger than 0.27 of a float32 one."""

_LARGEST = 255

_ONE_STEP = 16
"""Up to this ratio of outputs' largest scales one step does for all: it makes the smallest's 6% coarser. A step
for each output costs 4 bytes, as much as 4 pairs' scales.
"""


def needs_byte_scales(num_grids: int) -> bool:
    """Whether scales of tables with this G are stored in bytes."""
    return num_grids <= _LARGEST_GRID


def scale_bytes(num_pairs: int, num_grids: int, num_outputs: int) -> int:
    """Bytes of a table's scales in a file, with one step for all outputs."""
    if needs_byte_scales(num_grids):
        return num_pairs * num_outputs + 4
    return 4 * num_pairs * num_outputs


def to_bytes(scales: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Rounds scales up, so that no entry of their table is clipped.

    Args:
        scales: [P, N_out], all positive.

    Returns:
        Multiples, [P, N_out], and the step, [1], or steps, [N_out]. Their product is at most a step above the
        scale. A step is a 255th of an output's largest scale (outputs add up over the pairs, so what counts is
        the pair with the largest), or of the table's, where no output's is much smaller.
    """
    largest = scales.max(axis=0)
    if largest.max() <= _ONE_STEP * largest.min():
        largest = largest.max(keepdims=True)
    step = np.maximum(largest / np.float32(_LARGEST), np.finfo(np.float32).tiny).astype(np.float32)
    multiple = np.ceil(scales.astype(np.float64) / step)
    return np.clip(multiple, 1, _LARGEST).astype(np.uint8), step


def from_bytes(multiple: NDArray[np.uint8], step: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scales, as `Cast` and `Mul` compute them."""
    return multiple.astype(np.float32) * step


def add_byte_scales(
    graph: ir.Graph, before: ir.Node, name: str, multiple: NDArray[np.uint8], step: NDArray[np.float32]
) -> ir.Value:
    """Adds the nodes that make scales of bytes.

    Args:
        graph: Gets the nodes and two initializers.
        before: The first node that uses the scales.
        name: Of the scales.
        multiple: [P, N_out].
        step: [1] or [N_out].

    Returns:
        The scales, [P, N_out] float32.
    """
    whole = add_constant(graph, f"{name}.multiple", multiple)
    cast = ir.node(
        "Cast",
        [whole],
        {"to": ir.DataType.FLOAT.value},
        name=fresh_name(graph, f"{name}.cast"),
        num_outputs=1,
    )
    cast.outputs[0].name = fresh_name(graph, f"{name}.float")
    graph.insert_before(before, cast)
    mul = ir.node(
        "Mul",
        [cast.outputs[0], add_constant(graph, f"{name}.step", step)],
        name=fresh_name(graph, f"{name}.mul"),
        num_outputs=1,
    )
    mul.outputs[0].name = fresh_name(graph, name)
    graph.insert_before(before, mul)
    for node in (cast, mul):
        node.outputs[0].shape = ir.Shape(multiple.shape)
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return mul.outputs[0]


def constant_scales(node: ir.Node) -> NDArray[np.float32] | None:
    """The scales of a node with an int8 table, None where they are computed in another way than here."""
    arrays = [constant(value) for value in _constants(node)]
    if len(arrays) == 2:
        multiple, step = arrays
        if multiple is None or step is None or multiple.dtype != np.uint8 or step.dtype != np.float32:
            return None
        return from_bytes(multiple, step)
    return arrays[0] if arrays else None


def scale_weights(node: ir.Node) -> list[tuple[ir.Value, int]]:
    """The weights that are a node's scales, or of which they are computed here, and their bytes; none of a node
    without scales.
    """
    tensors = [(value, ir.convenience.get_const_tensor(value)) for value in _constants(node)]
    return [(value, tensor.nbytes) for value, tensor in tensors if tensor is not None]


def _constants(node: ir.Node) -> list[ir.Value]:
    """The scales, or multiples and steps."""
    scales = node.inputs[2] if len(node.inputs) > 2 else None
    if scales is None:
        return []
    mul = scales.producer()
    if mul is None or not is_op(mul, "Mul") or len(mul.inputs) != 2:
        return [scales]
    multiple, step = mul.inputs
    cast = None if multiple is None else multiple.producer()
    if (
        cast is None
        or not is_op(cast, "Cast")
        or len(cast.inputs) != 1
        or cast.inputs[0] is None
        or step is None
    ):
        return [scales]
    return [cast.inputs[0], step]
