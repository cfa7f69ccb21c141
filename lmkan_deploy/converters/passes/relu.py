"""ReLU, as networks write it."""

from __future__ import annotations

import onnx_ir as ir

from lmkan_deploy.converters.passes.base import constant, is_op, known_shape

_ABOVE, _BELOW = ("Greater", "GreaterOrEqual"), ("Less", "LessOrEqual")


def relu_input(value: ir.Value | None) -> ir.Value | None:
    """What a value is the ReLU of; None where it is none, or written in a way that is not known here: Relu, Clip
    and Max with 0, Where(x > 0, x, 0), x · (x > 0).
    """
    node = None if value is None else value.producer()
    if value is None or node is None:
        return None
    if is_op(node, "Relu"):
        return node.inputs[0]
    found = _written_out(node)
    # Zeros may have more axes than x, which a fold would lose.
    shape = None if found is None else known_shape(found)
    return found if shape is not None and shape == known_shape(value) else None


def _written_out(node: ir.Node) -> ir.Value | None:
    inputs = list(node.inputs)
    if is_op(node, "Clip") and len(inputs) > 1 and inputs[2:] in ([], [None]):
        return inputs[0] if _is_zero(inputs[1]) else None
    if is_op(node, "Max") and len(inputs) == 2:
        return next((x for x, other in (inputs, inputs[::-1]) if _is_zero(other)), None)
    if is_op(node, "Where"):
        condition, yes, no = inputs
        if _is_zero(no) and _compares(condition, _ABOVE, yes):
            return yes
        return no if _is_zero(yes) and _compares(condition, _BELOW, no) else None
    if is_op(node, "Mul"):
        for x, factor in (inputs, inputs[::-1]):
            cast = None if factor is None else factor.producer()
            if cast is not None and is_op(cast, "Cast") and _compares(cast.inputs[0], _ABOVE, x):
                return x
    return None


def _compares(condition: ir.Value | None, op_types: tuple[str, ...], x: ir.Value | None) -> bool:
    """Whether a condition compares a value with 0."""
    node = None if condition is None else condition.producer()
    return node is not None and is_op(node, *op_types) and node.inputs[0] is x and _is_zero(node.inputs[1])


def _is_zero(value: ir.Value | None) -> bool:
    """A constant 0, or one that is repeated."""
    node = None if value is None else value.producer()
    if node is not None and is_op(node, "Expand"):
        return _is_zero(node.inputs[0])
    array = constant(value)
    return array is not None and array.size == 1 and not array.any()
