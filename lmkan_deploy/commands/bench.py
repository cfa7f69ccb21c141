"""`lmkan-deploy bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lmkan_deploy.commands.arrays import read_arrays
from lmkan_deploy.commands.completion import runtimes
from lmkan_deploy.commands.options import (
    MAX_SIZE,
    RUNTIMES,
    AsJson,
    CudaGraphs,
    Device,
    Plugin,
    Quiet,
    Seed,
    Threads,
)
from lmkan_deploy.commands.terminal import print_json, show_progress


def bench(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL...", help="ONNX files of any network, and engines.", show_default=False
        ),
    ],
    runtime: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--runtime",
            metavar="NAME",
            help=f"What to run ONNX files with: {RUNTIMES} May be repeated. Default: onnxruntime.",
            autocompletion=runtimes,
        ),
    ] = None,
    batch: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(
            "--batch",
            min=1,
            max=MAX_SIZE,
            metavar="NUMBER",
            help="Size of the leading free axes of the random inputs; other free axes get a small size. May "
            "be repeated. Default: 1, 64, 1024.",
        ),
    ] = None,
    inputs: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--inputs", "-i", metavar="FILE", help="Inputs instead of random ones: .npz or .npy."),
    ] = None,
    threads: Threads = None,
    device: Device = 0,
    plugin: Plugin = None,
    cuda_graphs: CudaGraphs = False,
    seconds: Annotated[
        float, typer.Option(metavar="NUMBER", help="Seconds for each model at each batch size.")
    ] = 1.0,
    seed: Seed = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    r"""Time models side by side.

    Models take turns, so that a slow moment of the machine hits all of them: compare the column "time / first",
    which is the median of rounds with its quartiles. A call goes from arrays in the host's memory to arrays
    there, through the runtime's own call. Random inputs differ from call to call.

    Examples:

    One row, and batches:

        lmkan-deploy bench model.onnx --threads 1

    Against the network it replaces, and with tables of another type:

        lmkan-deploy bench mlp.onnx model.onnx int8.onnx --batch 256

    The compiled operators against the functions that the file carries, on real inputs:

        lmkan-deploy bench model.onnx -i x.npz --runtime onnxruntime \
            --runtime onnxruntime-function
    """
    from lmkan_deploy import api

    with show_progress(quiet or as_json) as progress:
        result = api.bench(
            models,
            runtimes=runtime or ("onnxruntime",),  # type: ignore[arg-type]
            batch_sizes=batch or (1, 64, 1024),
            inputs=None if inputs is None else lambda names: read_arrays(inputs, names),
            threads=threads,
            device=device,
            plugin=plugin,
            cuda_graphs=cuda_graphs,
            seconds=seconds,
            seed=seed,
            progress=progress,
        )
    if as_json:
        print_json([latency.to_json() for latency in result])
    elif not quiet:
        from lmkan_deploy import report

        report.print_latencies(result)
