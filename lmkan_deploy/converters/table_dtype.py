"""Tables in fewer bits: less memory and traffic for a rounding of each entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lmkan_deploy.converters.byte_scales import (
    add_byte_scales,
    constant_scales,
    from_bytes,
    needs_byte_scales,
    to_bytes,
)
from lmkan_deploy.converters.onnx_function import attach_function, is_lookup, is_quantized_lookup
from lmkan_deploy.converters.passes.base import (
    Outcome,
    add_constant,
    constant,
    drop_table,
    float32_table,
    lookups,
    name_of,
    replace_table,
    table_dtype_of,
)
from lmkan_deploy.converters.passes.clean_up import clean_up
from lmkan_deploy.converters.passes.share_tables import share_tables
from lmkan_deploy.converters.quantize import round_table, table_scales
from lmkan_deploy.errors import ExportError
from lmkan_deploy.reference import dequantize_table
from lmkan_deploy.spec import OP_TYPE, QUANTIZED_OP_TYPE, TABLE_DTYPES, TableDtype

_HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def narrow_tables(
    model: ir.Model,
    dtypes: TableDtype | Sequence[TableDtype],
    importances: Sequence[NDArray[np.float64]] | None = None,
) -> Outcome:
    """Rounds constant float32 tables to another type, to nearest even.

    Args:
        model: Changed in place. Nodes with an int8 table become `LMKAN2DQuantized`.
        dtypes: One type for all tables, or one for each node of `lookups`; float32 changes nothing.
        importances: For int8, the weight of each entry's error, one array for each node of `lookups`; see
            `quantize_table`.

    Returns:
        What was narrowed; refused are tables with entries beyond the type's range.

    Raises:
        ExportError: A type is unknown.
    """
    nodes = list(lookups(model))
    chosen = [dtypes] * len(nodes) if isinstance(dtypes, str) else list(dtypes)
    for dtype in {dtypes} if isinstance(dtypes, str) else set(chosen):
        if dtype not in TABLE_DTYPES:
            raise ExportError(f"expected a table type of {', '.join(TABLE_DTYPES)}, found {dtype!r}")
    if importances is not None:
        importances = _together(nodes, chosen, importances)
    outcome = Outcome()
    quantized: dict[int, _Quantized] = {}
    for index, (node, dtype) in enumerate(zip(nodes, chosen, strict=True)):
        table = float32_table(node)
        if table is None or dtype == "float32":
            continue
        if dtype == "int8":
            importance = None if importances is None else importances[index]
            _quantize(model.graph, node, table, importance, quantized)
        elif not _round(model.graph, node, table, dtype, outcome):
            continue
        outcome.applied.append(f"{name_of(node)}: {dtype}")
    share_tables(model)
    attach_function(model)
    return outcome


def _together(
    nodes: Sequence[ir.Node], dtypes: Sequence[TableDtype], importances: Sequence[NDArray[np.float64]]
) -> list[NDArray[np.float64]]:
    """Importances of nodes that share a table, added up, so that they go on sharing it."""
    sums: dict[int, NDArray[np.float64]] = {}
    keys = [id(node.inputs[1]) for node in nodes]
    for key, dtype, importance in zip(keys, dtypes, importances, strict=True):
        if dtype == "int8":
            sums[key] = sums[key] + importance if key in sums else importance
    return [sums.get(key, importance) for key, importance in zip(keys, importances, strict=True)]


def tables_left(model: ir.Model, dtype: TableDtype | None) -> list[str]:
    """Lookup nodes whose tables `narrow_tables` does not touch, a line with the reason for each.

    Args:
        model: Before it is narrowed.
        dtype: The wanted type, which needs no reason; None where every layer gets one of its own.
    """
    lines = []
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in graph.all_nodes():
            if not (is_lookup(node) or is_quantized_lookup(node)) or len(node.inputs) < 2:
                continue
            found = table_dtype_of(node)
            if found == dtype:
                continue
            if found != "float32":
                lines.append(f"{name_of(node)}: its table is {found} already")
            elif node.graph is not model.graph:
                lines.append(f"{name_of(node)}: it is inside of a branch, a loop or a function")
            elif constant(node.inputs[1]) is None:
                lines.append(f"{name_of(node)}: its table is not constant")
    return lines


def _round(
    graph: ir.Graph, node: ir.Node, table: NDArray[np.float32], dtype: TableDtype, outcome: Outcome
) -> bool:
    largest = float(np.abs(table).max())
    limit = float(ml_dtypes.finfo(_HALVES[dtype]).max)  # type: ignore[no-untyped-call]
    if largest > limit:
        outcome.refused.append(f"{name_of(node)}: its largest entry, {largest:.3g}, is beyond {limit:.3g}")
        return False
    replace_table(graph, node, table.astype(_HALVES[dtype]))
    return True


class _Quantized(NamedTuple):
    original: ir.Value
    table: ir.Value
    scale: ir.Value


def _quantize(
    graph: ir.Graph,
    node: ir.Node,
    table: NDArray[np.float32],
    importance: NDArray[np.float64] | None,
    quantized: dict[int, _Quantized],
) -> None:
    """Gives a node an int8 table; nodes of one table have one again, in `quantized` by the table's identity."""
    original = node.inputs[1]
    assert original is not None
    name = drop_table(graph, node)
    if id(original) not in quantized:
        scales = table_scales(table, importance)
        if needs_byte_scales(table.shape[1] - 1):
            multiple, step = to_bytes(scales)
            scales = from_bytes(multiple, step)
            scale = add_byte_scales(graph, node, f"{name_of(node)}.scale", multiple, step)
        else:
            scale = add_constant(graph, f"{name_of(node)}.scale", scales)
        integers = add_constant(graph, name, round_table(table, scales))
        quantized[id(original)] = _Quantized(original, integers, scale)
    node.resize_inputs(3)
    node.replace_input_with(1, quantized[id(original)].table)
    node.replace_input_with(2, quantized[id(original)].scale)
    node.op_type = QUANTIZED_OP_TYPE


def store_scales(model: ir.Model) -> None:
    """Stores the scales of int8 tables that a model computes of constants, where a runtime does not do so itself.

    Args:
        model: Changed in place.
    """
    for node in [node for node in model.graph if is_quantized_lookup(node)]:
        scales = constant_scales(node)
        if scales is not None and constant(node.inputs[2]) is None:
            node.replace_input_with(2, add_constant(model.graph, f"{name_of(node)}.scale", scales))
    share_tables(model)
    clean_up(model)


def dequantize_tables(model: ir.Model) -> None:
    """Turns `LMKAN2DQuantized` nodes with constant tables into `LMKAN2D` nodes with the float32 tables that
    they stand for, where a runtime takes no int8 constants.

    Args:
        model: Changed in place.
    """
    for node in [node for node in model.graph if is_quantized_lookup(node)]:
        table, scale = constant(node.inputs[1]), constant_scales(node)
        if table is None or scale is None:
            continue
        replace_table(model.graph, node, dequantize_table(table, scale).astype(np.float32))
        node.resize_inputs(2)
        node.op_type = OP_TYPE
    clean_up(model)
    attach_function(model)
