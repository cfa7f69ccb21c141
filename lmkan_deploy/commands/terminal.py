"""What commands print: progress on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import typer

from lmkan_deploy.progress import Progress, Step, no_progress


@contextlib.contextmanager
def show_progress(hidden: bool) -> Iterator[Progress]:
    """A bar with the current step, on stderr and only in a terminal. What the user's network prints goes
    there too: stdout holds the result alone.
    """
    if hidden or not sys.stderr.isatty():
        with contextlib.redirect_stdout(sys.stderr):
            yield no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    # The stream itself, since PyTorch's part of the work runs with another sys.stderr.
    console = Console(file=sys.stderr)
    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with (
        contextlib.redirect_stdout(sys.stderr),
        RichProgress(*columns, console=console, transient=True) as bar,
    ):
        bar.add_task("starting", total=None, count="")
        (task,) = bar.tasks

        def show(step: Step) -> None:
            task.total = step.total  # None moves the bar to and fro
            count = "" if step.total is None else f"{step.done}/{step.total}"
            bar.update(task.id, description=step.text, completed=step.done, count=count)

        yield show


class _Output(io.FileIO):
    """A standard stream; what a reader that has ended, such as head, does not take is dropped."""

    _broken = False

    def write(self, data: Any) -> int:
        if not self._broken:
            try:
                return super().write(data)
            except OSError as error:
                self._broken = True
                # A full disk loses the result, but no message is worth an error of its own.
                if self.fileno() == 1 and not isinstance(error, BrokenPipeError):
                    raise
        return len(data)


def keep_output_open() -> None:
    """Keeps what becomes of stdout and stderr from changing what a command does: each may be closed, by its
    reader or from the start.
    """
    # Or the next file that is opened would be stdin, stdout or stderr, and get what libraries write there.
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(null, True)
    os.close(null)
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        if old is not getattr(sys, f"__{name}__"):  # somebody else's
            continue
        raw = _Output(number, "w", closefd=False)
        if old is None:
            stream = io.TextIOWrapper(io.BufferedWriter(raw), "utf-8")
        else:
            options = {"line_buffering": old.line_buffering, "write_through": old.write_through}
            # A character that the terminal has no code for becomes "?", rather than an error.
            errors = "replace" if old.errors in ("strict", "surrogateescape") else old.errors
            stream = io.TextIOWrapper(io.BufferedWriter(raw), old.encoding, errors, **options)
        setattr(sys, name, stream)


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
