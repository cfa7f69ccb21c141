"""`lmkan-deploy build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lmkan_deploy.commands.completion import engine_runtimes
from lmkan_deploy.commands.options import AsJson, Plugin, Quiet, file_to_write
from lmkan_deploy.commands.terminal import print_json, show_progress


def build(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX file.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUTPUT",
            parser=file_to_write,
            help="Engine to write, such as m.engine; its manifest is OUTPUT.json.",
            show_default=False,
        ),
    ],
    runtime: Annotated[
        str,
        typer.Option(
            "--runtime",
            metavar="NAME",
            help="tensorrt (lookup layers run in the plugin) or tensorrt-rtx (without plugins; builds on "
            "machines that have no GPU).",
            autocompletion=engine_runtimes,
        ),
    ] = "tensorrt",
    shapes: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--shapes",
            metavar="NAME:MIN,OPT,MAX",
            help="Smallest, typical and largest shape of an input, such as x:1x12,64x12,1024x12. Once for each "
            "input; given again for an input, it begins another optimization profile. Default: 1, 64 and 1024 "
            "for free axes.",
        ),
    ] = None,
    timing_cache: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--timing-cache", metavar="FILE", help="Measured kernel timings, kept from build to build."
        ),
    ] = None,
    plugin: Plugin = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Build a TensorRT engine from an exported model.

    Types are those of the model. The engine fits the release of TensorRT and the GPU that it was built with;
    its manifest says which. A batch runs with the profile whose typical shape is nearest.

    Examples:

        lmkan-deploy build m.onnx -o m.engine --shapes x:1x12,64x12,4096x12

        lmkan-deploy build m.onnx -o m.engine --runtime tensorrt-rtx
    """
    from lmkan_deploy.engines.build import build_engine

    with show_progress(quiet or as_json) as progress:
        manifest = build_engine(
            model,
            output,
            runtime=runtime,  # type: ignore[arg-type]
            shapes=shapes or [],
            timing_cache=timing_cache,
            plugin=plugin,
            progress=progress,
        )
    if as_json:
        print_json(manifest.to_json())
    elif not quiet:
        from lmkan_deploy import report

        report.print_engine(output, manifest)
