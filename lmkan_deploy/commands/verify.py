"""`lmkan-deploy verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lmkan_deploy.commands.arrays import read_arrays, tensor_names
from lmkan_deploy.commands.completion import runtimes
from lmkan_deploy.commands.options import (
    MAX_SIZE,
    RUNTIMES,
    Arch,
    ArchArgs,
    ArchPath,
    AsJson,
    CudaGraphs,
    Device,
    InputsFile,
    InputShape,
    Key,
    Plugin,
    Quiet,
    RelativeTolerance,
    Seed,
    TrustPickle,
    architecture,
)
from lmkan_deploy.commands.terminal import print_json, show_progress
from lmkan_deploy.errors import InputError


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
    key: Key = None,
    inputs: InputsFile = None,
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
            help=f"What to compare: {RUNTIMES} May be repeated. Default: the first two.",
            autocompletion=runtimes,
        ),
    ] = None,
    device: Device = 0,
    plugin: Plugin = None,
    cuda_graphs: CudaGraphs = False,
    batch: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(
            "--batch",
            min=0,
            max=MAX_SIZE,
            metavar="NUMBER",
            help="Size of the free axes of the random inputs. May be repeated: differently named axes then "
            "differ. Default: 1, 2, 7, 64.",
        ),
    ] = None,
    seed: Seed = 0,
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
    if checkpoint is None and (arch or arch_path or arch_args or input_shape or trust_pickle or key):
        raise InputError(
            "expected a --checkpoint with the options that say how to load it, found none; pass -c"
        )
    feeds = None if inputs is None else read_arrays(inputs, tensor_names(model, "inputs"))
    expected = None if outputs is None else read_arrays(outputs, tensor_names(model, "outputs"))
    with show_progress(quiet or as_json) as progress:
        result = api.verify(
            model,
            checkpoint=checkpoint,
            architecture=architecture(arch, arch_path, arch_args),
            input_shapes=input_shape or [],
            trust_pickle=trust_pickle,
            key=key,
            inputs=feeds,
            outputs=expected,
            reference_model=reference,
            runtimes=runtime or ("onnxruntime", "onnxruntime-function"),  # type: ignore[arg-type]
            device=device,
            plugin=plugin,
            cuda_graphs=cuda_graphs,
            batch_sizes=batch,
            seed=seed,
            rtol=rtol,
            progress=progress,
        )
    if as_json:
        print_json(result.to_json())
    elif not quiet:
        from lmkan_deploy import report

        report.print_verification(result, None if result.passed else _narrow_types(model))
    if not result.passed:
        raise typer.Exit(1)


def _narrow_types(model: Path) -> str | None:
    """Types of a model's tables that round, as words."""
    if model.suffix == ".engine":
        return None
    from lmkan_deploy import api

    found = dict.fromkeys(layer.table_dtype for layer in api.inspect(model).layers)
    return " and ".join(name for name in found if name != "float32") or None
