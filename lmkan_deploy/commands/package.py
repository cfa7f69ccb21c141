"""`lmkan-deploy package`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Optional

import typer

from lmkan_deploy.commands.completion import package_formats
from lmkan_deploy.packaging.package import (
    DEFAULT_MAX_BATCH,
    DEFAULT_MAX_DELAY_US,
    MAX_BATCH,
    MAX_DELAY_US,
    package_model,
)


def package(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="ONNX file; for triton also a TensorRT engine.", show_default=False
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder to make; it may exist if empty.", show_default=False
        ),
    ],
    format: Annotated[  # noqa: A002
        str,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help="triton (ONNX Runtime or TensorRT backend), triton-python (Python backend), kserve or ray.",
            autocompletion=package_formats,
        ),
    ] = "triton",
    name: Annotated[
        Optional[str],  # noqa: UP045  typer evaluates annotations on Python 3.10
        typer.Option(
            "--name",
            metavar="NAME",
            help="The model's name on the server. Default: MODEL without its suffix.",
        ),
    ] = None,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, max=MAX_BATCH, metavar="ROWS", help="Most rows of one run.")
    ] = DEFAULT_MAX_BATCH,
    max_delay_us: Annotated[
        int,
        typer.Option(
            "--max-delay-us",
            min=0,
            max=MAX_DELAY_US,
            metavar="MICROSECONDS",
            help="How long a request waits for others to share a run with.",
        ),
    ] = DEFAULT_MAX_DELAY_US,
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--threads",
            min=1,
            max=1024,
            metavar="NUMBER",
            help="For ONNX files: threads of one run; for kserve and ray also the cores of a replica. Default: "
            "ONNX Runtime's choice, or 1 for kserve and ray.",
        ),
    ] = None,
    repository_path: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--repository-path",
            metavar="DIR",
            help="For triton: where the repository will lie on the server. Default: the server is started inside "
            "it.",
        ),
    ] = None,
    plugin: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--plugin", metavar="FILE", help="For an engine: its plugin library, where not the package's own."
        ),
    ] = None,
    image: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--image", metavar="IMAGE", help="For kserve: the container image's name. Default: NAME:1."
        ),
    ] = None,
    wheel: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--wheel",
            metavar="FILE",
            help="For kserve and ray: lmkan-deploy's wheel, to put into DIR. Default: you fill DIR/wheels.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Write a folder for Triton, KServe or Ray Serve.

    The folder appears complete or not at all; README.md in it says how to start the server.

    Examples:

    A model repository for Triton, with the library of the lookup operator:

        lmkan-deploy package model.onnx -o repository

    For a Triton that has no ONNX Runtime backend but Python:

        lmkan-deploy package model.onnx -f triton-python -o repository

    A TensorRT engine, with the plugin, for a repository that will lie at /models:

        lmkan-deploy package m.engine -o repository --repository-path /models

    An image and manifests for KServe:

        lmkan-deploy package m.onnx -f kserve -o kserve --image r.example/m:1

    A Ray Serve application:

        lmkan-deploy package model.onnx -f ray -o app --max-delay-us 500
    """
    result = package_model(
        model,
        output,
        format=format,  # type: ignore[arg-type]
        name=name,
        max_batch=max_batch,
        max_delay_us=max_delay_us,
        threads=threads,
        repository_path=repository_path,
        plugin=plugin,
        image=image,
        wheel=wheel,
    )
    if as_json:
        typer.echo(json.dumps(result.to_json()))
    elif not quiet:
        typer.echo(
            f"{result.path}: {result.name} for {result.format}, {len(result.files)} files; start it with"
        )
        typer.echo("\n".join(f"  {line}" for line in [shlex.join(["cd", str(result.path)]), *result.start]))
