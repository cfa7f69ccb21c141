"""Requests and responses as JSON, with tensors as numbers or as bytes behind it.

The Open Inference Protocol (V2) over HTTP, and its binary tensor data extension.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from lmkan_deploy.runtime.tensors import Arrays
from lmkan_deploy.serving.errors import BadRequestError, UnsupportedError
from lmkan_deploy.serving.messages import (
    InferRequest,
    check_shape,
    dtype_of,
    from_bytes,
    from_values,
    protocol_name,
)

MICROSECONDS = 1e-6


def parse_object(text: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BadRequestError: It is something else.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadRequestError(
            f"expected a JSON object, could not read it: {error}; NaN and infinite numbers travel as bytes only"
        ) from error
    if not isinstance(value, dict):
        raise BadRequestError(f"expected a JSON object, found {type(value).__name__}")
    return value


def parse_request(body: bytes, header_length: int | None) -> InferRequest:
    """Reads the body of a request.

    Args:
        body: JSON, and the bytes of tensors behind it.
        header_length: Length of the JSON; None where there is nothing behind it.

    Raises:
        BadRequestError: It is no request.
        UnsupportedError: It asks for classes instead of numbers, or for shared memory.
    """
    if header_length is not None and not 0 <= header_length <= len(body):
        raise BadRequestError(
            f"expected an Inference-Header-Content-Length of 0 to {len(body)} (the body), found {header_length}"
        )
    if header_length == 0:
        raise UnsupportedError(
            "expected a JSON object before the tensors, found none: raw bodies are not supported"
        )
    if header_length is None:
        plan, rest = _plan(body), memoryview(b"")
    else:
        text = body[:header_length]
        plan = _known_plan(text) if header_length <= _LONGEST_KNOWN else _plan(text)
        rest = memoryview(body)[header_length:]
    inputs: Arrays = {}
    for tensor in plan.inputs:
        if tensor.size is None:
            inputs[tensor.name] = from_values(tensor.values, tensor.dtype, tensor.shape, tensor.name)
            continue
        if tensor.size > len(rest):
            raise _wrong_size(tensor.name, tensor.size, f"0 to {len(rest)} (what is left of the body)")
        inputs[tensor.name] = from_bytes(rest[: tensor.size], tensor.dtype, tensor.shape, tensor.name)
        rest = rest[tensor.size :]
    if len(rest):
        raise BadRequestError(f"expected inputs to take the whole body, found {len(rest)} bytes more")
    return InferRequest(plan.id, inputs, plan.outputs, plan.binary, plan.timeout)


class _Input(NamedTuple):
    """An input as its JSON describes it: `values` in it, or `size` bytes behind it."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    size: int | None
    values: object


class _Plan(NamedTuple):
    """What the JSON of a request says; see `InferRequest`."""

    id: str
    inputs: tuple[_Input, ...]
    outputs: Mapping[str, bool]
    binary: bool
    timeout: float | None


def _plan(text: bytes) -> _Plan:
    header = parse_object(text)
    inputs: dict[str, _Input] = {}
    for entry in _list(header, "inputs"):
        name = _text(entry, "name", "an input")
        if name in inputs:
            raise BadRequestError(f"expected each input once, found {name} twice")
        dtype = dtype_of(entry.get("datatype"), name)
        shape = check_shape(entry.get("shape"), name)
        parameters = _parameters(entry)
        size = parameters.get("binary_data_size")
        if "shared_memory_region" in parameters:
            raise UnsupportedError("shared memory is not supported; send the tensor itself")
        if size is None and "data" not in entry:
            raise BadRequestError(f"expected data or a binary_data_size for input {name}, found neither")
        if size is not None and (type(size) is not int or size < 0):
            raise _wrong_size(name, size, "0 or more")
        inputs[name] = _Input(name, dtype, shape, size, entry.get("data"))
    parameters = _parameters(header)
    binary = flag(parameters, "binary_data_output", default=False)
    outputs = {}
    for entry in _list(header, "outputs") if header.get("outputs") is not None else []:
        if "classification" in _parameters(entry) or "shared_memory_region" in _parameters(entry):
            raise UnsupportedError(
                "classification and shared memory are not supported; take the output itself"
            )
        outputs[_text(entry, "name", "an output")] = flag(_parameters(entry), "binary_data", default=binary)
    return _Plan(_identifier(header), tuple(inputs.values()), outputs, binary, _timeout(parameters))


_LONGEST_KNOWN = 4096

_known_plan = functools.lru_cache(256)(_plan)
"""Requests with tensors as bytes repeat their JSON, letter for letter."""


def _wrong_size(name: str, found: object, expected: str) -> BadRequestError:
    return BadRequestError(
        f"expected a binary_data_size of {expected} for input {name}, found {str(found)[:30]}"
    )


def write_response(
    model: str,
    version: str,
    identifier: str,
    outputs: Arrays,
    binary: Mapping[str, bool],
    binary_default: bool,
) -> tuple[bytes, int | None]:
    """Writes the body of a response.

    Returns:
        The body, and the length of its JSON; None where there is nothing behind it. JSON has no NaN and no
        infinite numbers: they become null there.
    """
    entries = []
    blobs: list[bytes] = []
    for name, array in outputs.items():
        entry: dict[str, Any] = {
            "name": name,
            "datatype": protocol_name(array.dtype),
            "shape": list(array.shape),
        }
        if binary.get(name, binary_default):
            blobs.append(array.tobytes())
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            entry["data"] = _numbers(array)
        entries.append(entry)
    header: dict[str, Any] = {"model_name": model, "model_version": version}
    if identifier:
        header["id"] = identifier
    header["outputs"] = entries
    text = orjson.dumps(header, option=orjson.OPT_SERIALIZE_NUMPY)
    return (text, None) if not blobs else (b"".join((text, *blobs)), len(text))


def _numbers(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind == "V":  # bfloat16
        array = array.astype(np.float32)
    return np.ascontiguousarray(array).reshape(-1)


def _list(header: dict[str, Any], key: str) -> list[dict[str, Any]]:
    entries = header.get(key)
    if isinstance(entries, list):
        for entry in entries:
            if not isinstance(entry, dict):
                break
        else:
            return entries
    raise BadRequestError(f"expected a list of objects under {key!r}, found {str(entries)[:80]}")


def _text(entry: dict[str, Any], key: str, what: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str):
        raise BadRequestError(f"expected a text as the {key} of {what}, found {str(value)[:80]}")
    return value


def _parameters(entry: dict[str, Any]) -> dict[str, Any]:
    value = entry.get("parameters")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadRequestError(f"expected an object under 'parameters', found {str(value)[:80]}")
    return value


def flag(parameters: dict[str, Any], key: str, *, default: bool) -> bool:
    """A truth value among parameters.

    Raises:
        BadRequestError: It is something else.
    """
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise BadRequestError(f"expected true or false as {key}, found {str(value)[:80]}")
    return value


def _identifier(header: dict[str, Any]) -> str:
    value = header.get("id", "")
    if not isinstance(value, str) or len(value) > 256:
        raise BadRequestError(f"expected a text of at most 256 characters as the id, found {str(value)[:80]}")
    return value


def _timeout(parameters: dict[str, Any]) -> float | None:
    value = parameters.get("timeout")
    if value is None:
        return None
    if type(value) is not int or not 0 < value < 10**15:
        raise BadRequestError(
            f"expected a positive number of microseconds as timeout, found {str(value)[:80]}"
        )
    return value * MICROSECONDS
