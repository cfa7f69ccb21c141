"""Optimization profiles: the smallest, typical and largest shape of each input.

TensorRT tunes an engine for each of its profiles. Several of them serve several kinds of batches well, such as
single rows and thousands, where one would have to be tuned for something between.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lmkan_deploy.errors import EngineError
from lmkan_deploy.runtime.tensors import TensorSpec

DEFAULT_SIZES = (1, 64, 1024)
"""Smallest, typical and largest size of a free axis where the user says nothing."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShapeRange:
    """Shapes of one input.

    Attributes:
        smallest: No axis may be shorter.
        typical: What the engine is tuned for.
        largest: No axis may be longer.
    """

    smallest: Shape
    typical: Shape
    largest: Shape

    def allows(self, shape: Shape, first_axis: int = 0) -> bool:
        """Whether a shape of as many axes is within the range, from an axis on."""
        bounds = zip(self.smallest, shape, self.largest, strict=True)
        return all(low <= size <= high for low, size, high in [*bounds][first_axis:])


Profile = Mapping[str, ShapeRange]
"""Input name -> shapes."""


def make_profiles(specs: Sequence[TensorSpec], texts: Sequence[str]) -> list[Profile]:
    """The profiles that a user describes, at least one.

    Args:
        specs: Inputs of the model.
        texts: Such as `x:1x12,64x12,4096x12`: an input's smallest, typical and largest shape; a single
            shape stands for all three. The second one for an input belongs to the second profile, and so on.
            What is given once holds in all profiles. Inputs that are not named get `DEFAULT_SIZES` in their
            free axes.

    Raises:
        EngineError: A text is malformed, names no input, or contradicts its shape, or the numbers of texts
            differ from input to input.
    """
    given: dict[str, list[ShapeRange]] = {spec.name: [] for spec in specs}
    by_name = {spec.name: spec for spec in specs}
    for text in texts:
        name, _, shapes = text.rpartition(":")
        if name not in given:
            raise EngineError(
                f"expected shapes of an input of {', '.join(given)}, found {text!r}; write them as "
                f"{specs[0].name}:MIN,OPT,MAX, such as {specs[0].name}:1x12,64x12,1024x12"
            )
        given[name].append(_checked(_parse(text, shapes), by_name[name]))
    count = max([len(ranges) for ranges in given.values()], default=1) or 1
    for name, ranges in given.items():
        if len(ranges) not in (0, 1, count):
            raise EngineError(
                f"expected shapes of input {name} once, or for each of the {count} profiles that the shapes of "
                f"another input make, found them {len(ranges)} times"
            )
    full = {spec.name: given[spec.name] or [_default(spec)] for spec in specs}
    profiles: list[Profile] = [
        {name: ranges[number % len(ranges)] for name, ranges in full.items()} for number in range(count)
    ]
    for profile in profiles:
        _check_shared_axes(specs, profile)
    return profiles


def nearest_profile(profiles: Iterable[tuple[int, Profile]], shapes: Mapping[str, Shape]) -> int | None:
    """Which profile is tuned for what is most like some shapes; none where no profile allows them.

    Args:
        profiles: Numbers and profiles; of those that are equally near the first one is taken.
        shapes: Input name -> shape.
    """
    found = [
        (_distance(profile, shapes), number)
        for number, profile in profiles
        if all(profile[name].allows(shape) for name, shape in shapes.items())
    ]
    return min(found)[1] if found else None


def _distance(profile: Profile, shapes: Mapping[str, Shape]) -> float:
    """Ratios count: 100 rows are more like 1000 than like 1."""
    return sum(
        abs(math.log(size / typical))
        for name, shape in shapes.items()
        for size, typical in zip(shape, profile[name].typical, strict=True)
    )


def _parse(text: str, shapes: str) -> ShapeRange:
    parts = shapes.split(",")
    if len(parts) not in (1, 3) or not all(re.fullmatch(r"\d{1,9}(x\d{1,9})*", part) for part in parts):
        raise EngineError(
            f"expected the smallest, typical and largest shape such as 1x12,64x12,1024x12, found {text!r}"
        )
    found = [tuple(int(size) for size in part.split("x")) for part in parts]
    return ShapeRange(*(found if len(found) == 3 else found * 3))


def _checked(shapes: ShapeRange, spec: TensorSpec) -> ShapeRange:
    for shape in (shapes.smallest, shapes.typical, shapes.largest):
        fits = len(shape) == len(spec.shape) and all(
            not isinstance(want, int) or size == want for size, want in zip(shape, spec.shape, strict=True)
        )
        if not fits:
            raise EngineError(f"expected shapes that fit input {spec}, found {'x'.join(map(str, shape))}")
    for low, middle, high in zip(shapes.smallest, shapes.typical, shapes.largest, strict=True):
        if not 0 < low <= middle <= high:
            raise EngineError(
                f"expected sizes of at least 1 that grow from the smallest to the largest shape of input "
                f"{spec.name}, found {low}, {middle}, {high}"
            )
    return shapes


def _check_shared_axes(specs: Sequence[TensorSpec], profile: Profile) -> None:
    """Axes of one name have one size when the engine runs."""
    seen: dict[str, tuple[int, int, str]] = {}  # smallest, largest, which inputs say so
    for spec in specs:
        shapes = profile[spec.name]
        for axis, low, high in zip(spec.shape, shapes.smallest, shapes.largest, strict=True):
            if not isinstance(axis, str):
                continue
            least, most, inputs = seen.get(axis, (low, high, spec.name))
            if max(least, low) > min(most, high):
                raise EngineError(
                    f"expected --shapes that share sizes of axis {axis!r}, found {least} to {most} for {inputs} "
                    f"and {low} to {high} for {spec.name}"
                )
            names = inputs if spec.name in inputs.split(", ") else f"{inputs}, {spec.name}"
            seen[axis] = max(least, low), min(most, high), names


def _default(spec: TensorSpec) -> ShapeRange:
    shapes = [
        tuple(size if isinstance(size, int) else default for size in spec.shape) for default in DEFAULT_SIZES
    ]
    return ShapeRange(*shapes)
