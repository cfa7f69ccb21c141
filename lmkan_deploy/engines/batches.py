"""Fits batches to an engine: chooses a profile, splits what no profile takes at once, and pads to few sizes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lmkan_deploy.engines.profiles import Profile, Shape, nearest_profile
from lmkan_deploy.errors import InputError
from lmkan_deploy.runtime.tensors import TensorSpec, rows_are_free


@dataclass(frozen=True)
class Part:
    """Rows that run together.

    Attributes:
        rows: Which ones.
        profile: Number of the profile that they run with.
        padded_to: How many rows the engine runs: zeros stand behind these, and what comes out for them is left
            out. None where they run as they are.
    """

    rows: slice
    profile: int = 0
    padded_to: int | None = None


RowRange = tuple[int, int]
"""Fewest and most rows."""


def row_range(inputs: Sequence[TensorSpec], profile: Profile) -> RowRange:
    """How many rows a profile allows, where the leading axis of every input is the same free axis."""
    least = max(profile[spec.name].smallest[0] for spec in inputs)
    return least, min(profile[spec.name].largest[0] for spec in inputs)


def padded_sizes(inputs: Sequence[TensorSpec], profiles: Sequence[Profile], count: int) -> tuple[int, ...]:
    """Sizes to pad batches to: the smallest and the largest one of each profile, and within them powers of two
    and the middle of every two, or powers of two alone where that would be more than `count`.
    """
    ranges = [row_range(inputs, profile) for profile in profiles]
    powers = [1 << bit for bit in range(max(most for _, most in ranges).bit_length())]
    middles = [3 * power // 2 for power in powers[1:]]
    ends = {size for ends in ranges for size in ends}
    for ladder in (powers + middles, powers):
        sizes = sorted({*ends, *(size for size in ladder if _is_allowed(size, ranges))})
        if len(sizes) <= count:
            break
    return tuple(sizes)


def split_batch(
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    profiles: Sequence[Profile],
    shapes: Mapping[str, Shape],
    sizes: Sequence[int] | None = None,
) -> Iterator[Part]:
    """Parts of the leading axis that a profile allows, in order.

    A batch is split or padded when the leading axis of every input and output is the same free axis.

    Args:
        inputs: Inputs of the engine.
        outputs: Its outputs.
        profiles: Its profiles.
        shapes: Input name -> shape of what is to be run; they fit `inputs`.
        sizes: What batches are padded to, as `padded_sizes` gives them; None for no padding.

    Yields:
        What covers the batch; a single part with everything where the shapes fit as they are. None where the
        batch is empty.

    Raises:
        InputError: A shape is beyond all profiles, and the batch can't be split, or splitting does not help.
    """
    can_split = rows_are_free(inputs, outputs)
    usable = _usable(profiles, shapes, first_axis=1 if can_split else 0)
    if not can_split:
        yield Part(slice(None), _nearest(usable, shapes))
        return
    rows = shapes[inputs[0].name][0]
    ranges = [row_range(inputs, profile) for _, profile in usable]
    parts: list[tuple[slice, int | None]]
    if sizes is None:
        parts = [(part, None) for part in _even_parts(rows, ranges)]
    else:
        parts = list(_padded_parts(rows, [size for size in sizes if _is_allowed(size, ranges)]))
    for part, padded_to in parts:
        run = padded_to or part.stop - part.start
        profile = _nearest(usable, {name: (run, *shape[1:]) for name, shape in shapes.items()})
        yield Part(part, profile, padded_to)


def _usable(
    profiles: Sequence[Profile], shapes: Mapping[str, Shape], first_axis: int
) -> list[tuple[int, Profile]]:
    """Profiles that allow all axes from one on, and their numbers."""
    found = [
        (number, profile)
        for number, profile in enumerate(profiles)
        if all(profile[name].allows(shape, first_axis) for name, shape in shapes.items())
    ]
    if found:
        return found
    for name, shape in shapes.items():
        ranges = dict.fromkeys(profile[name] for profile in profiles)
        if not any(allowed.allows(shape, first_axis) for allowed in ranges):
            texts = [f"from {_text(allowed.smallest)} to {_text(allowed.largest)}" for allowed in ranges]
            raise InputError(
                f"expected input {name} of a shape {' or '.join(texts)}, found {_text(shape)}; build the engine "
                "with wider --shapes"
            )
    found_texts = [f"{name} {_text(shape)}" for name, shape in shapes.items()]
    raise InputError(
        "expected inputs of shapes that one profile of the engine allows together, found "
        f"{', '.join(found_texts)}; build the engine with --shapes for these"
    )


def _nearest(usable: Sequence[tuple[int, Profile]], shapes: Mapping[str, Shape]) -> int:
    if len(usable) == 1:
        return usable[0][0]
    found = nearest_profile(usable, shapes)
    assert found is not None, "parts are made to fit"
    return found


def _even_parts(rows: int, ranges: Sequence[RowRange]) -> Iterator[slice]:
    """Few parts of about one size; where that is too small for a range, full ones and a rest for another."""
    first = 0
    for least, most in sorted(ranges, key=lambda ends: ends[::-1], reverse=True):
        left = rows - first
        count = -(-left // most)
        if left >= least * count:
            yield from (
                slice(first + left * i // count, first + left * (i + 1) // count) for i in range(count)
            )
            return
        for _ in range(left // most):
            yield slice(first, first + most)
            first += most
    texts = " or ".join(f"{least} to {most}" for least, most in ranges)
    raise InputError(
        f"expected batches of {texts} rows or of a multiple that can be split so, found {rows}; build the engine "
        "with wider --shapes"
    )


def _padded_parts(rows: int, sizes: Sequence[int]) -> Iterator[tuple[slice, int | None]]:
    """As many of the largest size as there are, and the rest."""
    for first in range(0, rows, sizes[-1]):
        last = min(first + sizes[-1], rows)
        size = sizes[bisect_left(sizes, last - first)]
        yield slice(first, last), None if size == last - first else size


def _is_allowed(rows: int, ranges: Sequence[RowRange]) -> bool:
    return any(least <= rows <= most for least, most in ranges)


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))
