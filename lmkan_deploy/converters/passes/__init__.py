"""Graph passes, one rewrite a file, in the order in which they run.

A pass works on an `onnx_ir.Model` in place and says how many times it applied. All of them keep the
function that the model computes.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from lmkan_deploy.converters.passes.clean_up import clean_up
from lmkan_deploy.converters.passes.fold_table_transpose import fold_table_transpose

PASSES: dict[str, Callable[[ir.Model], int]] = {
    "fold-table-transpose": fold_table_transpose,
    "clean-up": clean_up,
}
"""Name on the command line and in metadata -> pass; the value returned is the number of applications."""


def run_passes(model: ir.Model) -> dict[str, int]:
    """Runs all passes in order.

    Args:
        model: Changed in place.

    Returns:
        Pass name -> number of applications, for those that applied.
    """
    applied = {name: run(model) for name, run in PASSES.items()}
    return {name: count for name, count in applied.items() if count}
