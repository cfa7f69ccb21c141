"""Fits batches to an engine: splits those beyond its profile, and pads them to few sizes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lmkan_deploy.engines.profiles import Profile, Shape
from lmkan_deploy.errors import InputError
from lmkan_deploy.runtime.tensors import TensorSpec, rows_are_free


@dataclass(frozen=True)
class Part:
    """Rows that run together.

    Attributes:
        rows: Which ones.
        padded_to: How many rows the engine runs: zeros stand behind these, and what comes out for them is left
            out. None where they run as they are.
    """

    rows: slice
    padded_to: int | None = None


def padded_sizes(
    inputs: Sequence[TensorSpec], profiles: Mapping[str, Profile], count: int
) -> tuple[int, ...]:
    """Sizes to pad batches to: the smallest and the largest one of the profiles, and between them powers of two
    and the middle of every two, or powers of two alone where that would be more than `count`.
    """
    least, most = _bounds(inputs, profiles)
    powers = [1 << bit for bit in range(most.bit_length())]
    middles = [3 * power // 2 for power in powers[1:]]
    for ladder in (powers + middles, powers):
        sizes = sorted({least, most, *(size for size in ladder if least < size < most)})
        if len(sizes) <= count:
            break
    return tuple(sizes)


def split_batch(
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    profiles: Mapping[str, Profile],
    shapes: Mapping[str, Shape],
    sizes: Sequence[int] | None = None,
) -> Iterator[Part]:
    """Parts of the leading axis that the profiles allow, in order.

    A batch is split or padded when the leading axis of every input and output is the same free axis.

    Args:
        inputs: Inputs of the engine.
        outputs: Its outputs.
        profiles: Input name -> shapes.
        shapes: Input name -> shape of what is to be run; they fit `inputs`.
        sizes: What batches are padded to, ascending; None for no padding.

    Yields:
        What covers the batch; a single one of everything where the shapes fit as they are. None where the batch
        is empty.

    Raises:
        InputError: A shape is beyond its profile, and the batch can't be split, or splitting does not help.
    """
    can_split = rows_are_free(inputs, outputs)
    lead = 1 if can_split else 0
    for spec in inputs:
        profile = profiles[spec.name]
        bounds = zip(profile.smallest[lead:], shapes[spec.name][lead:], profile.largest[lead:], strict=True)
        if not all(low <= size <= high for low, size, high in bounds):
            raise InputError(
                f"expected input {spec.name} of a shape from {_text(profile.smallest)} to "
                f"{_text(profile.largest)}, found {_text(shapes[spec.name])}; build the engine with wider "
                "--shapes"
            )
    if not can_split:
        yield Part(slice(None))
        return
    rows = shapes[inputs[0].name][0]
    if sizes is not None:
        yield from _padded_parts(rows, sizes)
        return
    least, most = _bounds(inputs, profiles)
    count = -(-rows // most)
    parts = [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]
    if any(part.stop - part.start < least for part in parts):
        raise InputError(
            f"expected batches of {least} to {most} rows or of a multiple that can be split so, found {rows}; "
            "build the engine with wider --shapes"
        )
    yield from map(Part, parts)


def _padded_parts(rows: int, sizes: Sequence[int]) -> Iterator[Part]:
    """As many of the largest size as there are, and the rest."""
    for first in range(0, rows, sizes[-1]):
        last = min(first + sizes[-1], rows)
        size = sizes[bisect_left(sizes, last - first)]
        yield Part(slice(first, last), None if size == last - first else size)


def _bounds(inputs: Sequence[TensorSpec], profiles: Mapping[str, Profile]) -> tuple[int, int]:
    """Fewest and most rows that all profiles allow."""
    least = max(profiles[spec.name].smallest[0] for spec in inputs)
    return least, min(profiles[spec.name].largest[0] for spec in inputs)


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))
