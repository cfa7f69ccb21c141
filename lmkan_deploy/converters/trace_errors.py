"""What PyTorch's tracer and ONNX exporter say about a network, in one line that a user can act on."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in \S+\n\s*(.*)')

_SIZE = re.compile(r"L\['\w+'\](?:\[\w+\])*\.size\(\)\[\d+\]")
"""How PyTorch writes a size in a condition."""


def describe(error: BaseException, program: torch.export.ExportedProgram | None = None) -> str:
    """The reason of a failed export.

    Args:
        error: What was raised; its innermost cause counts, since the exporter wraps errors several times.
        program: The network, where it was traced already.
    """
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = str(error)
    if "data-dependent" in text or "DynamicOutputShape" in type(error).__name__:
        return (
            f"what it computes depends on values of its tensors{_where(error)}, but a model has the same "
            "operations for every input; use torch.where or a mask, or decide outside of the network"
        )
    if text.startswith("Constraints violated"):
        return _describe_axes(text)
    missing = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text)
    if missing is not None:
        return (
            f"ONNX has no operator for {missing[1]}{_where_called(missing[1], program)}; write it with other "
            "operators, or compute it outside of the network"
        )
    # What PyTorch says after the first paragraph is for its own developers.
    reason = " ".join(text.split("\n\n")[0].split()).rstrip(".") or "no message"
    return f"{type(error).__name__}: {reason}{_where(error)}"


def _describe_axes(text: str) -> str:
    """Which free axes are not free, out of PyTorch's report."""
    found = [
        f"the axis {name} can't be free, since the network fixes its size; give it as a number"
        for name in re.findall(r"marked (\w+) as dynamic but your code specialized", text)
    ]
    found += [
        f"the axes {first} and {second} must be equal; give them one name"
        for first, second in re.findall(r"values of (\w+) = .* and (\w+) = .* must always be equal", text)
    ]
    guards: dict[str, list[str]] = {}
    for name, guard in re.findall(r"values of (\w+) = .* satisfy the generated guard (.*)", text):
        guards.setdefault(name, []).append(re.sub(_SIZE, name, guard).rstrip(". "))
    found += [
        f"the axis {name} can't take every size, since the network needs {' and '.join(needs)}; give it as a "
        "number"
        for name, needs in guards.items()
    ]
    return "; ".join(dict.fromkeys(found)) + " in --input-shape" if found else " ".join(text.split())


def _where(error: BaseException) -> str:
    """The user's line that raised an error."""
    frames = traceback.extract_tb(error.__traceback__)
    return _format([(frame.filename, frame.lineno, frame.line) for frame in frames])


def _where_called(operator: str, program: torch.export.ExportedProgram | None) -> str:
    """The user's line that calls an operator; decompositions put underscores before names."""
    name = operator.split(".")[-1].strip("_")
    for node in program.graph.nodes if program is not None else ():
        if name in [part.strip("_") for part in str(node.target).split(".")]:
            return _format(_FRAME.findall(node.meta.get("stack_trace") or ""))
    return ""


def _format(frames: Sequence[tuple[str, int | str | None, str | None]]) -> str:
    ours, pytorch = Path(__file__).parents[1], Path(torch.__file__).parent
    for file, line, code in reversed(frames):
        path = Path(file)
        if path.is_file() and ours not in path.parents and pytorch not in path.parents:
            return f" at {path.name}:{line}, `{code}`"
    return ""
