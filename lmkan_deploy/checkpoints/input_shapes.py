"""Shapes of a network's inputs: from the command line, or found by trying."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lmkan_deploy.errors import CheckpointError
from lmkan_deploy.nn import LMKAN2DLayer
from lmkan_deploy.runtime.tensors import TensorSpec

_DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "bool")

BATCH = "batch"
"""Name of the free first axis of an inferred input."""


def parse_input_shape(text: str) -> TensorSpec:
    """Reads `[name:]size,size,...[:dtype]`; a size that is a word names a free axis.

    Examples: `batch,12`, `x:batch,4,8,8`, `ids:batch,16:int64`.

    Returns:
        The shape; its name is empty where none is given.

    Raises:
        CheckpointError: The text has another form.
    """
    parts = text.split(":")
    dtype = parts.pop() if len(parts) > 1 and parts[-1] in _DTYPES else "float32"
    sizes = parts.pop().split(",") if parts else []
    name = parts.pop() if parts else ""
    if parts or not sizes or not all(re.fullmatch(r"[1-9]\d*|[A-Za-z_]\w*", size) for size in sizes):
        raise CheckpointError(
            f"expected an input shape such as batch,12 or x:batch,4,8,8 or ids:batch,16:int64, found {text!r}"
        )
    return TensorSpec(name, tuple(int(size) if size.isdigit() else size for size in sizes), dtype)


def input_specs(module: nn.Module, shapes: Sequence[TensorSpec] = ()) -> list[TensorSpec]:
    """Inputs of a network, named after its forward's parameters.

    Args:
        module: The network.
        shapes: What the user said, by name or by position. Without it, a network with one parameter is
            tried with [batch, N_in] of its first lookup layer.

    Raises:
        CheckpointError: The shapes don't match the parameters, or none could be found.
    """
    parameters = _forward_parameters(module)
    if not shapes:
        return [_inferred(module, parameters)]
    named = {shape.name: shape for shape in shapes if shape.name}
    positional = [shape for shape in shapes if not shape.name]
    unknown = [name for name in named if name not in parameters]
    result = []
    for name, required in parameters.items():
        if name in named:
            result.append(named[name])
        elif positional:
            shape = positional.pop(0)
            result.append(TensorSpec(name, shape.shape, shape.dtype))
        elif required:
            raise CheckpointError(
                f"expected an input shape for each of {', '.join(parameters)}, found none for {name}; pass "
                f"--input-shape {name}:batch,..."
            )
    if unknown or positional:
        raise CheckpointError(
            f"expected inputs of {', '.join(parameters)}, found "
            f"{', '.join(unknown) or f'{len(positional)} shapes too many'}"
        )
    return result


def example_inputs(specs: Sequence[TensorSpec], free_size: int) -> tuple[Tensor, ...]:
    """Tensors of the inputs' shapes, every free axis of one size."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for spec in specs:
        shape = [size if isinstance(size, int) else free_size for size in spec.shape]
        dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            result.append(torch.randn(shape, generator=generator).to(dtype))
        else:
            result.append(torch.randint(0, 2, shape, generator=generator).to(dtype))
    return tuple(result)


def _forward_parameters(module: nn.Module) -> dict[str, bool]:
    """Name -> whether it is required."""
    if type(module) is nn.Sequential:
        return {"x": True}
    result = {}
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        result[name] = parameter.default is parameter.empty
    return result


def _inferred(module: nn.Module, parameters: dict[str, bool]) -> TensorSpec:
    required = [name for name, is_required in parameters.items() if is_required]
    layer = next((m for m in module.modules() if isinstance(m, LMKAN2DLayer)), None)
    if len(required) != 1 or layer is None:
        raise CheckpointError(
            f"can't infer the shapes of the inputs {', '.join(required)}; pass --input-shape for each, such as "
            f"--input-shape {required[0] if required else 'x'}:batch,12"
        )
    dtype = str(layer.func_parameter.dtype).removeprefix("torch.")
    spec = TensorSpec(required[0], (BATCH, layer.input_dim), dtype)
    try:
        with torch.no_grad():
            for size in (2, 3):
                module(*example_inputs([spec], size))
    except Exception as error:  # any network may raise anything
        raise CheckpointError(
            f"can't infer the shape of the input {required[0]}: the network does not take {spec} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}); pass "
            f"--input-shape, such as --input-shape {required[0]}:batch,3,32,32"
        ) from error
    return spec
