"""int8 tables: integers, and a scale for each pair and output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lmkan_deploy.reference import find_cells

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGEST = 127
"""Integers are symmetric, -127 ... 127: a table and its negative round alike."""

# Calibration tries these shares of the largest entry as the largest one that is not clipped.
_CLIP_RATIOS = tuple(2.0 ** (-step / 8) for step in range(17))

# Weight that every entry has besides, as from a fraction of a row: without it, scales chosen on a few rows
# clip what other rows need (measured: three times the error on unseen rows).
_PRIOR = 0.1


def quantize_table(
    table: NDArray[np.float32], importance: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Rounds a table to integers times a scale.

    Args:
        table: [P, G + 1, G + 1, N_out].
        importance: See `table_scales`.

    Returns:
        The integers, [P, G + 1, G + 1, N_out], and the scales, [P, N_out].
    """
    scales = table_scales(table, importance)
    return round_table(table, scales), scales


def table_scales(
    table: NDArray[np.float32], importance: NDArray[np.float64] | None = None
) -> NDArray[np.float32]:
    """The scale of every pair and output.

    Args:
        table: [P, G + 1, G + 1, N_out].
        importance: Weight of the squared error of each entry, [P, G + 1, G + 1], as `corner_importance`
            gives it; every pair and output takes the scale with the least sum. None takes the scale that
            clips nothing.

    Returns:
        [P, N_out], all positive.
    """
    scales = np.empty((table.shape[0], table.shape[3]), np.float32)
    for pair, entries in enumerate(table):  # one at a time, to bound the memory
        largest = np.abs(entries).max(axis=(0, 1))
        scales[pair] = (
            _scale(largest)
            if importance is None
            else _best_scale(entries, largest, importance[pair][:, :, None] + _PRIOR)
        )
    return scales


def round_table(table: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.int8]:
    """The nearest integers.

    Args:
        table: [P, G + 1, G + 1, N_out].
        scales: [P, N_out], positive.

    Returns:
        [P, G + 1, G + 1, N_out], clipped to -127 ... 127.
    """
    quantized = np.empty(table.shape, np.int8)
    for pair, entries in enumerate(table):  # one at a time, to bound the memory
        quantized[pair] = _round(entries, scales[pair])
    return quantized


def corner_importance(x: NDArray[Any], num_grids: int) -> NDArray[np.float64]:
    """How much the error of each table entry counts for some inputs.

    An entry's error enters an output times its corner weight. Rounding errors of neighbours are
    independent, so their squares add up.

    Args:
        x: Features, [..., N_in]. Rows that are not finite count for nothing.
        num_grids: G.

    Returns:
        Sum of the squared corner weights over the rows, [N_in / 2, G + 1, G + 1].
    """
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    rows = rows[np.isfinite(rows).all(axis=1)]
    points = num_grids + 1
    result = np.zeros((rows.shape[1] // 2, points * points))
    for pair in range(result.shape[0]):
        i1, d1 = find_cells(rows[:, 2 * pair], num_grids)
        i2, d2 = find_cells(rows[:, 2 * pair + 1], num_grids)
        for step1, w1 in ((0, 1 - d1), (1, d1)):
            for step2, w2 in ((0, 1 - d2), (1, d2)):
                entry = (i1 + step1) * points + i2 + step2
                result[pair] += np.bincount(entry, np.square(w1 * w2), points * points)
    return result.reshape(-1, points, points)


def _scale(largest: NDArray[Any]) -> NDArray[np.float32]:
    # Not 0 where there is nothing to scale.
    return np.maximum(largest / np.float32(LARGEST), np.finfo(np.float32).tiny).astype(np.float32)


def _round(entries: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.int8]:
    return np.clip(np.rint(entries / scale), -LARGEST, LARGEST).astype(np.int8)


def _best_scale(
    entries: NDArray[np.float32], largest: NDArray[np.float32], weights: NDArray[np.float64]
) -> NDArray[np.float32]:
    """The scale of each output with the least weighted squared error."""
    candidates = np.stack([_scale(ratio * largest) for ratio in _CLIP_RATIOS])
    errors = np.stack(
        [
            (weights * np.square(_round(entries, scale) * scale - entries)).sum(axis=(0, 1))
            for scale in candidates
        ]
    )
    return np.take_along_axis(candidates, errors.argmin(axis=0)[None], axis=0)[0]
