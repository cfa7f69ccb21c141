"""One interface over every way to run a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from numpy.typing import NDArray

from lmkan_deploy.errors import ModelError
from lmkan_deploy.runtime.tensors import Arrays, TensorSpec

RuntimeName = Literal["onnxruntime", "onnxruntime-function", "onnxruntime-cuda", "onnx-reference"]
"""``onnxruntime``: compiled operators; ``onnxruntime-function``: the function that the file carries, as in a
process without the library; ``onnxruntime-cuda``: compiled operators on the GPU; ``onnx-reference``: onnx's
evaluator in NumPy (slow)."""


class Runner(Protocol):
    """A loaded model. Safe to call from several threads."""

    @property
    def name(self) -> str:
        """What runs, for reports."""
        ...

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """Expected inputs, in the model's order."""
        ...

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """Outputs, in the model's order."""
        ...

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Runs the model once.

        Args:
            feeds: Every input by name.

        Returns:
            Every output by name.

        Raises:
            InputError: The arrays don't fit the inputs.
        """
        ...


def check_model_file(path: Path) -> None:
    """Refuses what is no ONNX file at a glance.

    Raises:
        ModelError: The file is missing or empty, or a PyTorch checkpoint.
    """
    if not path.is_file():
        raise ModelError(f"expected an ONNX file, found no file {path}")
    with path.open("rb") as file:
        head = file.read(4)
    if not head:
        raise ModelError(f"expected an ONNX file, found the empty file {path}")
    # A zip archive, or a pickle; an ONNX file begins with the number of its first field.
    if head == b"PK\x03\x04" or head[:1] == b"\x80":
        raise ModelError(
            f"expected an ONNX file, found {path}, which looks like a PyTorch checkpoint; run lmkan-deploy "
            f"export {path} first"
        )


def load_runner(
    model: str | Path,
    runtime: RuntimeName = "onnxruntime",
    *,
    threads: int | None = None,
    device: int = 0,
    plugin: str | Path | None = None,
    cuda_graphs: bool = False,
    pad_batches: bool = False,
) -> Runner:
    """Loads a model file.

    Args:
        model: An ONNX file, or a TensorRT engine (.engine) beside its manifest.
        runtime: What to run an ONNX file with; see `RuntimeName`. An engine has one of its own.
        threads: Threads of one call on the CPU; None leaves the choice to the runtime.
        device: Number of the GPU for an engine, or for onnxruntime-cuda.
        plugin: TensorRT plugin library for an engine; by default the one for the installed TensorRT.
        cuda_graphs: Whether an engine runs with a CUDA graph for each shape.
        pad_batches: Whether an engine pads batches to a few sizes, so that there are few shapes.

    Raises:
        EngineError: The engine does not fit this machine.
        ModelError: The file can't be read, or the runtime refuses it.
        LibraryError: The native library is missing or of another release.
    """
    path = Path(model)
    if path.suffix == ".engine":
        from lmkan_deploy.engines.runner import EngineRunner

        return EngineRunner(
            path, plugin=plugin, device=device, cuda_graphs=cuda_graphs, pad_batches=pad_batches
        )
    options = {"a plugin": plugin is not None, "CUDA graphs": cuda_graphs, "padded batches": pad_batches}
    for what in (name for name, given in options.items() if given):
        raise ModelError(f"expected an engine with {what}, found {path}; leave {what} out")
    if device != 0 and runtime != "onnxruntime-cuda":
        raise ModelError(
            f"expected an engine or the runtime onnxruntime-cuda with GPU {device}, found {path} and {runtime}; "
            "leave the device out"
        )
    if runtime not in get_args(RuntimeName):
        raise ModelError(f"expected a runtime of {', '.join(get_args(RuntimeName))}, found {runtime!r}")
    check_model_file(path)
    if runtime == "onnx-reference":
        from lmkan_deploy.runtime.onnx_reference import OnnxReferenceRunner

        return OnnxReferenceRunner(path)
    from lmkan_deploy.runtime.onnxruntime import OnnxRuntimeRunner

    return OnnxRuntimeRunner(
        path,
        custom_ops=runtime != "onnxruntime-function",
        threads=threads,
        cuda=runtime == "onnxruntime-cuda",
        device=device,
    )
