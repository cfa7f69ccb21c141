"""The operator in float64 NumPy: the oracle that every other implementation is tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lmkan_deploy.spec import grid_points

if TYPE_CHECKING:
    from numpy.typing import NDArray


def lookup2d(x: NDArray[Any], table: NDArray[Any]) -> NDArray[np.float64]:
    """Evaluates a lookup layer in float64.

    Written for clarity, not speed: it goes pair by pair and needs memory for a few arrays of y's size.

    Args:
        x: Features, [..., N_in] with N_in even, any real dtype.
        table: Tables in the operator's layout, [N_in / 2, G + 1, G + 1, N_out], any real dtype.

    Returns:
        y, [..., N_out]. The row of a non-finite feature is non-finite.

    Raises:
        ValueError: The shapes contradict each other; see docs/operator.md.
    """
    x = np.asarray(x).astype(np.float64)
    table = np.asarray(table).astype(np.float64)
    check_shapes(x.shape, table.shape)
    num_pairs, num_points, _, num_outputs = table.shape
    rows = x.reshape(-1, 2 * num_pairs)
    y = np.zeros((rows.shape[0], num_outputs))
    with np.errstate(invalid="ignore", over="ignore"):
        for pair in range(num_pairs):
            i1, d1 = find_cells(rows[:, 2 * pair], num_points - 1)
            i2, d2 = find_cells(rows[:, 2 * pair + 1], num_points - 1)
            d1, d2 = d1[:, None], d2[:, None]
            corners = table[pair]
            y += (1 - d1) * (1 - d2) * corners[i1, i2]
            y += (1 - d1) * d2 * corners[i1, i2 + 1]
            y += d1 * (1 - d2) * corners[i1 + 1, i2]
            y += d1 * d2 * corners[i1 + 1, i2 + 1]
    return y.reshape(*x.shape[:-1], num_outputs)


def dequantize_table(table: NDArray[np.int8], scale: NDArray[Any]) -> NDArray[np.float64]:
    """The table that an int8 table and its scales stand for: entry times the scale of its pair and output.

    Args:
        table: [P, G + 1, G + 1, N_out].
        scale: [P, N_out].

    Raises:
        ValueError: The shapes contradict each other.
    """
    if table.ndim != 4 or scale.shape != (table.shape[0], table.shape[3]):
        raise ValueError(
            f"expected table [P, G+1, G+1, N_out] and scale [P, N_out], found {list(table.shape)} and "
            f"{list(scale.shape)}"
        )
    return np.asarray(table, np.float64) * np.asarray(scale, np.float64)[:, None, None, :]


def check_shapes(x_shape: tuple[int, ...], table_shape: tuple[int, ...]) -> None:
    """Raises ValueError when x and table can't be the inputs of one lookup; the message says why."""
    if len(table_shape) != 4 or table_shape[1] != table_shape[2] or table_shape[1] < 4 or 0 in table_shape:
        raise ValueError(
            "expected table [pairs, G+1, G+1, outputs] with equal grid axes, G >= 3 and at least 1 pair "
            f"and 1 output, found {list(table_shape)}"
        )
    if len(x_shape) < 1 or x_shape[-1] != 2 * table_shape[0]:
        raise ValueError(
            f"expected x [..., {2 * table_shape[0]}] because the table has {table_shape[0]} pairs of "
            f"features, found {list(x_shape)}"
        )


def find_cells(x: NDArray[np.float64], num_grids: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Cell of each value and the position inside it, which leaves 0 ... 1 in the outermost cells.

    Args:
        x: Values, of any shape.
        num_grids: G.

    Returns:
        Cells 0 ... G - 1 and positions, of x's shape. The position of a non-finite value is not finite.
    """
    grid = grid_points(num_grids)
    tail = 0.5 * np.exp(-np.abs(x))
    level = np.where(x > 0, 1.0 - tail, tail) * num_grids
    cell = np.clip(np.nan_to_num(level), 0, num_grids - 1).astype(np.int64)
    return cell, (x - grid[cell]) / (grid[cell + 1] - grid[cell])
