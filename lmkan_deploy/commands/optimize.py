"""`lmkan-deploy optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lmkan_deploy.commands.arrays import check_output, read_feeds
from lmkan_deploy.commands.help import Command
from lmkan_deploy.commands.options import (
    CalibrationFile,
    ExternalData,
    MaxError,
    NoPasses,
    Passes,
    Quiet,
    RelativeTolerance,
    TableDtypeOption,
    check_pass_options,
    file_to_write,
)
from lmkan_deploy.commands.terminal import show_progress


class OptimizeCommand(Command):
    """Its help describes the passes, which are loaded for that alone."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the options, and behind them the passes."""
        super().format_options(ctx, formatter)
        from lmkan_deploy.converters.passes import PASSES, select_passes

        needed = select_passes(without=["all"])
        with formatter.section("Passes"):
            formatter.write_dl(
                [
                    (item.name, f"{item.summary}{' (always runs)' if item in needed else ''}")
                    for item in PASSES
                ]
            )


def optimize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX file.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUTPUT",
            parser=file_to_write,
            help="ONNX file to write; may be MODEL.",
            show_default=False,
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

    The passes rewrite it into a cheaper one that computes the same, until none finds anything. Export runs
    them already.

    Example:

        lmkan-deploy optimize model.onnx -o smaller.onnx
    """
    from lmkan_deploy import api

    check_pass_options(no_passes or [])
    check_output(output, calibration)
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
