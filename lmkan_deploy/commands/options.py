"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lmkan_deploy.commands import completion
from lmkan_deploy.errors import InputError

if TYPE_CHECKING:
    from lmkan_deploy.checkpoints import Architecture

Arch = Annotated[
    Optional[str],  # noqa: UP045  typer evaluates annotations on Python 3.10
    typer.Option(
        "--arch",
        metavar="MODULE:FACTORY",
        help="Class or function that builds the network of a state dict. Not needed for an nn.Sequential of "
        "LMKAN2DLayer and BatchNorm1d layers.",
    ),
]
ArchPath = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--arch-path", metavar="DIR", help="Folder to import MODULE or a pickle's classes from."),
]
ArchArgs = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--arch-args",
        metavar="JSON",
        help="Arguments of FACTORY: an object, such as '{\"hidden\": 64}', or an array.",
    ),
]
InputShape = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--input-shape",
        metavar="[NAME:]DIM,...[:DTYPE]",
        help="Shape of an input, where it can't be inferred, such as batch,4,8,8; a word names an axis of any "
        "size that the network takes. Once for each input.",
    ),
]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle",
        help="Load a file that can run code, such as a pickled module. Only for files you made or trust.",
    ),
]
Key = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--key",
        metavar="NAME",
        help="Network to export where CHECKPOINT holds several: its key, such as ema or state.ema.",
    ),
]
RelativeTolerance = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        "--rtol",
        min=0.0,
        metavar="NUMBER",
        help="Allowed error of an output's element, relative to its size plus the root mean square of the "
        "output. Default: 1e-4 for float32 (1e-3 on random inputs), 1e-2 for float16, 5e-2 for bfloat16.",
    ),
]
Passes = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--passes",
        metavar="NAME",
        help="Run this graph pass, those that every model needs, and no others. May be repeated. Default: all; "
        "optimize --help lists them.",
        autocompletion=completion.passes,
    ),
]
NoPasses = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--no-passes",
        metavar="NAME",
        help="Leave out this graph pass, or 'all' but those that every model needs. May be repeated.",
        autocompletion=completion.optional_passes,
    ),
]
TableDtypeOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--table-dtype",
        metavar="DTYPE",
        help="Type of the tables in the file: float32, float16, bfloat16 or int8. Narrow ones take a half or a "
        "quarter; what their rounding costs is reported, and limited only where --rtol is given. Default: "
        "float32.",
        autocompletion=completion.table_dtypes,
    ),
]
CalibrationFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="Real inputs, .npz or .npy: the scales of int8 tables are chosen by the error on them, and what "
        "narrow tables cost is measured on them.",
    ),
]
MaxError = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        "--max-error",
        metavar="NUMBER",
        help="Give each layer the smallest table type that keeps the whole model within this relative error on "
        "the --calibration inputs.",
    ),
]
ExternalData = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option(
        "--external-data/--single-file",
        help="Put the weights into OUTPUT.data, or into OUTPUT itself. Default: a file of their own above 1 GiB.",
        show_default=False,
    ),
]
InputsFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--inputs", "-i", metavar="FILE", help="Inputs to compare on, besides random ones: .npz or .npy."
    ),
]
Device = Annotated[
    int,
    typer.Option(
        "--device", min=0, metavar="NUMBER", help="Number of the GPU, for engines and for onnxruntime-cuda."
    ),
]
Threads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--threads",
        min=1,
        max=1024,
        metavar="NUMBER",
        help="Threads of a call. Default: ONNX Runtime's choice.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="NUMBER", help="Seed of the random inputs.")]
Plugin = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--plugin",
        metavar="FILE",
        help="TensorRT plugin library for engines. Default: what plugins build has made for this TensorRT, or "
        "the package's own.",
        show_default=False,
    ),
]
CudaGraphs = Annotated[
    bool,
    typer.Option(
        "--cuda-graphs",
        help="Run engines with a CUDA graph for each shape of the inputs. Saves the launches of many small "
        "kernels; the first run of a shape takes longer.",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON; NaN and infinite numbers are strings.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
MAX_SIZE = 2**31 - 1  # of an axis
RUNTIMES = (
    "onnxruntime (compiled operators), onnxruntime-function (the functions that the file carries), "
    "onnxruntime-cuda (compiled operators on the GPU) or onnx-reference (onnx's own evaluator; slow)."
)


def file_to_write(text: str | Path) -> Path:
    """An --output that is a file. Path alone drops a slash at the end, by which people name folders.

    Raises:
        InputError: It is named like a folder.
    """
    if str(text).endswith("/"):
        raise InputError(f"expected a file to write, found the folder {text}; name a file in it")
    return Path(text)


def check_pass_options(without: list[str]) -> None:
    """Refuses to leave out what runs always.

    Raises:
        InputError: A pass can't be left out.
    """
    from lmkan_deploy.converters.passes import select_passes

    for item in select_passes(without=["all"]):
        if item.name in without:
            raise InputError(
                f"expected a pass that can be left out with --no-passes, found {item.name}, which every model "
                "needs; optimize --help lists them"
            )


def architecture(arch: str | None, path: Path | None, arguments: str | None) -> Architecture | None:
    """What --arch, --arch-path and --arch-args say; None where they are not given.

    Raises:
        InputError: They contradict each other.
    """
    if arch is None and path is None and arguments is None:
        return None
    if arch is None and arguments is not None:
        raise InputError("expected --arch with --arch-args, found none; pass the class or function to call")
    from lmkan_deploy.checkpoints import Architecture

    return Architecture.parse(arch, path, arguments)
