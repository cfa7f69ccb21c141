"""What commands print: progress on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from lmkan_deploy.api import Progress


@contextlib.contextmanager
def show_progress(hidden: bool) -> Iterator[Progress]:
    """A spinner with the current step, on stderr and only in a terminal. What the user's network prints goes
    there too: stdout holds the result alone.
    """
    if hidden or not sys.stderr.isatty():
        with contextlib.redirect_stdout(sys.stderr):
            yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    # The stream itself, since PyTorch's part of the work runs with another sys.stderr.
    console = Console(file=sys.stderr)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with (
        contextlib.redirect_stdout(sys.stderr),
        RichProgress(*columns, console=console, transient=True) as bar,
    ):
        task = bar.add_task("starting")
        yield lambda step: bar.update(task, description=step)


def print_json(value: Any) -> None:
    """Prints a value for other programs; NaN and infinite numbers become strings."""
    typer.echo(json.dumps(_without_nan(value), indent=2, allow_nan=False))


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinities: they become strings, as in protobuf's JSON."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    return value
