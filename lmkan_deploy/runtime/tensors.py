"""What a model's inputs and outputs look like, and checks of arrays against it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmkan_deploy.errors import InputError
from lmkan_deploy.runtime.axis_limits import AxisLimits

Arrays = dict[str, NDArray[Any]]
"""Tensors by name."""

# Measured on the CPU: rounding makes up to 8e-7 in float32 and 3e-4 in float16, the types of tables nothing; rows
# that depend on each other make 0.2 to 4, but attention over them less than this in one pair of eleven.
_ROUNDING = 1e-2
_PAIRS = 4

_SHORT = 8
"""Size of free axes that are not rows, where any would do."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and element type of an input or output.

    Attributes:
        name: As in the model.
        shape: A number where a size is fixed; a name or None where it is free.
        dtype: NumPy's name of the type, or "bfloat16".
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join('?' if d is None else str(d) for d in self.shape)}]"


def rows_are_free(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Whether rows are independent as far as shapes tell: every tensor leads with the same free axis."""
    axes = {spec.shape[0] if spec.shape else 0 for spec in (*inputs, *outputs)}
    return len(axes) == 1 and isinstance(next(iter(axes)), str)


def rows_are_independent(
    run: Callable[[Arrays], Arrays],
    inputs: Sequence[TensorSpec],
    limits: Mapping[str, AxisLimits] | None = None,
) -> bool:
    """Whether rows have the same outputs together and apart, but for rounding, on random inputs.

    Args:
        run: Takes all inputs by name, with any number of rows, and returns outputs with as many.
        inputs: What it takes.
        limits: See `random_rows`.
    """
    for seed in range(_PAIRS):
        both = random_rows(inputs, 2, np.random.default_rng(seed), limits)
        together = run(both)
        apart = [run({name: array[row : row + 1] for name, array in both.items()}) for row in range(2)]
        if not all(_same_rows(found, [rows[name] for rows in apart]) for name, found in together.items()):
            return False
    return True


def _same_rows(found: NDArray[Any], apart: Sequence[NDArray[Any]]) -> bool:
    expected = np.concatenate(apart)
    if expected.shape != found.shape:
        return False
    if expected.dtype.kind in "biu":  # rounding may change a class
        return True
    expected = expected.astype(np.float64)
    finite = np.abs(expected[np.isfinite(expected)])
    scale = np.abs(expected) + (finite.max() if finite.size else 0)
    with np.errstate(invalid="ignore"):
        return not (np.abs(found.astype(np.float64) - expected) > _ROUNDING * scale).any()


@functools.cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy dtype of a name; "bfloat16" is ml_dtypes's."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def check_inputs(
    specs: Sequence[TensorSpec],
    feeds: Mapping[str, NDArray[Any]],
    limits: Mapping[str, AxisLimits] | None = None,
) -> None:
    """Checks that arrays fit a model's inputs.

    Args:
        specs: What the model takes.
        feeds: Arrays by name.
        limits: Of free axes that may not have every size, by name. Only steps are checked: tracers give smallest
            and largest sizes that need not be the model's.

    Raises:
        InputError: An input is missing or unknown, or has another rank, size or dtype than expected.
    """
    if not isinstance(feeds, Mapping):
        raise InputError(
            f"expected a dict with an array for each of {', '.join(spec.name for spec in specs)}, found "
            f"{type(feeds).__name__}"
        )
    if len(specs) != len(feeds) or not all(spec.name in feeds for spec in specs):
        expected, found = [spec.name for spec in specs], list(feeds)
        raise InputError(f"expected the inputs {', '.join(expected)}, found {', '.join(found) or 'none'}")
    for spec in specs:
        array = feeds[spec.name]
        if not isinstance(array, np.ndarray):
            raise InputError(
                f"expected a NumPy array for input {spec}, found {type(array).__name__}; convert it with "
                f"x.numpy() or np.asarray(x, {spec.dtype!r})"
            )
        if array.dtype != numpy_dtype(spec.dtype):
            raise InputError(
                f"expected input {spec}, found {array.dtype}; convert it with x.astype({spec.dtype!r})"
            )
    sizes = check_input_shapes(specs, {spec.name: feeds[spec.name].shape for spec in specs})
    for name, allowed in (limits or {}).items():
        if sizes.get(name, 0) % allowed.step != 0:
            spec = next(spec for spec in specs if name in spec.shape)
            raise InputError(
                f"expected input {spec} with {name} in multiples of {allowed.step}, found shape "
                f"{list(feeds[spec.name].shape)}"
            )


def check_input_shapes(specs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Checks that shapes fit a model's inputs, and each other where axes share a name.

    Args:
        specs: What the model takes.
        shapes: A shape for each of them, by name.

    Returns:
        The sizes of named axes.

    Raises:
        InputError: A shape has another rank or size than expected.
    """
    sizes: dict[str, int] = {}
    for spec in specs:
        shape = shapes[spec.name]
        if len(shape) != len(spec.shape) or not all(
            _fits(expected_size, size, sizes) for expected_size, size in zip(spec.shape, shape, strict=True)
        ):
            raise InputError(_misfit(specs, spec, shape, sizes))
    return sizes


def _misfit(
    specs: Sequence[TensorSpec], spec: TensorSpec, shape: tuple[int, ...], sizes: Mapping[str, int]
) -> str:
    """What is wrong with a shape that does not fit: the input's own, or its agreement with those before it."""
    if len(shape) == len(spec.shape):
        pairs = list(zip(spec.shape, shape, strict=True))
        if all(size == expected for expected, size in pairs if isinstance(expected, int)):
            axis = next(name for name, size in pairs if isinstance(name, str) and sizes[name] != size)
            first = next(other.name for other in specs if axis in other.shape)
            return (
                f"expected input {spec} with {axis} = {sizes[axis]} as in {first}, found shape {list(shape)}; "
                "axes of one name have one size"
            )
    return f"expected input {spec}, found shape {list(shape)}"


def _fits(expected: int | str | None, size: int, sizes: dict[str, int]) -> bool:
    if expected is None:
        return True
    if isinstance(expected, str):  # the same name means the same size
        return sizes.setdefault(expected, size) == size
    return expected == size


def random_rows(
    specs: Sequence[TensorSpec],
    rows: int,
    rng: np.random.Generator,
    limits: Mapping[str, AxisLimits] | None = None,
) -> Arrays:
    """Random inputs with a number of rows; free axes behind the first are short.

    Args:
        specs: Inputs of a model.
        rows: Size of the first axes that are free.
        rng: Source of randomness.
        limits: Of free axes that may not have every size, by name.
    """
    sizes: dict[str | None, int] = {None: rows}
    for spec in specs:
        for axis in spec.shape[1:]:
            if isinstance(axis, str):
                sizes[axis] = _SHORT
    sizes |= {spec.shape[0]: rows for spec in specs if spec.shape and isinstance(spec.shape[0], str)}
    for name, allowed in (limits or {}).items():
        sizes[name] = allowed.nearest(sizes.get(name, rows))
    return random_inputs(specs, sizes, rng)


def random_inputs(
    specs: Sequence[TensorSpec], sizes: Mapping[str | None, int], rng: np.random.Generator
) -> Arrays:
    """Standard normal floats (zeros and ones for other types) of the inputs' shapes.

    Args:
        specs: Inputs of a model.
        sizes: Size of each free axis by name; `None` is the default for all others.
        rng: Source of randomness.
    """
    result: Arrays = {}
    for spec in specs:
        shape = [d if isinstance(d, int) else sizes.get(d, sizes[None]) for d in spec.shape]
        if spec.dtype == "bool" or "int" in spec.dtype:
            result[spec.name] = rng.integers(0, 2, shape).astype(numpy_dtype(spec.dtype))
        else:
            result[spec.name] = rng.standard_normal(shape).astype(numpy_dtype(spec.dtype))
    return result
