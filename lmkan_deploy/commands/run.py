"""`lmkan-deploy run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmkan_deploy.commands.arrays import check_output, check_suffix, read_arrays, write_arrays
from lmkan_deploy.commands.completion import runtimes
from lmkan_deploy.commands.options import (
    RUNTIMES,
    CudaGraphs,
    Device,
    Plugin,
    Quiet,
    Threads,
    file_to_write,
)
from lmkan_deploy.commands.terminal import show_progress
from lmkan_deploy.progress import Step


def run(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX file or engine.", show_default=False)],
    inputs: Annotated[
        Path,
        typer.Option(
            "--inputs",
            "-i",
            metavar="FILE",
            help="Inputs: .npz with an array for each, or .npy for a single one.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUTPUT",
            parser=file_to_write,
            help="Where to write the outputs: .npz, or .npy for a single one.",
        ),
    ] = Path("outputs.npz"),
    runtime: Annotated[
        str,
        typer.Option(
            "--runtime",
            metavar="NAME",
            help=f"What to run it with: {RUNTIMES}",
            autocompletion=runtimes,
        ),
    ] = "onnxruntime",
    threads: Threads = None,
    device: Device = 0,
    plugin: Plugin = None,
    cuda_graphs: CudaGraphs = False,
    quiet: Quiet = False,
) -> None:
    """Run a model on arrays in a file.

    Examples:

        lmkan-deploy run model.onnx -i x.npz -o y.npz

        lmkan-deploy run model.onnx -i x.npy -o y.npy --threads 1
    """
    from lmkan_deploy.runtime.runner import load_runner
    from lmkan_deploy.staging import output_file

    output_file(output)  # refused before the work begins
    check_output(output, model, inputs, Path(f"{model}.data"), Path(f"{model}.json"))
    check_suffix(output)
    with show_progress(quiet) as progress:
        progress(Step("loading"))
        runner = load_runner(
            model,
            runtime,  # type: ignore[arg-type]
            threads=threads,
            device=device,
            plugin=plugin,
            cuda_graphs=cuda_graphs,
        )
        feeds = read_arrays(inputs, [spec.name for spec in runner.inputs])
        progress(Step("running"))
        results = runner.run(feeds)
        write_arrays(output, results)
    if not quiet:
        shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in results.items())
        typer.echo(f"{output}: {shapes}")
