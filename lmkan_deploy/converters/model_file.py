"""Reads and writes ONNX files; writing is all or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError

from lmkan_deploy.errors import ModelError
from lmkan_deploy.runtime.runner import check_model_file
from lmkan_deploy.staging import output_file, reported, staging_folder

EXTERNAL_DATA_THRESHOLD = 1 << 30
"""Bytes of weights above which they go to a file of their own; one file holds less than 2 GiB."""

_EXTERNAL_TENSOR_BYTES = 1024
"""Smaller tensors stay in the model file even then."""


def load_model(path: Path) -> ir.Model:
    """Reads an ONNX file; weights in external data stay on disk until they are used.

    Raises:
        ModelError: The file is missing, empty, or not ONNX, or its external data is missing, too short or
            elsewhere.
    """
    check_model_file(path)
    try:
        model = ir.load(path)
    except (DecodeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(f"expected an ONNX file, could not read {path}: {error}") from error
    if len(model.graph.inputs) + len(model.graph.outputs) == 0:
        raise ModelError(f"expected an ONNX model with inputs and outputs, found none in {path}")
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            _check_external(path, value.const_value)
    return model


def _check_external(path: Path, tensor: ir.ExternalTensor) -> None:
    """Raises ModelError where a tensor's bytes are not all in a file in the model's folder."""
    location = Path(tensor.location)
    if location.is_absolute() or ".." in location.parts:
        raise ModelError(
            f"expected the weights of {path} in its own folder, found {str(location)!r}; a model file may "
            "not read others"
        )
    data = Path(tensor.path)
    if not data.is_file():
        raise ModelError(
            f"expected the weights of {path} in {data}, found no such file; copy it together with the model"
        )
    start, size = tensor.offset or 0, data.stat().st_size
    end = start + max(tensor.nbytes, tensor.length or 0)
    if start < 0 or end > size:
        raise ModelError(
            f"expected bytes {start} to {end} of {data} to be {tensor.name}, found {size} bytes; copy the "
            "model and its weights again, or export it again"
        )


@contextmanager
def temporary_model(model: ir.Model, path: Path, *, external_data: bool | None = None) -> Iterator[Path]:
    """Writes a model into a folder of its own beside a path, and removes it at the end of the block.

    Args:
        model: Written as it is; it then has its weights in memory, unless they go to a file of their own.
        path: Gives the file its name, and the folder its place: on the same file system. A link stands for
            the file it points to.
        external_data: Whether weights go to `<path>.data`; None decides by `EXTERNAL_DATA_THRESHOLD`.

    Yields:
        The file, complete and loadable.

    Raises:
        ModelError: The file can't be written.
    """
    path = output_file(path)
    if external_data is None:
        external_data = initializer_bytes(model) > EXTERNAL_DATA_THRESHOLD
    data = f"{path.name}.data" if external_data else None
    if data:
        output_file(path.with_name(data))
    else:
        # Otherwise the file would go on referring to where its weights were read from.
        ir.external_data.load_to_model(model)
    with staging_folder(path) as folder:
        file = folder / path.name
        with reported(path):
            ir.save(model, file, external_data=data, size_threshold_bytes=_EXTERNAL_TENSOR_BYTES)
        yield file


@contextmanager
def staged_model(model: ir.Model, path: Path, *, external_data: bool | None = None) -> Iterator[Path]:
    """Like `temporary_model`, and moves the model to `path` when the block ends without an error."""
    path = output_file(path)
    with temporary_model(model, path, external_data=external_data) as staged:
        yield staged
        with reported(path):
            _replace(path, staged.parent)


def _replace(path: Path, folder: Path) -> None:
    """Moves a model and its weights out of a folder."""
    data = path.with_name(f"{path.name}.data")
    has_data = (folder / data.name).exists()
    had_data = not has_data and _refers_to(path, data.name)
    # The weights first: a model file never refers to data that is not there.
    if has_data:
        (folder / data.name).replace(data)
    (folder / path.name).replace(path)
    if had_data:
        data.unlink(missing_ok=True)


def _refers_to(path: Path, data: str) -> bool:
    """Whether a file is a model whose weights are in the file `data`; another file of that name is not ours."""
    try:
        model = load_model(path)
    except ModelError:
        return False
    tensors = (value.const_value for value in model.graph.initializers.values())
    return any(isinstance(tensor, ir.ExternalTensor) and str(tensor.location) == data for tensor in tensors)


def initializer_bytes(model: ir.Model) -> int:
    """Bytes of all weights of the main graph."""
    return sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
