"""Reads and writes ONNX files; writing is all or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx.defs
import onnx_ir as ir
from google.protobuf.message import DecodeError, EncodeError

from lmkan_deploy.converters.onnx_function import is_lookup, is_quantized_lookup, operator_schema
from lmkan_deploy.errors import ModelError
from lmkan_deploy.runtime.runner import check_model_file
from lmkan_deploy.staging import output_file, reported, staging_folder

EXTERNAL_DATA_THRESHOLD = 1 << 30
"""Bytes of weights above which they go to a file of their own; one file holds less than 2 GiB."""

_EXTERNAL_TENSOR_BYTES = 1024
"""Smaller tensors stay in the model file even then."""

_SINGLE_FILE_BYTES = (1 << 31) - (1 << 24)
"""Most bytes of weights in one file: protobuf ends at 2 GiB, and graph and functions need some."""

# What protobuf, onnx and onnx-ir raise for files that are no valid models.
_INVALID = (
    DecodeError,
    EncodeError,
    ir.serde.SerdeError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    AssertionError,
)

_HELP = "copy or export it again"


def load_model(path: Path) -> ir.Model:
    """Reads an ONNX file; weights in external data stay on disk until they are used.

    Raises:
        ModelError: The file is missing, empty, or no valid ONNX model, or its external data is missing, too
            short or elsewhere.
    """
    check_model_file(path)
    try:
        model = ir.load(path, format="protobuf")
    except DecodeError as error:
        raise ModelError(
            f"expected an ONNX file, found {path}, which is damaged or of another format; {_HELP}"
        ) from error
    except _INVALID as error:
        raise ModelError(f"expected a valid ONNX model, found {_reason(error)} in {path}; {_HELP}") from error
    if len(model.graph.inputs) + len(model.graph.outputs) == 0:
        raise ModelError(f"expected an ONNX model with inputs and outputs, found none in {path}")
    _check_nodes(path, model)
    _check_tensors(path, model)
    return model


def _reason(error: BaseException) -> str:
    """What the innermost of chained errors says: the outer ones tell where onnx-ir was, in several lines."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()).removesuffix(".") or type(error).__name__


def _roots(model: ir.Model) -> list[ir.Graph | ir.Function]:
    """What `all_nodes` finds all nodes of a model in."""
    return [model.graph, *model.functions.values()]


def _check_nodes(path: Path, model: ir.Model) -> None:
    """Raises ModelError where a node lacks inputs or outputs of its operator: no pass expects that."""
    for root in _roots(model):
        imports = root.opset_imports
        opset = imports.get("", imports.get("ai.onnx", onnx.defs.onnx_opset_version()))
        for node in root.all_nodes():
            if node.domain in ("", "ai.onnx") and onnx.defs.has(node.op_type, opset):
                _check_node(path, node, onnx.defs.get_schema(node.op_type, opset))
            elif is_lookup(node) or is_quantized_lookup(node):
                _check_node(path, node, operator_schema(node.op_type))


def _check_node(path: Path, node: ir.Node, schema: onnx.defs.OpSchema) -> None:
    for kind, values, least, most, formal in (
        ("inputs", node.inputs, schema.min_input, schema.max_input, schema.inputs),
        ("outputs", node.outputs, schema.min_output, schema.max_output, schema.outputs),
    ):
        missing = [
            parameter.name
            for parameter, value in zip(formal, values, strict=False)
            if value is None and parameter.option == onnx.defs.OpSchema.FormalParameterOption.Single
        ]
        if missing or not least <= len(values) <= most:
            names = ", ".join(parameter.name for parameter in formal)
            found = f"no {missing[0]}" if missing else len(values)
            raise ModelError(
                f"expected the {kind} {names} of {_called(node)}, found {found} in {path}; {_HELP}"
            )
    for attribute in node.attributes.values():
        declared = schema.attributes.get(attribute.name)
        wanted = None if declared is None else str(declared.type).rpartition(".")[2]
        if wanted not in (None, attribute.type.name):
            raise ModelError(
                f"expected the attribute {attribute.name} of {_called(node)} to be of type {wanted}, found "
                f"{attribute.type.name} in {path}; {_HELP}"
            )


def _called(node: ir.Node) -> str:
    return f'{node.op_type} node "{node.name}"' if node.name else f"a {node.op_type} node"


def _check_tensors(path: Path, model: ir.Model) -> None:
    """Raises ModelError where tensors lack bytes, or have them elsewhere.

    External data of weights stays where it is; that of constants, branches and functions is loaded, because
    onnx-ir leaves it out when it writes.
    """
    for value in model.graph.initializers.values():
        value.const_value = _checked(path, value.const_value)
    for root in _roots(model):
        for node in root.all_nodes():
            for attribute in list(node.attributes.values()):
                if not attribute.is_ref():
                    _check_attribute(path, node, attribute)


def _check_attribute(path: Path, node: ir.Node, attribute: ir.Attr) -> None:
    kind, found = attribute.type, attribute.value
    if kind in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        for graph in [found] if kind == ir.AttributeType.GRAPH else found:
            for value in graph.initializers.values():
                value.const_value = _in_memory(_checked(path, value.const_value))
    elif kind in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
        tensors = [found] if kind == ir.AttributeType.TENSOR else found
        loaded = [_in_memory(_checked(path, tensor)) for tensor in tensors]
        if any(one is not other for one, other in zip(tensors, loaded, strict=True)):
            value = loaded[0] if kind == ir.AttributeType.TENSOR else loaded
            node.attributes[attribute.name] = ir.Attr(attribute.name, kind, value)


def _in_memory(tensor: Any) -> Any:
    """The same, without a file."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    return ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)


def _checked(path: Path, tensor: Any) -> Any:
    """A tensor whose bytes are there; another one where onnx-ir would not read its file."""
    if isinstance(tensor, ir.ExternalTensor):
        return _checked_external(path, tensor)
    try:
        if tensor is not None:
            tensor.numpy()
            if any(size < 0 for size in tensor.shape.numpy()):
                raise ValueError(f"shape {list(tensor.shape.numpy())}")
    except _INVALID as error:
        raise ModelError(
            f"expected the values of {tensor.name or 'a constant'} in {path}, found {_reason(error)}; {_HELP}"
        ) from error
    return tensor


def _checked_external(path: Path, tensor: ir.ExternalTensor) -> ir.ExternalTensor:
    location = Path(tensor.location)
    if location.is_absolute() or ".." in location.parts:
        raise ModelError(
            f"expected the weights of {path} in its own folder, found {str(location)!r}; a model file may "
            "not read others"
        )
    data = path.parent / location
    if not data.is_file():
        raise ModelError(
            f"expected the weights of {path} in {data}, found no such file; copy it together with the model"
        )
    # Caches of downloads link both files, which then lie side by side elsewhere.
    file = data.resolve()
    if not any(file.is_relative_to(folder) for folder in (path.parent.resolve(), path.resolve().parent)):
        raise ModelError(
            f"expected the weights of {path} in its own folder, found that {data} is a link to {file}; a model "
            "file may not read others: copy that file to its place"
        )
    try:
        start, size, needed = tensor.offset or 0, data.stat().st_size, tensor.nbytes
    except _INVALID as error:
        raise ModelError(
            f"expected the values of {tensor.name} in {path}, found {_reason(error)}; {_HELP}"
        ) from error
    end = start + max(needed, tensor.length or 0)
    if start < 0 or end > size:
        raise ModelError(
            f"expected bytes {start} to {end} of {data} to be {tensor.name}, found {size} bytes; copy the "
            "model and its weights again, or export it again"
        )
    # onnx-ir refuses links, soft and hard, unless it has the whole path.
    return ir.ExternalTensor(
        str(file), tensor.offset, tensor.length, tensor.dtype, shape=ir.Shape(tensor.shape), name=tensor.name
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
        ModelError: The file can't be written, or one file does not hold the weights.
    """
    path = output_file(path)
    if external_data is None:
        external_data = initializer_bytes(model) > EXTERNAL_DATA_THRESHOLD
    if not external_data:
        check_single_file(model)
    data = f"{path.name}.data" if external_data else None
    if data:
        output_file(path.with_name(data))
    else:
        # Otherwise the file would go on referring to where its weights were read from.
        ir.external_data.load_to_model(model)
    with staging_folder(path) as folder:
        file = folder / path.name
        try:
            with reported(path):
                ir.save(
                    model,
                    file,
                    format="protobuf",
                    external_data=data,
                    size_threshold_bytes=_EXTERNAL_TENSOR_BYTES,
                )
        except _INVALID as error:
            raise ModelError(
                f"expected a model that ONNX has a form for, found {_reason(error)}, and {path} is not written; "
                "export the network again"
            ) from error
        yield file


def check_single_file(model: ir.Model) -> None:
    """Raises ModelError where the weights of a model are too many bytes for one file."""
    size = initializer_bytes(model)
    if size > _SINGLE_FILE_BYTES:
        raise ModelError(
            f"expected less than 2 GiB of weights in one file, found {size / (1 << 30):.2f} GiB; leave out "
            "--single-file"
        )


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
    file = path.with_name(data).resolve()
    tensors = (value.const_value for value in model.graph.initializers.values())
    return any(isinstance(tensor, ir.ExternalTensor) and Path(tensor.path) == file for tensor in tensors)


def initializer_bytes(model: ir.Model) -> int:
    """Bytes of all weights, those of branches and loops too."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )
