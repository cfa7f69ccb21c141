"""The C interface, through ctypes: every instruction set and type against float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkan_deploy.reference import find_cells, lookup2d
from lmkan_deploy.runtime.native import CpuTable, Dtype, Isa, NativeError, Ownership

DTYPES = {
    Dtype.FLOAT32: np.dtype(np.float32),
    Dtype.FLOAT16: np.dtype(np.float16),
    Dtype.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
RELATIVE_ERROR = {Dtype.FLOAT32: 2e-6, Dtype.FLOAT16: 1e-3, Dtype.BFLOAT16: 8e-3}
"""Of y's type: float32 accumulation, or half a unit in the last place of the narrower types."""


def _has(isa: Isa) -> bool:
    table = np.zeros((1, 4, 4, 32), np.float32)
    try:
        make_table(table, isa=isa).close()
    except NativeError:
        return False
    return True


def make_table(table: np.ndarray, *, isa: Isa = Isa.AUTO, ownership: Ownership = Ownership.COPY) -> CpuTable:
    dtype = next(key for key, value in DTYPES.items() if value == table.dtype)
    pairs, points, _, outputs = table.shape
    address = table.__array_interface__["data"][0]
    return CpuTable(address, dtype, pairs, points - 1, outputs, ownership=ownership, isa=isa)


def evaluate(handle: CpuTable, x: np.ndarray, num_outputs: int, num_tasks: int = 1) -> np.ndarray:
    dtype = next(key for key, value in DTYPES.items() if value == x.dtype)
    x = np.ascontiguousarray(x)
    y = np.full((len(x), num_outputs), 7.0, x.dtype)
    handle.lookup(
        x.__array_interface__["data"][0],
        y.__array_interface__["data"][0],
        dtype,
        len(x),
        num_tasks=num_tasks,
    )
    return y


def scale_of(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Sum of the magnitudes that a row adds up, the natural unit of its rounding error."""
    _, d = find_cells(x.astype(np.float64), table.shape[1] - 1)
    weights = (np.abs(1 - d) + np.abs(d)).reshape(len(x), table.shape[0], 2).prod(-1).sum(-1)
    return weights[:, None] * np.abs(table.astype(np.float64)).max()


ISAS = [isa for isa in (Isa.PORTABLE, Isa.AVX2, Isa.AVX512) if _has(isa)]


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name.lower())
@pytest.mark.parametrize("table_dtype", DTYPES, ids=lambda d: d.name.lower())
@pytest.mark.parametrize("x_dtype", DTYPES, ids=lambda d: d.name.lower())
@settings(max_examples=25)
@given(
    pairs=st.integers(1, 11),
    grids=st.integers(3, 14),
    outputs=st.one_of(st.integers(1, 20), st.integers(60, 70), st.just(150)),
    rows=st.one_of(st.integers(0, 12), st.just(111)),
    borrow=st.booleans(),
    tasks=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_float64(
    isa: Isa,
    table_dtype: Dtype,
    x_dtype: Dtype,
    pairs: int,
    grids: int,
    outputs: int,
    rows: int,
    borrow: bool,
    tasks: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((pairs, grids + 1, grids + 1, outputs)).astype(DTYPES[table_dtype])
    x = (rng.standard_normal((rows, 2 * pairs)) * 3).astype(DTYPES[x_dtype])
    ownership = Ownership.BORROW if borrow else Ownership.COPY
    with make_table(table, isa=isa, ownership=ownership) as handle:
        y = evaluate(handle, x, outputs, tasks)
    error = np.abs(y.astype(np.float64) - lookup2d(x, table))
    assert (error <= RELATIVE_ERROR[x_dtype] * scale_of(x, table)).all()


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name.lower())
@pytest.mark.parametrize("points", [14, 41])  # blocks of 32 and of 16 outputs
def test_a_row_does_not_depend_on_its_batch_or_on_the_tasks(isa: Isa, points: int) -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((9, points, points, 100)).astype(np.float32)
    x = rng.standard_normal((2500, 18)).astype(np.float32)
    with (
        make_table(table, isa=isa) as handle,
        make_table(table, isa=isa, ownership=Ownership.BORROW) as borrowed,
    ):
        whole = evaluate(handle, x, 100)
        for rows in (1, 2, 5, 6, 7, 64, 1024, 1025, 1600):
            np.testing.assert_array_equal(evaluate(handle, x[:rows], 100), whole[:rows])
        for tasks in (2, 3, 7, 64, 5000):
            np.testing.assert_array_equal(evaluate(handle, x, 100, tasks), whole)
        np.testing.assert_array_equal(evaluate(borrowed, x, 100), whole)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name.lower())
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, -1e38])
def test_non_finite_features_spoil_their_row_alone(isa: Isa, value: float) -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((4, 5, 5, 33)).astype(np.float32)
    x = rng.standard_normal((20, 8)).astype(np.float32)
    with make_table(table, isa=isa) as handle:
        want = evaluate(handle, x, 33)
        x[5, 3] = value
        y = evaluate(handle, x, 33)
    assert np.isfinite(value) or not np.isfinite(y[5]).any()
    np.testing.assert_array_equal(np.delete(y, 5, 0), np.delete(want, 5, 0))


def test_far_tails() -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((2, 9, 9, 16)).astype(np.float32)
    x = np.array([[180, -180, 90, 88], [-90, 87.4, 1e-40, -0.0], [104, 0, -1e-45, 60]], np.float32)
    for isa in ISAS:
        with make_table(table, isa=isa) as handle:
            y = evaluate(handle, x, 16)
        assert (np.abs(y - lookup2d(x, table)) <= 2e-6 * scale_of(x, table)).all()


def test_one_handle_serves_many_threads() -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((6, 9, 9, 48)).astype(np.float32)
    batches = [rng.standard_normal((int(n), 12)).astype(np.float32) for n in rng.integers(1, 300, 64)]
    with make_table(table) as handle:
        want = [evaluate(handle, x, 48) for x in batches]
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda x: evaluate(handle, x, 48, num_tasks=2), batches))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(a, b)


def test_number_of_tasks_is_sensible() -> None:
    with make_table(np.zeros((64, 9, 9, 128), np.float32)) as handle:
        assert handle.num_tasks(1, 16) == 1  # too little work to share
        assert handle.num_tasks(4096, 1) == 1
        assert handle.num_tasks(4096, 2) >= 2
        assert handle.num_tasks(2**62, 2) >= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, Dtype.FLOAT32, 2, 4, 3), "null pointer"),
        ((64, 4, 2, 4, 3), "float32.*found dtype 4"),
        ((64, 3, 2, 4, 3), "expected scales for a table of int8.*without scales"),
        ((64, -1, 2, 4, 3), "found dtype -1"),
        ((64, Dtype.FLOAT32, 0, 4, 3), "at least 1 pair.*found 0 pairs"),
        ((64, Dtype.FLOAT32, -2, 4, 3), "found -2 pairs"),
        ((64, Dtype.FLOAT32, 2, 2, 3), "expected 3 to .* found 2"),
        ((64, Dtype.FLOAT32, 2, 1 << 40, 3), "expected 3 to"),
        ((64, Dtype.FLOAT32, 2, 4, 0), "0 outputs"),
        ((64, Dtype.FLOAT32, 1 << 50, 1000, 1 << 40), "2\\^62"),
    ],
)
def test_bad_tables_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(NativeError, match=message):
        CpuTable(*arguments)


def test_a_table_that_does_not_fit_memory_is_refused() -> None:
    with pytest.raises(NativeError, match="no memory for a table"):
        CpuTable(64, Dtype.FLOAT32, 1 << 20, 1000, 1 << 12)


def test_bad_calls_are_refused() -> None:
    with make_table(np.zeros((1, 4, 4, 8), np.float32)) as handle:
        for arguments, message in [
            ((0, 0, Dtype.FLOAT32, 1), "null pointer"),
            ((64, 64, 7, 1), "dtype 7"),
            ((64, 64, Dtype.FLOAT32, -1), "rows -1"),
        ]:
            with pytest.raises(NativeError, match=message):
                handle.lookup(*arguments)
        handle.lookup(0, 0, Dtype.FLOAT32, 0)  # no rows, nothing to read
