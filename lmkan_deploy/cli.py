"""The command line. Exit codes: 0 done; 1 the answers differ; 2 a mistake in the input or the call; 130 or 143
interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer

from lmkan_deploy.errors import InputError, LmkanError, VerificationError
from lmkan_deploy.packaging.command import package
from lmkan_deploy.serving.command import serve
from lmkan_deploy.version import __version__

if TYPE_CHECKING:
    from lmkan_deploy.api import Feeds, Progress
    from lmkan_deploy.checkpoints import Architecture
    from lmkan_deploy.runtime.tensors import Arrays

app = typer.Typer(
    name="lmkan-deploy",
    help="Run lookup multivariate Kolmogorov-Arnold networks (lmKANs) in production.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_UsageError: Any = typer.BadParameter.__base__
"""What typer raises for a wrong call; its public name depends on typer's release."""

_state = {"debug": False}

_MAX_INT32 = 2**31 - 1

# --- Options that several commands share -------------------------------------------------------------

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
        "size. Once for each input.",
    ),
]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle",
        help="Load a file that can run code, such as a pickled module. Only for files you made or trust.",
    ),
]
RelativeTolerance = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        "--rtol",
        min=0.0,
        metavar="NUMBER",
        help="Allowed error of an output's element, relative to its size plus the root mean square of the "
        "output. Default: 1e-4 for float32, 1e-2 for float16, 5e-2 for bfloat16.",
    ),
]
Passes = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--passes", metavar="NAME", help="Run this graph pass and no others. May be repeated. Default: all."
    ),
]
NoPasses = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--no-passes", metavar="NAME", help="Leave out this graph pass, or 'all' of them. May be repeated."
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
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON; NaN and infinite numbers are strings.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
_RUNTIMES = (
    "onnxruntime (compiled operators), onnxruntime-function (the functions that the file carries), "
    "onnxruntime-cuda (compiled operators on the GPU) or onnx-reference (onnx's own evaluator; slow)."
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lmkan-deploy {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show an error's traceback and PyTorch's messages.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the release and exit."),
    ] = False,
) -> None:
    """Options before the command."""
    _state["debug"] = debug
    if debug:
        logging.getLogger("lmkan_deploy").setLevel(logging.DEBUG)


# --- Commands ----------------------------------------------------------------------------------------


@app.command()
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
            help="ONNX file to write. Default: CHECKPOINT with the suffix .onnx.",
        ),
    ] = None,
    arch: Arch = None,
    arch_path: ArchPath = None,
    arch_args: ArchArgs = None,
    input_shape: InputShape = None,
    trust_pickle: TrustPickle = False,
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
    inputs: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--inputs", "-i", metavar="FILE", help="Inputs to compare on, besides random ones: .npz or .npy."
        ),
    ] = None,
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

    with _progress(quiet or as_json) as progress:
        result = api.export(
            checkpoint,
            output,
            architecture=_architecture(arch, arch_path, arch_args),
            input_shapes=input_shape or [],
            trust_pickle=trust_pickle,
            opset=opset,
            passes=passes,
            without_passes=no_passes or [],
            table_dtype=table_dtype,  # type: ignore[arg-type]
            calibration=_feeds(calibration),
            max_error=max_error,
            external_data=external_data,
            check=verify_result,
            inputs=_feeds(inputs),
            rtol=rtol,
            progress=progress,
        )
    if as_json:
        checked = None if result.verification is None else result.verification.to_json()
        _print_json(
            {
                "path": str(result.path),
                "kind": result.kind,
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


@app.command()
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

    The passes rewrite it into a cheaper one that computes the same; export runs them already. In their order:
    simplify-layout, fold-scale-shift, fold-linear-branch, drop-constant-pairs; fold-table-transpose and
    clean-up always run.

    Example:

        lmkan-deploy optimize model.onnx -o smaller.onnx
    """
    from lmkan_deploy import api

    with _progress(quiet) as progress:
        result = api.optimize(
            model,
            output,
            passes=passes,
            without_passes=no_passes or [],
            table_dtype=table_dtype,  # type: ignore[arg-type]
            calibration=_feeds(calibration),
            max_error=max_error,
            external_data=external_data,
            check=verify_result,
            rtol=rtol,
            progress=progress,
        )
    if not quiet:
        from lmkan_deploy import report

        report.print_optimization(result)


@app.command()
def build(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX file.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUTPUT",
            help="Engine to write; its manifest is OUTPUT.json.",
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
        ),
    ] = "tensorrt",
    shapes: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--shapes",
            metavar="NAME:MIN,OPT,MAX",
            help="Smallest, typical and largest shape of an input, such as x:1x12,64x12,1024x12. Once for each "
            "input. Default: 1, 64 and 1024 for free axes.",
        ),
    ] = None,
    timing_cache: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--timing-cache", metavar="FILE", help="Measured kernel timings, kept from build to build."
        ),
    ] = None,
    plugin: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--plugin", metavar="FILE", help="Plugin library, where not the package's own."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Build a TensorRT engine from an exported model.

    Types are those of the model. The engine fits the release of TensorRT and the GPU that it was built with;
    its manifest says which.

    Examples:

        lmkan-deploy build m.onnx -o m.engine --shapes x:1x12,64x12,4096x12

        lmkan-deploy build m.onnx -o m.engine --runtime tensorrt-rtx
    """
    from lmkan_deploy.engines.build import build_engine

    with _progress(quiet or as_json) as progress:
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
        _print_json(manifest.to_json())
    elif not quiet:
        from lmkan_deploy import report

        report.print_engine(output, manifest)


@app.command()
def verify(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX file or engine.", show_default=False)],
    checkpoint: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--checkpoint",
            "-c",
            metavar="CHECKPOINT",
            help="Compare with the PyTorch network in this file.",
            show_default=False,
        ),
    ] = None,
    arch: Arch = None,
    arch_path: ArchPath = None,
    arch_args: ArchArgs = None,
    input_shape: InputShape = None,
    trust_pickle: TrustPickle = False,
    inputs: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--inputs", "-i", metavar="FILE", help="Inputs to compare on, besides random ones: .npz or .npy."
        ),
    ] = None,
    outputs: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--outputs",
            metavar="FILE",
            help="Expected outputs for --inputs, instead of a network: .npz or .npy.",
        ),
    ] = None,
    reference: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="Compare with another ONNX file, such as the one with float32 tables; also shows what each "
            "layer's narrow table costs.",
        ),
    ] = None,
    runtime: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--runtime",
            metavar="NAME",
            help=f"What to compare: {_RUNTIMES} May be repeated. Default: the first two.",
        ),
    ] = None,
    batch: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(
            "--batch",
            min=0,
            max=_MAX_INT32,
            metavar="NUMBER",
            help="Size of the free axes of the random inputs. May be repeated: differently named axes then "
            "differ. Default: 1, 2, 7, 64.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="NUMBER", help="Seed of the random inputs.")] = 0,
    rtol: RelativeTolerance = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare a model's outputs with a reference.

    The reference is the PyTorch network of --checkpoint, the model of --reference, the stored --outputs, or
    else the function that the model carries. The exit code is 1 when an output differs by more than the
    tolerance.

    Examples:

    Against the network it was exported from:

        lmkan-deploy verify model.onnx --checkpoint model.pt

    Against stored outputs:

        lmkan-deploy verify model.onnx -i x.npz --outputs y.npz

    What narrow tables cost on real inputs, layer by layer:

        lmkan-deploy verify int8.onnx --reference model.onnx -i x.npz --rtol 0.1

    The compiled operator against the function that the file carries, on large batches:

        lmkan-deploy verify model.onnx --batch 1024 --batch 4096
    """
    from lmkan_deploy import api

    if sum(option is not None for option in (outputs, checkpoint, reference)) > 1 or (outputs and batch):
        raise InputError(
            "expected one of --checkpoint, --reference and --outputs, and --outputs without --batch, found more"
        )
    if checkpoint is None and (arch or arch_path or arch_args or input_shape or trust_pickle):
        raise InputError(
            "expected a --checkpoint with the options that say how to load it, found none; pass -c"
        )
    feeds = None if inputs is None else _read_arrays(inputs, _names(model, "inputs"))
    expected = None if outputs is None else _read_arrays(outputs, _names(model, "outputs"))
    with _progress(quiet or as_json) as progress:
        result = api.verify(
            model,
            checkpoint=checkpoint,
            architecture=_architecture(arch, arch_path, arch_args),
            input_shapes=input_shape or [],
            trust_pickle=trust_pickle,
            inputs=feeds,
            outputs=expected,
            reference_model=reference,
            runtimes=runtime or ("onnxruntime", "onnxruntime-function"),  # type: ignore[arg-type]
            batch_sizes=batch,
            seed=seed,
            rtol=rtol,
            progress=progress,
        )
    if as_json:
        _print_json(result.to_json())
    elif not quiet:
        from lmkan_deploy import report

        report.print_verification(result)
    if not result.passed:
        raise typer.Exit(1)


@app.command()
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
            help="Where to write the outputs: .npz, or .npy for a single one.",
        ),
    ] = Path("outputs.npz"),
    runtime: Annotated[
        str, typer.Option("--runtime", metavar="NAME", help=f"What to run it with: {_RUNTIMES}")
    ] = "onnxruntime",
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=1, max=1024, metavar="NUMBER", help="Threads of the run. Default: ONNX Runtime's choice."
        ),
    ] = None,
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
    with _progress(quiet) as progress:
        progress("loading")
        runner = load_runner(model, runtime, threads=threads)  # type: ignore[arg-type]
        feeds = _read_arrays(inputs, [spec.name for spec in runner.inputs])
        progress("running")
        results = runner.run(feeds)
        _write_arrays(output, results)
    if not quiet:
        shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in results.items())
        typer.echo(f"{output}: {shapes}")


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX file.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Show a model's lookup layers, sizes, cost and origin.

    Example:

        lmkan-deploy inspect model.onnx
    """
    from lmkan_deploy import api

    info = api.inspect(model)
    if as_json:
        _print_json(info.to_json())
        return
    from lmkan_deploy import report

    report.print_model(info)


app.command()(serve)
app.command()(package)


plugins = typer.Typer(
    name="plugins",
    help="Show and build native libraries.",
    rich_markup_mode=None,
)
app.add_typer(plugins)


@plugins.command("path")
def plugins_path(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="onnxruntime, onnxruntime-cuda or tensorrt; cpu or cuda for the kernels' C interfaces.",
        ),
    ] = "onnxruntime",
) -> None:
    """Print the path of a library.

    C++ programs, trtexec and Triton load it from there.

    Example:

        trtexec --onnx=m.onnx --dynamicPlugins=$(lmkan-deploy plugins path tensorrt)
    """
    from lmkan_deploy.runtime.libraries import get_library_path

    typer.echo(get_library_path(name))


@plugins.command("build")
def plugins_build(
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
            "--output", "-o", metavar="OUTPUT", help="Library to write. Default: a file in the user's cache."
        ),
    ] = None,
) -> None:
    """Compile the plugin for your TensorRT.

    Prints the path of the library. Takes a C++ compiler, not CUDA's: the kernels come compiled.

    Example:

        lmkan-deploy plugins build --tensorrt-include /opt/tensorrt/include
    """
    from lmkan_deploy.runtime.tensorrt_plugin import build_tensorrt_plugin

    with _progress(hidden=False) as progress:
        progress("compiling")
        path = build_tensorrt_plugin(tensorrt_include, output)
    typer.echo(path)


# --- Helpers -----------------------------------------------------------------------------------------


def _architecture(arch: str | None, path: Path | None, arguments: str | None) -> Architecture | None:
    if arch is None and path is None and arguments is None:
        return None
    if arch is None and arguments is not None:
        raise InputError("expected --arch with --arch-args, found none; pass the class or function to call")
    from lmkan_deploy.checkpoints import Architecture

    return Architecture.parse(arch, path, arguments)


def _names(model: Path, side: str) -> list[str]:
    """Names of a model's inputs or outputs."""
    if model.suffix == ".engine":
        from lmkan_deploy.runtime.runner import load_runner

        return [spec.name for spec in getattr(load_runner(model), side)]
    from lmkan_deploy.converters.model_file import load_model

    return [str(value.name) for value in getattr(load_model(model).graph, side)]


def _read_arrays(path: Path, names: list[str]) -> Arrays:
    """Arrays of a file by name; a single array takes the single name."""
    import zipfile
    import zlib

    import numpy as np

    try:
        content = np.load(path, allow_pickle=False)
        arrays = {key: content[key] for key in content.files} if hasattr(content, "files") else {"": content}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"expected a .npz or .npy file of arrays, could not read {path}: {error}") from error
    if len(arrays) == 1 and len(names) == 1:
        return {names[0]: next(iter(arrays.values()))}
    # A file may hold more than the model needs, such as inputs and expected outputs together.
    missing = [name for name in names if name not in arrays]
    if missing:
        raise InputError(f"expected arrays {', '.join(names)} in {path}, found {', '.join(arrays) or 'none'}")
    return {name: arrays[name] for name in names}


def _feeds(path: Path | None) -> Feeds | None:
    return None if path is None else lambda names: _read_arrays(path, names)


def _write_arrays(path: Path, arrays: Arrays) -> None:
    """Writes all arrays, or nothing."""
    import numpy as np

    from lmkan_deploy.staging import output_file, reported, staging_folder

    if path.suffix == ".npy" and len(arrays) != 1:
        raise InputError(f"expected an .npz file for {len(arrays)} outputs, found {path}")
    # NumPy has no bfloat16; float32 holds the same values.
    plain = {k: a.astype(np.float32) if a.dtype.name == "bfloat16" else a for k, a in arrays.items()}
    target = output_file(path)
    with staging_folder(target) as folder, reported(path):
        with (folder / target.name).open("wb") as file:
            if path.suffix == ".npy":
                np.save(file, next(iter(plain.values())))
            else:
                np.savez(file, **plain)  # type: ignore[arg-type]
        (folder / target.name).replace(target)


@contextlib.contextmanager
def _progress(hidden: bool) -> Iterator[Progress]:
    """A spinner with the current step, on stderr and only in a terminal. What the user's network prints goes
    there too: stdout holds the result alone.
    """
    if hidden or not sys.stderr.isatty():
        with contextlib.redirect_stdout(sys.stderr):
            yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    # The stream itself, since PyTorch's part of the work runs with another sys.stderr.
    console = Console(file=sys.stderr)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with (
        contextlib.redirect_stdout(sys.stderr),
        RichProgress(*columns, console=console, transient=True) as bar,
    ):
        task = bar.add_task("starting")
        yield lambda step: bar.update(task, description=step)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(_without_nan(value), indent=2, allow_nan=False))


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinities: they become strings, as in protobuf's JSON."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    return value


def main() -> None:
    """Entry point: turns errors into one line and an exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that staged files are removed
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="lmkan-deploy", standalone_mode=False))
    except VerificationError as error:
        _fail(error, str(error), 1)
    except LmkanError as error:
        _fail(error, str(error), 2)
    except _UsageError as error:
        command = "lmkan-deploy" if error.ctx is None else error.ctx.command_path
        _fail(error, f"{error.format_message().rstrip('.')}; see {command} --help", 2)
    except MemoryError as error:
        _fail(error, f"expected more memory, found too little: {error}", 2)
    except OSError as error:
        _fail(error, f"{error.filename or 'system error'}: {error.strerror}", 2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)


def _fail(error: Exception, message: str, code: int) -> NoReturn:
    if _state["debug"]:
        raise error
    typer.echo(f"error: {' '.join(line.strip() for line in message.splitlines())}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
