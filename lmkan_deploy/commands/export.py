"""`lmkan-deploy export`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Optional

import typer

from lmkan_deploy.commands.arrays import check_output, read_feeds
from lmkan_deploy.commands.options import (
    Arch,
    ArchArgs,
    ArchPath,
    AsJson,
    CalibrationFile,
    ExternalData,
    InputsFile,
    InputShape,
    Key,
    MaxError,
    NoPasses,
    Passes,
    Quiet,
    RelativeTolerance,
    TableDtypeOption,
    TrustPickle,
    architecture,
    check_pass_options,
    file_to_write,
)
from lmkan_deploy.commands.terminal import print_json, show_progress


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="State dict, torch.export archive (.pt2) or pickled module.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--output",
            "-o",
            metavar="OUTPUT",
            parser=file_to_write,
            help="ONNX file to write. Default: CHECKPOINT with the suffix .onnx.",
        ),
    ] = None,
    arch: Arch = None,
    arch_path: ArchPath = None,
    arch_args: ArchArgs = None,
    input_shape: InputShape = None,
    trust_pickle: TrustPickle = False,
    key: Key = None,
    opset: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--opset",
            min=18,
            max=25,
            metavar="NUMBER",
            help="Version of ONNX's standard operators. Default: 20.",
        ),
    ] = None,
    passes: Passes = None,
    no_passes: NoPasses = None,
    table_dtype: TableDtypeOption = None,
    calibration: CalibrationFile = None,
    max_error: MaxError = None,
    external_data: ExternalData = None,
    verify_result: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare ONNX Runtime with PyTorch before writing.")
    ] = True,
    inputs: InputsFile = None,
    rtol: RelativeTolerance = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Export a trained network to ONNX, verified against PyTorch.

    Each lookup layer becomes one LMKAN2D node; the file also carries the operator as a function of standard
    operators, so it runs in every ONNX runtime. The file appears once it is complete and verified, or not at
    all. Loading a checkpoint runs no code from it unless --trust-pickle is given.

    Examples:

    A plain stack of lookup and BatchNorm layers:

        lmkan-deploy export model.pt -o model.onnx

    The state dict of a class in ./models.py:

        lmkan-deploy export model.pt --arch models:MethaneNet --arch-path .

    A traced convolutional network, with tables in half the space:

        lmkan-deploy export cnn.pt2 -o cnn.onnx --table-dtype float16

    The smallest tables that keep the model within 1% on real inputs:

        lmkan-deploy export model.pt --max-error 0.01 --calibration x.npz

    A class of an installed package, whose input shape can't be inferred:

        lmkan-deploy export cnn.pt --arch nets:CNN --input-shape batch,4,8,8
    """
    from lmkan_deploy import api

    check_pass_options(no_passes or [])
    if output is not None:
        check_output(output, calibration, inputs)
    with show_progress(quiet or as_json) as progress:
        result = api.export(
            checkpoint,
            output,
            architecture=architecture(arch, arch_path, arch_args),
            input_shapes=input_shape or [],
            trust_pickle=trust_pickle,
            key=key,
            opset=opset,
            passes=passes,
            without_passes=no_passes or [],
            table_dtype=table_dtype,  # type: ignore[arg-type]
            calibration=read_feeds(calibration),
            max_error=max_error,
            external_data=external_data,
            check=verify_result,
            inputs=read_feeds(inputs),
            rtol=rtol,
            progress=progress,
        )
    if as_json:
        checked = None if result.verification is None else result.verification.to_json()
        print_json(
            {
                "path": str(result.path),
                "kind": result.kind,
                "weights_only": result.weights_only,
                "notes": result.notes,
                "model": result.info.to_json(),
                "tables": None if result.tables is None else dataclasses.asdict(result.tables),
                "verification": checked,
            }
        )
        return
    if quiet:
        return
    from lmkan_deploy import report

    report.print_export(result)
