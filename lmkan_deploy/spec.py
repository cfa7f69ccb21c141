"""The operator's names, version and grid: the one place where they are written in Python.

docs/operator.md has the mathematics and every corner case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

DOMAIN = "lmkan"
"""ONNX domain of the operator, and namespace of its TensorRT plugin and PyTorch operator."""

OP_TYPE = "LMKAN2D"
"""ONNX operator type and TensorRT plugin name."""

QUANTIZED_OP_TYPE = "LMKAN2DQuantized"
"""The operator with an int8 table and scales; ONNX operator type and TensorRT plugin name."""

OPSET_VERSION = 1
"""Version of the ONNX domain; also the TensorRT plugin's version."""

TableDtype = Literal["float32", "float16", "bfloat16", "int8"]
"""Element type of the tables; activations, positions and sums are not affected."""

TABLE_DTYPES: tuple[TableDtype, ...] = get_args(TableDtype)

MIN_NUM_GRIDS = 3
"""Fewest cells along an axis: the mirrored ghost points need two inner grid points."""


def grid_points(num_grids: int) -> NDArray[np.float64]:
    """Grid of the lookup tables, the same on both axes.

    The inner points are the i/G quantiles of the Laplace distribution with scale 1; the first and the
    last are mirrored ghost points (arXiv 2509.07103, section 3.1).

    Args:
        num_grids: Number of cells G, at least 3.

    Returns:
        The G + 1 points in ascending order, float64.

    Raises:
        ValueError: G is below 3.
    """
    if num_grids < MIN_NUM_GRIDS:
        raise ValueError(f"expected at least {MIN_NUM_GRIDS} grid cells, found num_grids={num_grids}")
    level = np.arange(1, num_grids) / num_grids
    inner = np.where(level <= 0.5, np.log(2.0 * level), -np.log(2.0 * (1.0 - level)))
    first = 2.0 * inner[0] - inner[1]
    last = 2.0 * inner[-1] - inner[-2]
    return np.concatenate([[first], inner, [last]])
