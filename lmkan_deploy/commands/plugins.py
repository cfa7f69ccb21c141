"""`lmkan-deploy plugins path` and `lmkan-deploy plugins build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lmkan_deploy.commands.completion import libraries
from lmkan_deploy.commands.help import Command, Group
from lmkan_deploy.commands.options import file_to_write
from lmkan_deploy.commands.terminal import show_progress
from lmkan_deploy.progress import Step

plugins = typer.Typer(
    name="plugins",
    help="Show and build native libraries.",
    cls=Group,
    rich_markup_mode=None,
)


@plugins.command("path", cls=Command)
def path(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="onnxruntime, onnxruntime-cuda or tensorrt; cpu or cuda for the kernels' C interfaces.",
            autocompletion=libraries,
        ),
    ] = "onnxruntime",
    tensorrt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--tensorrt",
            metavar="VERSION",
            help="Release of TensorRT that will load the plugin, such as 10.14.1. Default: the only one that "
            "there is a plugin for.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print the path of a library.

    C++ programs, trtexec and Triton load it from there. A plugin that lmkan-deploy plugins build has made comes
    before the package's own.

    Example:

        plugin=$(lmkan-deploy plugins path tensorrt)
        trtexec --onnx=m.onnx --dynamicPlugins=$plugin
    """
    from lmkan_deploy.errors import LibraryError
    from lmkan_deploy.runtime.libraries import get_library_path
    from lmkan_deploy.runtime.tensorrt_plugin import find_tensorrt_plugin

    if name == "tensorrt":
        typer.echo(find_tensorrt_plugin(tensorrt))
        return
    if tensorrt is not None:
        raise LibraryError(f"expected --tensorrt with the library tensorrt, found {name}; leave it out")
    typer.echo(get_library_path(name))


@plugins.command("build", cls=Command)
def build(
    tensorrt_include: Annotated[
        Path,
        typer.Option(
            "--tensorrt-include",
            metavar="DIR",
            help="Folder of TensorRT's headers, which has NvInferRuntime.h.",
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
            help="Library to write. Default: a file in the user's cache.",
        ),
    ] = None,
) -> None:
    """Compile the plugin for your TensorRT.

    Prints the path of the library. Takes a C++ compiler, not CUDA's: the kernels come compiled.

    Example:

        lmkan-deploy plugins build --tensorrt-include /opt/tensorrt/include
    """
    from lmkan_deploy.runtime.tensorrt_plugin import build_tensorrt_plugin

    with show_progress(hidden=False) as progress:
        progress(Step("compiling"))
        library = build_tensorrt_plugin(tensorrt_include, output)
    typer.echo(library)
