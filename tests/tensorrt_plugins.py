"""What tests of the TensorRT plugin's methods share: types, shapes, and plugins of a library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorrt_rtx as trt

from lmkan_deploy.spec import OP_TYPE, QUANTIZED_OP_TYPE
from tensorrt_driver import Library, Plugin, dynamic_tensor

OPERATORS = (OP_TYPE, QUANTIZED_OP_TYPE)  # in the order of their creators
FLOAT, HALF, BF16, INT8 = (
    int(kind) for kind in (trt.DataType.FLOAT, trt.DataType.HALF, trt.DataType.BF16, trt.DataType.INT8)
)
FLOATS = (FLOAT, HALF, BF16)
X = (-1, 6)
TABLE = (3, 5, 5, 7)


def create(library: Library, quantized: bool = False, **arguments: Any) -> Plugin:
    plugin = library.create(int(quantized), **arguments)
    assert plugin is not None, library.lines
    return plugin


def fixed(shape: Sequence[int], batch: int = 2) -> tuple[int, ...]:
    return tuple(batch if size < 0 else size for size in shape)


def profile(
    x: Sequence[int], table: Sequence[int], *, x_type: int = FLOAT, table_type: int = FLOAT, most: int = 64
) -> list[Any]:
    """x, table and y, from 1 to `most` rows."""
    y = (*x[:-1], table[3])
    return [
        dynamic_tensor(x, x_type, low=fixed(x, 1), high=fixed(x, most)),
        dynamic_tensor(table, table_type),
        dynamic_tensor(y, x_type, low=fixed(y, 1), high=fixed(y, most)),
    ]
