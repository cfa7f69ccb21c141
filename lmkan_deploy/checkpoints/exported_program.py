"""`torch.export` archives (.pt2), loaded without running anything that the file says.

PyTorch's own loader evaluates the shape expressions of an archive as Python, looks up the functions it
names anywhere inside `torch`, and falls back to pickle. So the program is checked before it is loaded,
and pickle is off.
"""

from __future__ import annotations

import ast
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lmkan_deploy.checkpoints.input_shapes import BATCH
from lmkan_deploy.errors import CheckpointError
from lmkan_deploy.runtime.tensors import TensorSpec

_SAFE_TARGETS = re.compile(
    r"torch\.ops\.[A-Za-z0-9_]+\.[A-Za-z0-9_]+\.[A-Za-z0-9_]+"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|and_|or_|not_|eq|ne|lt|le|gt|ge|getitem|index)"
    r"|math\.[a-z0-9_]+"
    r"|torch\.sym_[a-z]+"
    r"|torch\._sym_sqrt"
)

_SAFE_EXPRESSION = (
    ast.Expression,
    ast.Call,
    ast.keyword,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.BinOp,
    ast.UnaryOp,
    ast.Compare,
    ast.BoolOp,
    ast.operator,
    ast.unaryop,
    ast.cmpop,
    ast.boolop,
)

_SAFE_CALLS = re.compile(
    r"Symbol|Integer|Rational|Float|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|IntTrueDiv|FloatTrueDiv"
    r"|ModularIndexing|Where|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Abs|floor|ceiling|Pow|PowByNatural|FloatPow"
    r"|TruncToInt|RoundToInt|ToFloat|Identity|OpaqueUnaryFn_[a-z0-9]+|LShift|RShift|Mul|Add"
)


def is_exported_program(path: Path) -> bool:
    """Whether a file is an archive of `torch.export.save`."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return any(name.endswith(("/archive_format", "serialized_exported_program.json")) for name in names)


def load_exported_program(path: Path, *, trust: bool) -> torch.export.ExportedProgram:
    """Loads an archive.

    Args:
        path: A file for which `is_exported_program` holds.
        trust: Whether code in the file may run; without it, an archive that would run some is refused.

    Raises:
        CheckpointError: The archive is damaged, needs trust, or uses operators that are not registered.
    """
    if not trust:
        _check_program(path)
    try:
        if trust:
            return torch.export.load(path)
        with _weights_only():
            return torch.export.load(path)
    except Exception as error:  # PyTorch raises whatever its many parsers raise
        raise CheckpointError(
            f"could not load {path} as a torch.export archive: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}; save it again with this PyTorch, "
            f"{torch.__version__}"
        ) from error


@contextmanager
def _weights_only() -> Iterator[None]:
    """Every torch.load inside the block refuses to unpickle code, whatever its caller asks for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check_program(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            programs = [json.loads(archive.read(name)) for name in archive.namelist() if _is_program(name)]
    except (zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"could not read {path} as a torch.export archive: {error}") from error
    for program in programs:
        for key, value in _strings(program):
            if key == "target" and not _SAFE_TARGETS.fullmatch(value):
                raise _unsafe(path, f"calls {value!r}")
            if key in ("expr_str", "lower", "upper") and not _is_safe_expression(value):
                raise _unsafe(path, f"evaluates {value!r}")


def _is_program(name: str) -> bool:
    return name.endswith("serialized_exported_program.json") or (
        name.endswith(".json") and "/models/" in f"/{name}"
    )


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a JSON document, with the key it stands under."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _strings(child, name)
    elif isinstance(value, list):
        for child in value:
            yield from _strings(child, key)
    elif isinstance(value, str):
        yield key, value


def _is_safe_expression(text: str) -> bool:
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _SAFE_EXPRESSION):
            return False
        if isinstance(node, ast.Call) and not (
            isinstance(node.func, ast.Name) and _SAFE_CALLS.fullmatch(node.func.id)
        ):
            return False
    return True


def _unsafe(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"expected a torch.export archive of registered operators, found that {path} {found}; if you trust "
        "its origin, pass --trust-pickle"
    )


def program_inputs(program: torch.export.ExportedProgram) -> list[TensorSpec]:
    """Inputs of a program. A free axis is called `batch` when it is the only one and comes first.

    Raises:
        CheckpointError: An input is not a tensor.
    """
    placeholders = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    values = {name: placeholders[name] for name in program.graph_signature.user_inputs}
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"expected tensors as inputs, found {name} of {type(value).__name__}")
    free = {
        str(size): axis
        for value in values.values()
        for axis, size in enumerate(value.shape)
        if not isinstance(size, int)
    }
    names = {symbol: BATCH if len(free) == 1 and axis == 0 else symbol for symbol, axis in free.items()}
    return [
        TensorSpec(
            str(name),
            tuple(size if isinstance(size, int) else names[str(size)] for size in value.shape),
            str(value.dtype).removeprefix("torch."),
        )
        for name, value in values.items()
    ]
