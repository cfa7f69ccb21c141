"""Sizes that the free axes of a model may have, where not all are allowed; kept in the model's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

_KEY = "lmkan_deploy.axis_limits"
"""Metadata: axis -> [smallest, largest or null, step]."""


_NO_SIZE = 1 << 31
"""No axis is as large as this."""


class AxisLimits(NamedTuple):
    """Multiples of a step, from a smallest to a largest size.

    Attributes:
        least: Smallest size.
        most: Largest size; None where there is none.
        step: Sizes are multiples of it.
    """

    least: int = 0
    most: int | None = None
    step: int = 1

    def nearest(self, size: int) -> int:
        """An allowed size: the next one from `size` on, or the largest."""
        steps = -(-max(self.least, size) // self.step)
        return (steps if self.most is None else min(steps, self.most // self.step)) * self.step

    def __str__(self) -> str:
        sizes = "sizes" if self.step == 1 else f"multiples of {self.step}"
        end = "on" if self.most is None else f"to {self.most}"
        return f"{sizes} from {max(self.least, self.step)} {end}"


AnySize = AxisLimits()


def note_limits(metadata: MutableMapping[str, str], limits: Mapping[str, AxisLimits]) -> None:
    """Notes in a model's metadata which sizes its free axes may have; nothing where all may have any."""
    if limits:
        metadata[_KEY] = json.dumps(limits)


def noted_limits(metadata: Mapping[str, str]) -> dict[str, AxisLimits]:
    """What `note_limits` noted, by the names of axes."""
    try:
        entries = json.loads(metadata.get(_KEY, "{}")).items()
        found = {
            name: AxisLimits(int(least), None if most is None else int(most), *map(int, step))
            for name, (least, most, *step) in entries
        }
        return found if all(map(_is_sensible, found.values())) else {}
    except (ValueError, TypeError, AttributeError, OverflowError):  # somebody else's
        return {}


def _is_sensible(limits: AxisLimits) -> bool:
    """Whether tensors of such sizes can be made."""
    return 0 <= limits.least < _NO_SIZE and 1 <= limits.step < _NO_SIZE
