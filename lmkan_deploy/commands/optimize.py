"""`lmkan-deploy optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmkan_deploy.commands.arrays import read_feeds
from lmkan_deploy.commands.options import (
    CalibrationFile,
    ExternalData,
    MaxError,
    NoPasses,
    Passes,
    Quiet,
    RelativeTolerance,
    TableDtypeOption,
)
from lmkan_deploy.commands.terminal import show_progress


def optimize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX file.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUTPUT", help="ONNX file to write; may be MODEL.", show_default=False
        ),
    ],
    passes: Passes = None,
    no_passes: NoPasses = None,
    table_dtype: TableDtypeOption = None,
    calibration: CalibrationFile = None,
    max_error: MaxError = None,
    external_data: ExternalData = None,
    verify_result: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the two models before writing.")
    ] = True,
    rtol: RelativeTolerance = None,
    quiet: Quiet = False,
) -> None:
    """Run the graph passes on an exported model.

    The passes rewrite it into a cheaper one that computes the same; export runs them already:
    sink-transposes, cancel-reshapes, simplify-layout, fold-scale-shift, fold-linear-branch and
    drop-constant-pairs, until none finds anything; fold-table-transpose, clean-up and share-tables always run.

    Example:

        lmkan-deploy optimize model.onnx -o smaller.onnx
    """
    from lmkan_deploy import api

    with show_progress(quiet) as progress:
        result = api.optimize(
            model,
            output,
            passes=passes,
            without_passes=no_passes or [],
            table_dtype=table_dtype,  # type: ignore[arg-type]
            calibration=read_feeds(calibration),
            max_error=max_error,
            external_data=external_data,
            check=verify_result,
            rtol=rtol,
            progress=progress,
        )
    if not quiet:
        from lmkan_deploy import report

        report.print_optimization(result)
