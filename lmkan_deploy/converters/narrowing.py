"""Which types tables get: one for all, or the smallest within an error; what stays wide, and what all cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from lmkan_deploy.calibration import Calibration
from lmkan_deploy.converters.passes import note_outcomes
from lmkan_deploy.converters.passes.base import Outcome, all_lookups, lookups, table_dtype_of
from lmkan_deploy.converters.table_dtype import narrow_tables, tables_left
from lmkan_deploy.errors import ExportError
from lmkan_deploy.progress import Progress
from lmkan_deploy.runtime.tensors import Arrays
from lmkan_deploy.spec import TableDtype
from lmkan_deploy.verification import TableCosts


def choose_tables(
    model: ir.Model,
    table_dtype: TableDtype | None,
    calibration: Mapping[str, NDArray[Any]] | None,
    max_error: float | None,
    cases: Mapping[str, Arrays] | None,
    progress: Progress,
) -> tuple[Outcome, TableCosts | None]:
    """Gives a model its tables.

    Args:
        model: Changed in place.
        table_dtype: One type for all; None for the smallest ones, or for float32 where there is no largest error.
        calibration: Real inputs, by which scales and costs are measured.
        max_error: Largest relative error of the outputs on the calibration inputs; the smallest types within it
            are chosen.
        cases: Inputs to measure costs on where there is no calibration; None for not measuring them.
        progress: Called at each step.

    Returns:
        What was narrowed, and which tables stay as they are and why; and what narrow tables cost, where it was
        measured.

    Raises:
        ExportError: A table is beyond the range of its type.
    """
    left = [] if table_dtype is None and max_error is None else tables_left(model, table_dtype)
    if max_error is None and table_dtype in (None, "float32"):
        if left:
            note_outcomes(model, {"table-dtype": Outcome(refused=left)})
        return Outcome(refused=left), None
    if calibration is not None:
        cases = {"calibration": dict(calibration)}
    study = None if cases is None else Calibration(model, cases, weighted=calibration is not None)
    dtypes: Sequence[TableDtype] = [table_dtype or "float32"] * len(list(lookups(model)))
    if max_error is not None:
        assert study is not None
        dtypes = study.choose(max_error, progress)
    costs = None if study is None else study.costs(dtypes, progress)
    outcome = narrow_tables(model, dtypes, None if study is None else study.importances)
    if outcome.refused:
        raise ExportError(
            f"expected tables within the range of {table_dtype}, found {'; '.join(outcome.refused)}; choose "
            "another --table-dtype"
        )
    result = Outcome(outcome.applied, left)
    note_outcomes(model, {"table-dtype": result})
    return result, costs


def require_wide_tables(model: ir.Model, table_dtype: TableDtype | None) -> None:
    """Refuses a type that no table can get, because all have been narrowed already."""
    found = {table_dtype_of(node) for node in all_lookups(model)}
    if table_dtype is not None and found and "float32" not in found and found != {table_dtype}:
        raise ExportError(
            f"expected float32 tables to make {table_dtype} ones of, found {', '.join(sorted(found))}; start "
            "from the file with float32 tables"
        )
