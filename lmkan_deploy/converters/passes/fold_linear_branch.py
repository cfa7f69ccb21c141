"""lookup(x) + Linear(x), and lookup(x) + Linear(ReLU(x)) -> the table; differences and multiples too.

A bilinear function reproduces a linear one exactly, tails included, so a linear branch folds for every G.
ReLU is piecewise linear with its kink at 0: it folds exactly when 0 is a grid point, that is for even G.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

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
    used_once,
)
from lmkan_deploy.converters.passes.relu import relu_input
from lmkan_deploy.spec import grid_points


@dataclass(frozen=True)
class Linear:
    """features @ weight + bias.

    Attributes:
        features: What the branch takes, after the ReLU's removal.
        relu: Whether there was one.
        weight: float64 [N_in, N_out].
        bias: float64 [N_out].
    """

    features: ir.Value
    relu: bool
    weight: NDArray[np.float64]
    bias: NDArray[np.float64]

    def times(self, factor: float | NDArray[np.float64]) -> Linear:
        """A multiple; one factor, or one for each output."""
        return replace(self, weight=self.weight * factor, bias=self.bias * factor)


def fold_linear_branch(model: ir.Model) -> Outcome:
    """Folds every such branch that is exact to fold."""
    outcome = Outcome()
    for node in list(model.graph):
        if not is_op(node, "Add", "Sub"):
            continue
        left, right = node.inputs
        sign = -1.0 if node.op_type == "Sub" else 1.0
        for lookup_side, linear_side, lookup_sign, linear_sign in (
            (left, right, 1.0, sign),
            (right, left, sign, 1.0),
        ):
            lookup = None if lookup_side is None else lookup_side.producer()
            if lookup_side is None or linear_side is None or lookup is None or not is_lookup(lookup):
                continue
            if _is_relu_last(linear_side, lookup):
                outcome.refused.append(
                    f"{name_of(lookup)}: ReLU(Linear(x)) stays: its kinks are not along the grid"
                )
                break
            branch = _linear(linear_side)
            if branch is None:
                continue
            reason = _why_not(lookup, lookup_side, branch)
            form = "Linear(ReLU(x))" if branch.relu else "Linear(x)"
            if reason:
                outcome.refused.append(f"{name_of(lookup)}: {form} stays: {reason}")
                break
            table = float32_table(lookup)
            assert table is not None
            folded = _with_branch(np.float32(lookup_sign) * table, branch.times(linear_sign))
            if not np.isfinite(folded).all():
                outcome.refused.append(f"{name_of(lookup)}: {form} stays: the table would not be finite")
                break
            replace_table(model.graph, lookup, folded)
            bypass(node, lookup_side)
            outcome.applied.append(f"{name_of(lookup)}: {form}")
            break
    return outcome


def _is_relu_last(value: ir.Value, lookup: ir.Node) -> bool:
    source = relu_input(value)
    branch = None if source is None else _linear(source)
    return branch is not None and branch.features is lookup.inputs[0]


def _why_not(lookup: ir.Node, output: ir.Value, branch: Linear) -> str | None:
    if branch.features is not lookup.inputs[0]:
        return "it takes other features than the layer, or another function of them than ReLU"
    table = float32_table(lookup)
    if table is None:
        return "the table is not a float32 constant"
    if branch.weight.shape != (2 * table.shape[0], table.shape[3]):
        return f"its weight is {list(branch.weight.shape)}"
    if not used_once(output):
        return "the layer's output is used elsewhere too"
    num_grids = table.shape[1] - 1
    if branch.relu and num_grids % 2 == 1:
        return f"G = {num_grids} is odd, so 0 is not a grid point"
    return None


def _with_branch(table: NDArray[np.float32], branch: Linear) -> NDArray[np.float32]:
    grid = grid_points(table.shape[1] - 1)
    values = np.maximum(grid, 0.0) if branch.relu else grid
    result = np.empty_like(table)
    for pair in range(len(table)):
        first, second = branch.weight[2 * pair], branch.weight[2 * pair + 1]
        with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for what is not finite
            result[pair] = (
                table[pair].astype(np.float64)
                + values[:, None, None] * first
                + values[None, :, None] * second
                + branch.bias / len(table)
            )
    return result


def _linear(value: ir.Value | None) -> Linear | None:
    """The linear function that a value is, if it is one."""
    node = None if value is None else value.producer()
    if node is None:
        return None
    if is_op(node, "Gemm"):
        return _gemm(node)
    if is_op(node, "Neg"):
        inner = _linear(node.inputs[0])
        return None if inner is None else inner.times(-1)
    if is_op(node, "Add", "Mul", "Div"):
        for source, other in (tuple(node.inputs), tuple(reversed(node.inputs))):
            array = constant(other)
            inner = None if array is None else _linear(source)
            if inner is not None and array is not None and _is_row(array, inner.weight.shape[1]):
                if node.op_type == "Add":
                    return replace(inner, bias=inner.bias + array.astype(np.float64))
                if node.op_type == "Mul":
                    return inner.times(array.astype(np.float64))
                if source is node.inputs[0]:
                    with np.errstate(divide="ignore"):  # what is not finite is refused later
                        return inner.times(1 / array.astype(np.float64))
        return None
    if is_op(node, "MatMul", "Einsum"):
        weight = constant(node.inputs[1]) if is_op(node, "MatMul") else _einsum_weight(node)
        if weight is None or weight.ndim != 2 or node.inputs[0] is None:
            return None
        return _before_relu(node.inputs[0], weight.astype(np.float64), np.zeros(weight.shape[1]))
    return None


def _is_row(array: NDArray[Any], outputs: int) -> bool:
    """Whether an array has one value, or one for each output."""
    return array.ndim <= 1 and array.size in (1, outputs)


def _einsum_weight(node: ir.Node) -> NDArray[Any] | None:
    """The matrix [N_in, N_out] of a product with the last axis, such as bi,oi->bo."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    terms = re.fullmatch(r"([\w.]*)(\w),(\w)(\w)->([\w.]*)(\w)", equation)
    weight = constant(node.inputs[1]) if len(node.inputs) == 2 else None
    if terms is None or weight is None or weight.ndim != 2:
        return None
    axes, feature, first, second, result_axes, result = terms.groups()
    if axes != result_axes or result == feature or result in axes or feature in axes:
        return None
    if (first, second) == (feature, result):
        return weight
    return weight.T if (second, first) == (feature, result) else None


def _gemm(node: ir.Node) -> Linear | None:
    features, weight_value, *rest = node.inputs
    weight = constant(weight_value)
    if features is None or weight is None or node.attributes.get_int("transA", 0) != 0:
        return None
    weight = weight.astype(np.float64) * node.attributes.get_float("alpha", 1.0)
    if node.attributes.get_int("transB", 0) != 0:
        weight = weight.T
    bias = np.zeros(weight.shape[1])
    if rest and rest[0] is not None:
        array = constant(rest[0])
        if array is None or (array.size != 1 and array.shape not in (weight.shape[1:], (1, weight.shape[1]))):
            return None
        bias = bias + array.astype(np.float64).reshape(-1) * node.attributes.get_float("beta", 1.0)
    return _before_relu(features, weight, bias)


def _before_relu(features: ir.Value, weight: NDArray[np.float64], bias: NDArray[np.float64]) -> Linear:
    source = relu_input(features)
    return Linear(features if source is None else source, source is not None, weight, bias)
