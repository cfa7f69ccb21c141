"""The operators in ONNX: schemas, and the model-local functions of standard operators that define them.

Every exported model carries the functions of its operators. A runtime that knows an operator (ONNX Runtime
with the custom-op library, TensorRT with the plugin) runs its own kernel; any other one runs the function,
which is correct everywhere but gathers rows x pairs x 4 x N_out values.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import onnx
import onnx.defs
import onnx.parser
import onnx_ir as ir

from lmkan_deploy.errors import ExportError
from lmkan_deploy.spec import DOMAIN, OP_TYPE, OPSET_VERSION, QUANTIZED_OP_TYPE

if TYPE_CHECKING:
    from onnx import FunctionProto

_DOCS = {
    OP_TYPE: "Sum over feature pairs of two-dimensional functions on a spline lookup table.",
    QUANTIZED_OP_TYPE: "LMKAN2D with an int8 table: an entry is its integer times its pair and output's scale.",
}

_INPUTS = {OP_TYPE: ("x", "table"), QUANTIZED_OP_TYPE: ("x", "table", "scale")}

MIN_OPSET = 18
"""Oldest opset of the standard operators that has all that the function uses."""

PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(OPSET_VERSION)}
"""Node attributes by which TensorRT's parser finds the plugin; ONNX Runtime ignores them."""

# Float32 throughout, whatever the types of x and table. The grid follows from the table's shape; its right half
# from whole numbers, since 2 - doubled_level would lose the digits that its logarithm needs.
_FUNCTION_BODY = """
{
  zero = Constant <value = int64 {0}> ()
  one = Constant <value = int64 {1}> ()
  half_f = Constant <value = float {0.5}> ()
  one_f = Constant <value = float {1.0}> ()
  two_f = Constant <value = float {2.0}> ()
  zero_f = Constant <value = float {0.0}> ()
  list_minus_1 = Constant <value_ints = [-1]> ()
  list_0 = Constant <value_ints = [0]> ()
  list_1 = Constant <value_ints = [1]> ()
  list_2 = Constant <value_ints = [2]> ()
  list_4 = Constant <value_ints = [4]> ()

  table_shape = Shape (table)
  list_pairs = Shape <start = 0, end = 1> (table)
  list_points = Shape <start = 1, end = 2> (table)
  list_outputs = Shape <start = 3, end = 4> (table)
  pairs = Squeeze (list_pairs, list_0)
  points = Squeeze (list_points, list_0)
  grids = Sub (points, one)
  grids_f = Cast <to = 1> (grids)

  inner_index = Range (one, grids, one)
  inner_index_f = Cast <to = 1> (inner_index)
  doubled_level_n = Mul (two_f, inner_index_f)
  doubled_level = Div (doubled_level_n, grids_f)
  is_left = LessOrEqual (doubled_level, one_f)
  left_log = Log (doubled_level)
  right_index_f = Sub (grids_f, inner_index_f)
  doubled_rest_n = Mul (two_f, right_index_f)
  doubled_rest = Div (doubled_rest_n, grids_f)
  right_log_n = Log (doubled_rest)
  right_log = Neg (right_log_n)
  inner_grid = Where (is_left, left_log, right_log)
  inner_last = Sub (grids, list_2)
  inner_before_last = Sub (inner_last, one)
  first_inner = Gather (inner_grid, list_0)
  second_inner = Gather (inner_grid, list_1)
  last_inner = Gather (inner_grid, inner_last)
  before_last_inner = Gather (inner_grid, inner_before_last)
  first_doubled = Mul (two_f, first_inner)
  last_doubled = Mul (two_f, last_inner)
  first_point = Sub (first_doubled, second_inner)
  last_point = Sub (last_doubled, before_last_inner)
  grid = Concat <axis = 0> (first_point, inner_grid, last_point)
  list_grids = Unsqueeze (grids, list_0)
  lower = Slice (grid, list_0, list_grids, list_0)
  upper = Slice (grid, list_1, list_points, list_0)
  widths = Sub (upper, lower)

  x_float = Cast <to = 1> (x)
  feature_shape = Concat <axis = 0> (list_minus_1, list_pairs, list_2)
  features = Reshape (x_float, feature_shape)
  magnitude = Abs (features)
  decay = Neg (magnitude)
  decay_exp = Exp (decay)
  tail = Mul (half_f, decay_exp)
  rest = Sub (one_f, tail)
  is_positive = Greater (features, zero_f)
  sigma = Where (is_positive, rest, tail)
  level = Mul (sigma, grids_f)
  is_nan = IsNaN (level)
  safe_level = Where (is_nan, zero_f, level)
  cell_unclamped = Cast <to = 7> (safe_level)
  last_cell = Sub (grids, one)
  cell = Min (cell_unclamped, last_cell)
  cell_lower = Gather (lower, cell)
  cell_width = Gather (widths, cell)
  offset = Sub (features, cell_lower)
  position = Div (offset, cell_width)

  d1 = Slice (position, list_0, list_1, list_2)
  d2 = Slice (position, list_1, list_2, list_2)
  i1 = Slice (cell, list_0, list_1, list_2)
  i2 = Slice (cell, list_1, list_2, list_2)
  e1 = Sub (one_f, d1)
  e2 = Sub (one_f, d2)
  w00 = Mul (e1, e2)
  w01 = Mul (e1, d2)
  w10 = Mul (d1, e2)
  w11 = Mul (d1, d2)
  weights_by_pair = Concat <axis = 2> (w00, w01, w10, w11)
  list_corners = Mul (list_pairs, list_4)
  weight_shape = Concat <axis = 0> (list_minus_1, list_1, list_corners)
  weights = Reshape (weights_by_pair, weight_shape)

  pair_index_flat = Range (zero, pairs, one)
  pair_index = Unsqueeze (pair_index_flat, list_1)
  pair_line = Mul (pair_index, points)
  line = Add (pair_line, i1)
  line_start = Mul (line, points)
  row_00 = Add (line_start, i2)
  row_01 = Add (row_00, one)
  row_10 = Add (row_00, points)
  row_11 = Add (row_10, one)
  rows_by_pair = Concat <axis = 2> (row_00, row_01, row_10, row_11)
  row_shape = Concat <axis = 0> (list_minus_1, list_corners)
  rows = Reshape (rows_by_pair, row_shape)

  flat_shape = Concat <axis = 0> (list_minus_1, list_outputs)
  flat_table = Reshape (table, flat_shape)
  corners_stored = Gather (flat_table, rows)
  $CORNERS
  sums = MatMul (weights, corners)
  leading_shape = Shape <start = 0, end = -1> (x)
  y_shape = Concat <axis = 0> (leading_shape, list_outputs)
  y_float = Reshape <allowzero = 1> (sums, y_shape)
  y = CastLike (y_float, x)
}
"""


_CORNERS = {
    OP_TYPE: "corners = Cast <to = 1> (corners_stored)",
    QUANTIZED_OP_TYPE: """
  integers_flat = Cast <to = 1> (corners_stored)
  integers_shape = Concat <axis = 0> (list_minus_1, list_pairs, list_4, list_outputs)
  integers = Reshape (integers_flat, integers_shape)
  scale_by_pair = Unsqueeze (scale, list_1)
  corners_by_pair = Mul (integers, scale_by_pair)
  corners_shape = Concat <axis = 0> (list_minus_1, list_corners, list_outputs)
  corners = Reshape (corners_by_pair, corners_shape)""",
}


@functools.cache
def function_proto(opset: int, op_type: str = OP_TYPE) -> FunctionProto:
    """The function of an operator, with the plugin attributes declared so that checkers accept them on nodes.

    Args:
        opset: Version of the standard operators, which must be that of the model around it.
        op_type: `LMKAN2D` or `LMKAN2DQuantized`.

    Raises:
        ExportError: The version is older than `MIN_OPSET`.
    """
    if opset < MIN_OPSET:
        raise ExportError(f"expected ONNX opset {MIN_OPSET} or later, found {opset}; export with a later one")
    inputs = ", ".join(_INPUTS[op_type])
    header = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{op_type} ({inputs}) => (y)'
    function = onnx.parser.parse_function(header + _FUNCTION_BODY.replace("$CORNERS", _CORNERS[op_type]))
    for node in function.node:  # ONNX Runtime before 1.22 gives several nodes one name where it finds none
        node.name = node.output[0]
    function.attribute.extend(PLUGIN_ATTRIBUTES)
    function.doc_string = _DOCS[op_type]
    return function


def attach_function(model: ir.Model) -> None:
    """Adds (or replaces) the functions of the operators that a model uses, with their opset imports.

    Functions of operators that it does not use are removed. Nodes inside of other functions count as well.
    """
    for op_type in (OP_TYPE, QUANTIZED_OP_TYPE):
        model.functions.pop((DOMAIN, op_type, ""), None)
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    # A graph without standard operators need not import them, but the functions must agree on a version.
    opset = next((graph.opset_imports[""] for graph in graphs if "" in graph.opset_imports), MIN_OPSET)
    for op_type in (OP_TYPE, QUANTIZED_OP_TYPE):
        users = [
            graph
            for graph in graphs
            if any((node.domain, node.op_type) == (DOMAIN, op_type) for node in graph.all_nodes())
        ]
        if not users:
            continue
        function = ir.serde.deserialize_function(function_proto(opset, op_type))
        model.functions[DOMAIN, op_type, ""] = function
        model.graph.opset_imports.setdefault("", opset)
        for graph in (model.graph, *users):
            graph.opset_imports[DOMAIN] = OPSET_VERSION


def is_lookup(node: ir.Node) -> bool:
    """Whether a node is an `LMKAN2D`."""
    return (node.domain, node.op_type) == (DOMAIN, OP_TYPE)


def is_quantized_lookup(node: ir.Node) -> bool:
    """Whether a node is an `LMKAN2DQuantized`."""
    return (node.domain, node.op_type) == (DOMAIN, QUANTIZED_OP_TYPE)


@functools.cache
def operator_schema(op_type: str = OP_TYPE) -> onnx.defs.OpSchema:
    """An operator's schema; the first call registers it with onnx, as exporters and checkers need."""
    schema = onnx.defs.OpSchema
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    x = schema.FormalParameter("x", "T", "features, [..., N_in]")
    table_shape = "[N_in / 2, G + 1, G + 1, N_out]"
    tables = {
        OP_TYPE: [schema.FormalParameter("table", "W", table_shape)],
        QUANTIZED_OP_TYPE: [
            schema.FormalParameter("table", "tensor(int8)", table_shape),
            schema.FormalParameter("scale", "tensor(float)", "[N_in / 2, N_out]"),
        ],
    }
    constraints = [("T", floats, "features"), ("W", floats, "tables")]
    result = schema(
        op_type,
        DOMAIN,
        OPSET_VERSION,
        doc=_DOCS[op_type],
        inputs=[x, *tables[op_type]],
        outputs=[schema.FormalParameter("y", "T", "[..., N_out]")],
        type_constraints=constraints if op_type == OP_TYPE else constraints[:1],
        attributes=[
            schema.Attribute(name, onnx.helper.make_attribute(name, value), "for TensorRT's parser")
            for name, value in PLUGIN_ATTRIBUTES.items()
        ],
    )
    if not onnx.defs.has(op_type, DOMAIN):
        onnx.defs.register_schema(result)
    return result
