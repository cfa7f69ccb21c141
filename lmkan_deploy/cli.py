"""The command line. Exit codes: 0 done; 1 the answers differ; 2 a mistake in the input or the call."""

from __future__ import annotations

import contextlib
import json
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lmkan_deploy.errors import InputError, LmkanError, VerificationError
from lmkan_deploy.version import __version__

if TYPE_CHECKING:
    from lmkan_deploy.api import Progress
    from lmkan_deploy.checkpoints import Architecture
    from lmkan_deploy.runtime.tensors import Arrays

app = typer.Typer(
    name="lmkan-deploy",
    help="Run lookup multivariate Kolmogorov-Arnold networks (lmKANs) in production.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_state = {"debug": False}

# --- Options that several commands share -------------------------------------------------------------

Arch = Annotated[
    Optional[str],  # noqa: UP045  typer evaluates annotations on Python 3.10
    typer.Option(
        "--arch",
        metavar="MODULE:FACTORY",
        help="Class or function that builds the network of a state dict. Not needed for an nn.Sequential of "
        "LMKAN2DLayer and BatchNorm1d.",
    ),
]
ArchPath = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--arch-path", metavar="DIR", help="Folder to import MODULE, or a pickle's classes, from."),
]
ArchArgs = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--arch-args", metavar="JSON", help="Arguments of FACTORY: an object or an array."),
]
InputShape = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--input-shape",
        metavar="[NAME:]DIM,DIM,…[:DTYPE]",
        help="Shape of an input, where it can't be inferred; a word names a free axis: batch,4,8,8. Once for "
        "each input.",
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
        help="Allowed error relative to |expected| + its root mean square. Default: 1e-4 for float32, 1e-2 for "
        "float16, 5e-2 for bfloat16.",
    ),
]
Passes = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--passes", metavar="NAME", help="Run only this graph pass. May be repeated. Default: all."),
]
NoPasses = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--no-passes", metavar="NAME", help="Leave out this graph pass, or all. May be repeated."),
]
TableDtypeOption = Annotated[
    str,
    typer.Option(
        "--table-dtype",
        help="Type of the tables in the file: float32, float16 or bfloat16. Narrow ones are half the size; "
        "what their rounding costs is reported, and limited by --rtol.",
    ),
]
ExternalData = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option(
        "--external-data/--single-file",
        help="Put weights into OUTPUT.data, or into the file itself. Default: by size, above 1 GiB.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
RuntimeOption = typer.Option(
    "--runtime",
    help="onnxruntime (compiled operator), onnxruntime-function (the function that the file carries) or "
    "onnx-reference (onnx's evaluator, slow).",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lmkan-deploy {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the release and exit."),
    ] = False,
) -> None:
    """Options before the command."""
    _state["debug"] = debug


# --- Commands ----------------------------------------------------------------------------------------


@app.command()
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="State dict, torch.export archive (.pt2) or pickled module.", show_default=False),
    ],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="ONNX file to write. Default: CHECKPOINT with the suffix .onnx."),
    ] = None,
    arch: Arch = None,
    arch_path: ArchPath = None,
    arch_args: ArchArgs = None,
    input_shape: InputShape = None,
    trust_pickle: TrustPickle = False,
    opset: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--opset", min=18, help="Version of ONNX's standard operators. Default: 20."),
    ] = None,
    passes: Passes = None,
    no_passes: NoPasses = None,
    table_dtype: TableDtypeOption = "float32",
    external_data: ExternalData = None,
    verify_result: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare ONNX Runtime with PyTorch before writing.")
    ] = True,
    inputs: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--inputs", "-i", help="Inputs to compare on, besides random ones: .npz or .npy."),
    ] = None,
    rtol: RelativeTolerance = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Export a trained network to ONNX, verified against PyTorch.

    Each lookup layer becomes one LMKAN2D node; the file also carries the operator as a function of standard
    operators, so it runs in every ONNX runtime. Loading a checkpoint does not run code from it, unless
    --trust-pickle says so.

    **Examples**

    A plain stack of lookup and BatchNorm layers:

        lmkan-deploy export model.pt -o model.onnx

    The state dict of a class in ./models.py:

        lmkan-deploy export model.pt --arch models:MethaneNet --arch-path . --arch-args '{"hidden": 64}'

    A convolutional network, whose input shape can't be inferred:

        lmkan-deploy export cnn.pt --arch models:PatchNet --arch-path . --input-shape batch,4,8,8
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
            external_data=external_data,
            check=verify_result,
            inputs=None if inputs is None else lambda names: _read_arrays(inputs, names),
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
    model: Annotated[Path, typer.Argument(help="ONNX file.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="ONNX file to write; may be MODEL.", show_default=False)
    ],
    passes: Passes = None,
    no_passes: NoPasses = None,
    table_dtype: TableDtypeOption = "float32",
    external_data: ExternalData = None,
    verify_result: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the two models before writing.")
    ] = True,
    rtol: RelativeTolerance = None,
    quiet: Quiet = False,
) -> None:
    """Rewrite a model that was exported earlier into the cheapest equal one.

    Export does this already. The passes, in order: simplify-layout, fold-scale-shift, fold-linear-branch,
    drop-constant-pairs; fold-table-transpose and clean-up always run.

    **Example**

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
            external_data=external_data,
            check=verify_result,
            rtol=rtol,
            progress=progress,
        )
    if not quiet:
        from lmkan_deploy import report

        report.print_optimization(result)


@app.command()
def verify(
    model: Annotated[Path, typer.Argument(help="ONNX file.", show_default=False)],
    checkpoint: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--checkpoint", "-c", help="Compare with the PyTorch network in this file.", show_default=False
        ),
    ] = None,
    arch: Arch = None,
    arch_path: ArchPath = None,
    arch_args: ArchArgs = None,
    input_shape: InputShape = None,
    trust_pickle: TrustPickle = False,
    inputs: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--inputs", "-i", help="Inputs to compare on, besides random ones: .npz or .npy."),
    ] = None,
    outputs: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--outputs", help="Expected outputs for --inputs, instead of a network: .npz or .npy."),
    ] = None,
    runtime: Annotated[Optional[list[str]], RuntimeOption] = None,  # noqa: UP045
    batch: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option("--batch", min=0, help="Size of the free axes of random inputs. Default: 1, 2, 7, 64."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.")] = 0,
    rtol: RelativeTolerance = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare a model's answers with PyTorch, with stored outputs, or between runtimes.

    Exits with 1 when an answer differs by more than the tolerance.

    **Examples**

    Against the network it was exported from:

        lmkan-deploy verify model.onnx --checkpoint model.pt

    Against stored outputs, with three runtimes:

        lmkan-deploy verify model.onnx -i x.npz --outputs y.npz
        --runtime onnxruntime --runtime onnxruntime-function --runtime onnx-reference

    The compiled operator against the function that the file carries, on larger batches:

        lmkan-deploy verify model.onnx --batch 1024 --batch 4096
    """
    from lmkan_deploy import api

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
    model: Annotated[Path, typer.Argument(help="ONNX file.", show_default=False)],
    inputs: Annotated[
        Path,
        typer.Option(
            "--inputs",
            "-i",
            help="Inputs: .npz with an array for each, or .npy for a single one.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Where to write the outputs: .npz, or .npy for a single one."),
    ] = Path("outputs.npz"),
    runtime: Annotated[str, RuntimeOption] = "onnxruntime",
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Threads of the run. Default: the runtime's choice."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run a model on arrays in a file.

    **Examples**

        lmkan-deploy run model.onnx -i x.npz -o y.npz

        lmkan-deploy run model.onnx -i x.npy -o y.npy --threads 1
    """
    from lmkan_deploy.runtime.runner import load_runner

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
    model: Annotated[Path, typer.Argument(help="ONNX file.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Show a model's lookup layers, sizes, cost and origin.

    **Example**

        lmkan-deploy inspect model.onnx
    """
    from lmkan_deploy import api

    info = api.inspect(model)
    if as_json:
        _print_json(info.to_json())
        return
    from lmkan_deploy import report

    report.print_model(info)


# --- Helpers -----------------------------------------------------------------------------------------


def _architecture(arch: str | None, path: Path | None, arguments: str | None) -> Architecture | None:
    if arch is None and path is None and arguments is None:
        return None
    from lmkan_deploy.checkpoints import Architecture

    return Architecture.parse(arch, path, arguments)


def _names(model: Path, side: str) -> list[str]:
    """Names of a model's inputs or outputs."""
    from lmkan_deploy.converters.model_file import load_model

    return [str(value.name) for value in getattr(load_model(model).graph, side)]


def _read_arrays(path: Path, names: list[str]) -> Arrays:
    """Arrays of a file by name; a single array takes the single name."""
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


def _write_arrays(path: Path, arrays: Arrays) -> None:
    """Writes all arrays, or nothing."""
    import os
    import tempfile

    import numpy as np

    if path.suffix == ".npy" and len(arrays) != 1:
        raise InputError(f"expected an .npz file for {len(arrays)} outputs, found {path}")
    # NumPy has no bfloat16; float32 holds the same values.
    plain = {k: a.astype(np.float32) if a.dtype.name == "bfloat16" else a for k, a in arrays.items()}
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            if path.suffix == ".npy":
                np.save(file, next(iter(plain.values())))
            else:
                np.savez(file, **plain)  # type: ignore[arg-type]
        os.replace(file.name, path)
    except OSError as error:
        raise InputError(f"could not write {path}: {error.strerror}") from error


@contextlib.contextmanager
def _progress(hidden: bool) -> Iterator[Progress]:
    """A spinner with the current step, on stderr and only in a terminal."""
    if hidden or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with RichProgress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting")
        yield lambda step: bar.update(task, description=step)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def main() -> None:
    """Entry point: turns errors into one line and an exit code."""
    try:
        app()
    except VerificationError as error:
        _fail(error, 1)
    except LmkanError as error:
        _fail(error, 2)


def _fail(error: LmkanError, code: int) -> None:
    if _state["debug"]:
        raise error
    typer.echo(f"error: {error}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
