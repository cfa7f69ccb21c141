"""Optimization profiles: the smallest, typical and largest shape of each input."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lmkan_deploy.errors import EngineError
from lmkan_deploy.runtime.tensors import TensorSpec

DEFAULT_SIZES = (1, 64, 1024)
"""Smallest, typical and largest size of a free axis where the user says nothing."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """Shapes of one input.

    Attributes:
        smallest: No axis may be shorter.
        typical: What the engine is tuned for.
        largest: No axis may be longer.
    """

    smallest: Shape
    typical: Shape
    largest: Shape


def make_profiles(specs: Sequence[TensorSpec], texts: Sequence[str]) -> dict[str, Profile]:
    """A profile for each input.

    Args:
        specs: Inputs of the model.
        texts: Such as `x:1x12,64x12,4096x12`: an input's smallest, typical and largest shape; a single
            shape stands for all three. Inputs that are not named get `DEFAULT_SIZES` in their free axes.

    Returns:
        Input name -> profile.

    Raises:
        EngineError: A text is malformed, names no input, or contradicts its shape.
    """
    given: dict[str, Profile] = {}
    names = {spec.name: spec for spec in specs}
    for text in texts:
        name, _, shapes = text.rpartition(":")
        if name not in names:
            raise EngineError(
                f"expected shapes of an input of {', '.join(names)}, found {text!r}; write them as "
                f"{specs[0].name}:MIN,OPT,MAX, such as {specs[0].name}:1x12,64x12,1024x12"
            )
        if name in given:
            raise EngineError(f"expected shapes of input {name} once, found them twice")
        given[name] = _checked(_parse(text, shapes), names[name])
    return {spec.name: given.get(spec.name) or _default(spec) for spec in specs}


def _parse(text: str, shapes: str) -> Profile:
    parts = shapes.split(",")
    if len(parts) not in (1, 3) or not all(re.fullmatch(r"\d{1,9}(x\d{1,9})*", part) for part in parts):
        raise EngineError(
            f"expected the smallest, typical and largest shape such as 1x12,64x12,1024x12, found {text!r}"
        )
    found = [tuple(int(size) for size in part.split("x")) for part in parts]
    return Profile(*(found if len(found) == 3 else found * 3))


def _checked(profile: Profile, spec: TensorSpec) -> Profile:
    for shape in (profile.smallest, profile.typical, profile.largest):
        fits = len(shape) == len(spec.shape) and all(
            not isinstance(want, int) or size == want for size, want in zip(shape, spec.shape, strict=True)
        )
        if not fits:
            raise EngineError(f"expected shapes that fit input {spec}, found {'x'.join(map(str, shape))}")
    for low, middle, high in zip(profile.smallest, profile.typical, profile.largest, strict=True):
        if not 0 < low <= middle <= high:
            raise EngineError(
                f"expected sizes of at least 1 that grow from the smallest to the largest shape of input "
                f"{spec.name}, found {low}, {middle}, {high}"
            )
    return profile


def _default(spec: TensorSpec) -> Profile:
    shapes = [
        tuple(size if isinstance(size, int) else default for size in spec.shape) for default in DEFAULT_SIZES
    ]
    return Profile(*shapes)
