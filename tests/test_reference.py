"""The oracle itself: golden results, and properties that follow from the definition alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmkan_deploy.reference import lookup2d
from lmkan_deploy.spec import grid_points
from networks import DATA


def test_golden_results() -> None:
    golden = np.load(DATA / "golden_lookup2d.npz")
    cases = [key[1:] for key in golden.files if key.startswith("x")]
    assert len(cases) >= 6
    for k in cases:
        y = lookup2d(golden[f"x{k}"], golden[f"table{k}"].transpose(3, 0, 1, 2))
        np.testing.assert_allclose(y, golden[f"y{k}"], rtol=1e-12, atol=1e-10)


@given(st.integers(3, 60))
def test_grid_is_symmetric_and_ascending(num_grids: int) -> None:
    grid = grid_points(num_grids)
    assert grid.shape == (num_grids + 1,)
    assert (np.diff(grid) > 0).all()
    np.testing.assert_allclose(grid, -grid[::-1], atol=1e-12)


def test_grid_has_zero_exactly_for_even_numbers_of_cells() -> None:
    for num_grids in range(3, 30):
        assert (0.0 in grid_points(num_grids)) == (num_grids % 2 == 0)


@given(st.integers(3, 12), st.integers(0, 2**31))
def test_reproduces_bilinear_functions_with_their_tails(num_grids: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, c, d = rng.standard_normal(4)
    g = grid_points(num_grids)
    table = (a + b * g[:, None] + c * g + d * g[:, None] * g)[None, :, :, None]
    x = rng.standard_normal((50, 2)) * 10.0 ** rng.integers(-3, 3)
    want = a + b * x[:, 0] + c * x[:, 1] + d * x[:, 0] * x[:, 1]
    np.testing.assert_allclose(lookup2d(x, table)[:, 0], want, rtol=1e-9, atol=1e-9)


def test_values_at_grid_points_are_table_entries() -> None:
    g = grid_points(5)[1:-1]
    table = np.random.default_rng(0).standard_normal((1, 6, 6, 3))
    for i, x1 in enumerate(g, 1):
        for j, x2 in enumerate(g, 1):
            np.testing.assert_allclose(lookup2d([x1, x2], table), table[0, i, j], atol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_features_spoil_their_row_alone(value: float) -> None:
    rng = np.random.default_rng(0)
    x, table = rng.standard_normal((5, 4)), rng.standard_normal((2, 5, 5, 3))
    want = lookup2d(x, table)
    x[2, 1] = value
    y = lookup2d(x, table)
    assert not np.isfinite(y[2]).any()
    np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(want, 2, 0))


@pytest.mark.parametrize(
    ("x_shape", "table_shape", "message"),
    [
        ((3, 5), (2, 5, 5, 3), r"expected x \[..., 4\].*found \[3, 5\]"),
        ((), (2, 5, 5, 3), r"expected x \[..., 4\]"),
        ((3, 4), (2, 3, 3, 3), r"G >= 3.*found \[2, 3, 3, 3\]"),
        ((3, 4), (2, 5, 6, 3), "equal grid axes"),
        ((3, 4), (2, 5, 5, 0), "at least 1 pair and 1 output"),
        ((3, 4), (5, 5, 3), "expected table"),
    ],
)
def test_bad_shapes_are_refused(x_shape: tuple, table_shape: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lookup2d(np.zeros(x_shape), np.zeros(table_shape))


@pytest.mark.parametrize("num_grids", [-1, 0, 2])
def test_grids_below_three_cells_are_refused(num_grids: int) -> None:
    with pytest.raises(ValueError, match="at least 3"):
        grid_points(num_grids)
