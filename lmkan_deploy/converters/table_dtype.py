"""Tables in fewer bits: half the memory and traffic for a rounding of each entry."""

from __future__ import annotations

from typing import Literal, get_args

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lmkan_deploy.converters.passes.base import Outcome, float32_table, lookups, name_of, replace_table
from lmkan_deploy.errors import ExportError

TableDtype = Literal["float32", "float16", "bfloat16"]
"""Element type of the tables; activations, positions and sums are not affected."""

_NUMPY = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def narrow_tables(model: ir.Model, dtype: TableDtype) -> Outcome:
    """Rounds every constant float32 table to another type, to nearest even.

    Args:
        model: Changed in place.
        dtype: The type; float32 changes nothing.

    Returns:
        What was narrowed; refused are tables with entries beyond the type's range.

    Raises:
        ExportError: The type is unknown.
    """
    if dtype not in get_args(TableDtype):
        raise ExportError(f"expected a table type of {', '.join(get_args(TableDtype))}, found {dtype!r}")
    outcome = Outcome()
    if dtype == "float32":
        return outcome
    for node in lookups(model):
        table = float32_table(node)
        if table is None:
            continue
        largest = float(np.abs(table).max())
        limit = float(ml_dtypes.finfo(_NUMPY[dtype]).max)  # type: ignore[no-untyped-call]
        if largest > limit:
            outcome.refused.append(
                f"{name_of(node)}: its largest entry, {largest:.3g}, is beyond {limit:.3g}"
            )
            continue
        replace_table(model.graph, node, table.astype(_NUMPY[dtype]))
        outcome.applied.append(name_of(node))
    return outcome
