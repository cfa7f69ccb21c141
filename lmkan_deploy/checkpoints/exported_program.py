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
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lmkan_deploy.checkpoints.input_shapes import BATCH
from lmkan_deploy.checkpoints.state_dict import one_line
from lmkan_deploy.errors import CheckpointError
from lmkan_deploy.runtime.axis_limits import AxisLimits
from lmkan_deploy.runtime.tensors import TensorSpec

_SAFE_FILES = re.compile(
    r"[^/]+/(archive_format|archive_version|byteorder|\.data/\w+|models/\w+\.json"
    r"|data/weights/(weight_\d+|\w+_weights_config\.json)"
    r"|data/constants/(tensor_\d+|\w+_constants_config\.json)"
    r"|data/sample_inputs/\w+\.pt)"
)
"""What `torch.export.save` writes for a network of tensors; compiled code and pickled objects are not in it."""

_SAFE_TARGETS = re.compile(
    r"torch\.ops\.(aten|lmkan)\.\w+\.\w+"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|and_|or_|not_|eq|ne|lt|le|gt|ge|getitem|index)"
    r"|math\.[a-z0-9_]+"
    r"|torch\.sym_[a-z]+"
    r"|torch\._sym_sqrt"
)

_UNSAFE_OPERATORS = re.compile(r"torch\.ops\.aten\.(from_file|_?save|_?load)\w*\..*")
"""Operators that reach beyond tensors."""

_SAFE_TEXT = re.compile(r"[\w.+\-*/ ]*")
"""Names of inputs, weights and nodes, which PyTorch writes into source code that it executes: nothing that
could call, quote or assign. Sizes such as 2*s77 are names too."""

_CHECKED_ELSEWHERE = ("expr_str", "lower", "upper", "in_spec", "out_spec")
_DESCRIPTIONS = ("stack_trace", "nn_module_stack", "torch_fn", "from_node", "custom")
"""Metadata that the loader reads as text."""

_SAFE_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict")

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
    endings = ("/archive_format", "serialized_exported_program.json")
    return any(name.endswith(endings) for name in archive_names(path))


def archive_names(path: Path) -> list[str]:
    """Names of the files in a zip archive; none where a file is no such archive.

    Raises:
        CheckpointError: Its directory is damaged.
    """
    try:
        if not zipfile.is_zipfile(path):
            return []
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, struct.error) as error:
        raise CheckpointError(
            f"expected a PyTorch checkpoint, found that the directory of the archive {path} is damaged "
            f"({one_line(error)}); copy it again, or save it again"
        ) from error


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
            names = archive.namelist()
            # Other spellings of a name, or one name twice, could show the loader another file than this check.
            if len({name.lower() for name in names}) != len(names):
                raise _unsafe(path, "holds one file name twice")
            for name in names:
                if not _SAFE_FILES.fullmatch(name):
                    raise _unsafe(path, f"holds {name!r}")
            documents = [json.loads(archive.read(name)) for name in names if name.endswith(".json")]
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"could not read {path} as a torch.export archive: {one_line(error)}; copy it again, or save it again"
        ) from error
    for document in documents:
        for key, value in _entries(document):
            found = _why_unsafe(key, value)
            if found is not None:
                raise _unsafe(path, found)


def _why_unsafe(key: str, value: Any) -> str | None:
    """What a JSON entry could make the loader run, None for a harmless one."""
    if key == "use_pickle" and value is not False:
        return "holds pickled tensors"
    if key == "forward_arg_names" and value is not None and not str(value).isidentifier():
        return f"names an argument {value!r}"
    if key in ("in_spec", "out_spec") and value is not None:
        return _why_unsafe_tree(value)
    if not isinstance(value, str):
        return None
    if key not in (*_CHECKED_ELSEWHERE, *_DESCRIPTIONS) and not _SAFE_TEXT.fullmatch(value):
        return f"holds the text {value!r}"
    if key == "target" and (not _SAFE_TARGETS.fullmatch(value) or _UNSAFE_OPERATORS.fullmatch(value)):
        return f"calls {value!r}"
    if key in ("expr_str", "lower", "upper") and not _is_safe_expression(value):
        return f"evaluates {value!r}"
    return None


def _why_unsafe_tree(text: Any) -> str | None:
    """Structures of inputs and outputs may name classes to import, and enumerations to look up in them."""
    try:
        document = json.loads(text)
    except (TypeError, ValueError):
        return f"describes its inputs or outputs as {text!r}"
    for key, value in _entries(document):
        if key == "type" and value not in _SAFE_CONTAINERS:
            return f"has inputs or outputs of type {value!r}"
        if "enum" in key or (isinstance(value, str) and "enum" in value):
            return "has enumerations among its inputs or outputs"
    return None


def _entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a JSON document that is not a container, with the key it stands under; and
    every key, under none.
    """
    if isinstance(value, dict):
        for name, child in value.items():
            yield "", name
            yield from _entries(child, name)
    elif isinstance(value, list):
        for child in value:
            yield from _entries(child, key)
    else:
        yield key, value


def _is_safe_expression(text: str) -> bool:
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    # sympy evaluates a string that it meets as an argument, so only names of symbols may be strings.
    names = set()
    for node in ast.walk(tree):
        if not isinstance(node, _SAFE_EXPRESSION):
            return False
        if isinstance(node, ast.Call):
            if not (isinstance(node.func, ast.Name) and _SAFE_CALLS.fullmatch(node.func.id)):
                return False
            if node.func.id == "Symbol" and len(node.args) == 1 and isinstance(node.args[0], ast.Constant):
                names.add(id(node.args[0]))
        if isinstance(node, ast.Name) and "__" in node.id:
            return False
    return all(
        isinstance(node.value, bool | int | float) or (id(node) in names and str(node.value).isidentifier())
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
    )


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
    values = _inputs(program)
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"expected tensors as inputs, found {name} of {type(value).__name__}; {_TRACE_TENSORS}"
            )
    names = _axis_names(values)
    return [
        TensorSpec(
            name,
            tuple(size if isinstance(size, int) else names[str(size)] for size in value.shape),
            str(value.dtype).removeprefix("torch."),
        )
        for name, value in values.items()
    ]


def program_limits(program: torch.export.ExportedProgram) -> dict[str, AxisLimits]:
    """Sizes that bounded free axes may have, by their names in `program_inputs`."""
    names = _axis_names(_inputs(program))
    limits = {}
    for symbol, found in program.range_constraints.items():
        least = int(found.lower) if found.lower.is_Integer else 1
        most = int(found.upper) if found.upper.is_Integer else None  # infinity is none
        if str(symbol) in names and (least > 1 or most is not None):
            limits[names[str(symbol)]] = AxisLimits(max(least, 1), most)
    return limits


_TRACE_TENSORS = (
    "trace the network again without it, so that it has its default, or inside a module whose forward takes the "
    "tensors alone and passes it on"
)


def _inputs(program: torch.export.ExportedProgram) -> dict[str, Any]:
    """Placeholders' values by name.

    Raises:
        CheckpointError: An input is a constant of the trace.
    """
    placeholders = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    inputs = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind != torch.export.graph_signature.InputKind.USER_INPUT:
            continue
        if isinstance(spec.arg, torch.export.graph_signature.ConstantArgument):
            raise CheckpointError(
                f"expected tensors as inputs, found {spec.arg.name} with the constant {spec.arg.value!r}; "
                f"{_TRACE_TENSORS}"
            )
        inputs[spec.arg.name] = placeholders[spec.arg.name]
    return inputs


def _axis_names(values: Mapping[str, Any]) -> dict[str, str]:
    """Symbol of a free axis -> its name."""
    free = {
        str(size): axis
        for value in values.values()
        for axis, size in enumerate(value.shape)
        if not isinstance(size, int)
    }
    return {symbol: BATCH if len(free) == 1 and axis == 0 else symbol for symbol, axis in free.items()}
