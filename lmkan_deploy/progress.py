"""What long operations say while they work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """What an operation does now; its text is what `print` shows.

    Attributes:
        text: In words.
        done: How many of `total` are behind it.
        total: How many steps of this kind there are; None where that is not known.
    """

    text: str
    done: int = 0
    total: int | None = None

    def __str__(self) -> str:
        return self.text


Progress = Callable[[Step], None]
"""Called at the beginning of each step."""


def no_progress(_: Step) -> None:
    """Tells nobody."""


class CountedSteps:
    """Tells of steps whose number is known, by counting them."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._begun = 0
        self._total = total

    def begin(self, text: str) -> None:
        """Begins the next step."""
        self._progress(Step(text, self._begun, self._total))
        self._begun += 1
