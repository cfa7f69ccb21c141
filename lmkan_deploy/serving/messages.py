"""Inference requests and responses apart from how they travel."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmkan_deploy.runtime.tensors import Arrays, TensorSpec, numpy_dtype
from lmkan_deploy.serving.errors import BadRequestError

DATATYPES = {
    "FP16": "float16",
    "BF16": "bfloat16",
    "FP32": "float32",
    "FP64": "float64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""The protocol's names of element types, and this package's."""

PROTOCOL_NAMES = {name: datatype for datatype, name in DATATYPES.items()}


@dataclass(slots=True)
class InferRequest:
    """What a client asks of a model.

    Attributes:
        id: The client's own; given back with the answer.
        inputs: Every input by name.
        outputs: Name of each wanted output -> whether it travels as bytes; empty for all.
        binary: Whether outputs travel as bytes where `outputs` does not say.
        timeout: Seconds that the client waits; None where it does not say.
    """

    id: str
    inputs: Arrays
    outputs: Mapping[str, bool] = field(default_factory=dict)
    binary: bool = False
    timeout: float | None = None


@functools.cache
def protocol_name(dtype: np.dtype[Any]) -> str:
    """The protocol's name of an element type; NumPy takes a microsecond to name its own."""
    return PROTOCOL_NAMES[dtype.name]


def select_outputs(arrays: Arrays, wanted: Sequence[str] | Mapping[str, Any]) -> Arrays:
    """The outputs that were asked for.

    Raises:
        BadRequestError: There is no such output.
    """
    if not wanted:
        return arrays
    for name in wanted:
        if name not in arrays:
            raise BadRequestError(f"expected an output of {', '.join(arrays)}, found {name[:150]!r}")
    return {name: arrays[name] for name in wanted}


def dtype_of(datatype: object, name: str) -> np.dtype[Any]:
    """NumPy's type for the protocol's name of one.

    Raises:
        BadRequestError: There is no such type.
    """
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise BadRequestError(
            f"expected a datatype of {', '.join(DATATYPES)} for input {name}, found {str(datatype)[:50]!r}"
        )
    return numpy_dtype(DATATYPES[datatype])


def check_shape(shape: object, name: str) -> tuple[int, ...]:
    """A tensor's shape.

    Raises:
        BadRequestError: It is no list of sizes.
    """
    if isinstance(shape, list):
        for size in shape:
            if type(size) is not int or not 0 <= size < 2**40:
                break
        else:
            return tuple(shape)
    raise BadRequestError(f"expected a list of sizes as the shape of input {name}, found {str(shape)[:80]}")


def from_bytes(
    data: memoryview | bytes, dtype: np.dtype[Any], shape: tuple[int, ...], name: str
) -> NDArray[Any]:
    """A tensor from its elements in memory order, little-endian; the memory is shared.

    Raises:
        BadRequestError: The sizes contradict each other.
    """
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise BadRequestError(
            f"expected {expected} bytes for input {name} of shape {list(shape)}, found {len(data)}"
        )
    array = _shaped(np.frombuffer(data, dtype), shape, name)
    if dtype == np.bool_:  # any other byte would be neither true nor false
        return array.view(np.uint8) != 0
    return array


_KINDS = {"f": "fiu", "V": "fiu", "i": "iu", "u": "iu", "b": "b"}
"""Kind of a type -> kinds of numbers that it takes, in NumPy's letters."""


def from_values(values: object, dtype: np.dtype[Any], shape: tuple[int, ...], name: str) -> NDArray[Any]:
    """A tensor from numbers in row-major order, in one list or nested ones.

    Raises:
        BadRequestError: They are no numbers of this type, or their count contradicts the shape.
    """
    kinds = _KINDS[dtype.kind]
    try:
        array = np.asarray(values)
        # An empty list says nothing of its type.
        if array.size and array.dtype.kind not in kinds:
            raise ValueError(f"elements of type {array.dtype}")
        result = array.astype(dtype, copy=False)
        if dtype.kind in "iu" and not np.array_equal(result, array):
            raise ValueError("integers out of its range")
    except (ValueError, TypeError, OverflowError) as error:
        raise BadRequestError(
            f"expected numbers of type {dtype} as the data of input {name}, found {str(error)[:120]}"
        ) from error
    if array.size != math.prod(shape):
        raise BadRequestError(
            f"expected {math.prod(shape)} numbers for input {name} of shape {list(shape)}, found {array.size}"
        )
    return _shaped(result, shape, name)


def _shaped(array: NDArray[Any], shape: tuple[int, ...], name: str) -> NDArray[Any]:
    try:
        return array.reshape(shape)
    except ValueError as error:  # too many axes, or sizes whose product overflows beside a 0
        raise BadRequestError(f"expected a shape that can be for input {name}, found {error}") from error


def describe(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    """Tensors in the words of the protocol's metadata: -1 is an axis of any size."""
    return [
        {
            "name": spec.name,
            "datatype": PROTOCOL_NAMES.get(spec.dtype, spec.dtype),
            "shape": [size if isinstance(size, int) else -1 for size in spec.shape],
        }
        for spec in specs
    ]
