"""Shapes of a network's inputs: from the command line, or found by trying."""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmkan_deploy.checkpoints.state_dict import one_line
from lmkan_deploy.errors import CheckpointError
from lmkan_deploy.nn import LMKAN2DLayer
from lmkan_deploy.runtime.tensors import Arrays, TensorSpec, random_inputs, rows_are_independent

_DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "bool")

_MAX_ELEMENTS = 1 << 30
"""Of an input; more is a slip of the keyboard."""

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
    if len(parts) > 1 and "," in parts[-2] and parts[-1] not in _DTYPES:
        raise CheckpointError(
            f"expected an element type of {', '.join(_DTYPES)}, found {parts[-1]!r} in {text!r}"
        )
    dtype = parts.pop() if len(parts) > 1 and parts[-1] in _DTYPES else "float32"
    sizes = parts.pop().split(",") if parts else []
    name = parts.pop() if parts else ""
    if parts or not sizes or not all(re.fullmatch(r"[1-9]\d*|[A-Za-z_]\w*", size) for size in sizes):
        raise CheckpointError(
            f"expected an input shape such as batch,12 or x:batch,4,8,8 or ids:batch,16:int64, found {text!r}"
        )
    return TensorSpec(name, tuple(int(size) if size.isdigit() else size for size in sizes), dtype)


def input_specs(module: nn.Module, shapes: Sequence[TensorSpec] = ()) -> list[TensorSpec]:
    """Inputs of a network in the order of its forward's parameters, named after them.

    Args:
        module: The network.
        shapes: What the user said, by name or by position; those of `*args` may have any name. Without
            it, a network with one parameter is tried with [batch, N_in] of its first lookup layer; its rows
            may not depend on each other, since the first axis of a sequence is no batch.

    Raises:
        CheckpointError: The shapes don't match the parameters, or none could be found.
    """
    parameters = _forward_parameters(module)
    if not parameters:
        raise CheckpointError(
            "expected a network with inputs, found a forward without parameters; give it one"
        )
    rest = next((p.name for p in parameters.values() if p.kind == p.VAR_POSITIONAL), None)
    single = {name: p for name, p in parameters.items() if name != rest}
    if not shapes:
        return [_inferred(module, [*_required(single), *([f"*{rest}"] if rest else [])])]
    expected = ", ".join([*single, *([f"*{rest}"] if rest else [])])
    named = [shape.name for shape in shapes if shape.name]
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice is not None:
        raise CheckpointError(f"expected one shape for each input, found two for {twice}; leave one out")
    unknown = [name for name in named if name not in single]
    if unknown and rest is None:
        raise CheckpointError(f"expected inputs of {expected}, found {', '.join(unknown)}; name one of these")
    given = {shape.name: shape for shape in shapes if shape.name in single}
    others = [shape for shape in shapes if shape.name not in single]
    result = []
    for name, parameter in single.items():
        shape = given.get(name)
        if shape is None and parameter.kind != parameter.KEYWORD_ONLY and others and not others[0].name:
            shape = others.pop(0)
        if shape is not None:
            result.append(replace(shape, name=name))
        elif name in _required(single):
            raise CheckpointError(
                f"expected an input shape for each of {expected}, found none for {name}; pass "
                f"--input-shape {name}:batch,..."
            )
    if others and rest is None:
        raise CheckpointError(
            f"expected inputs of {expected}, found {len(others)} shapes too many; leave them out"
        )
    rests = [replace(spec, name=spec.name or f"{rest}{index}") for index, spec in enumerate(others)]
    keywords = [spec for spec in result if single[spec.name].kind == inspect.Parameter.KEYWORD_ONLY]
    return [*(spec for spec in result if spec not in keywords), *rests, *keywords]


def call_arguments(
    module: nn.Module, names: Sequence[str], values: Sequence[Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a network's call, by position as far as its forward's parameters go, then by keyword.

    Args:
        module: The network.
        names: Of its inputs, from `input_specs`; or all inputs of a traced program, in order.
        values: One for each name.
    """
    if isinstance(module, torch.fx.GraphModule):
        args, kwargs = torch.utils._pytree.tree_unflatten(list(values), module._in_spec)
        return tuple(args), kwargs
    parameters = _forward_parameters(module)
    takes_rest = any(p.kind == p.VAR_POSITIONAL for p in parameters.values())
    positions = [name for name, p in parameters.items() if p.kind != p.KEYWORD_ONLY]
    args, kwargs = [], {}
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        by_keyword = name in parameters and parameters[name].kind == inspect.Parameter.KEYWORD_ONLY
        if positions[index : index + 1] == [name] or (takes_rest and not by_keyword):
            args.append(value)
        else:  # a parameter before it has its default
            kwargs[name] = value
    return tuple(args), kwargs


def example_inputs(specs: Sequence[TensorSpec], free_sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
    """Tensors of the inputs' shapes.

    Args:
        specs: The inputs.
        free_sizes: Size of each free axis by name.

    Raises:
        CheckpointError: They are too large.
    """
    generator = torch.Generator().manual_seed(0)
    result = []
    for spec in specs:
        shape = [free_sizes[size] if isinstance(size, str) else size or 1 for size in spec.shape]
        if math.prod(shape) > _MAX_ELEMENTS:
            raise CheckpointError(
                f"expected inputs of at most {_MAX_ELEMENTS:,} elements, found {spec}; check --input-shape"
            )
        dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            result.append(torch.randn(shape, generator=generator).to(dtype))
        else:
            result.append(torch.randint(0, 2, shape, generator=generator).to(dtype))
    return tuple(result)


def _forward_parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """Parameters that can be inputs; `**kwargs` can't."""
    if type(module) is nn.Sequential:
        return {"x": inspect.Parameter("x", inspect.Parameter.POSITIONAL_ONLY)}
    parameters = inspect.signature(module.forward).parameters
    return {name: p for name, p in parameters.items() if p.kind != p.VAR_KEYWORD}


def _required(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    return [name for name, parameter in parameters.items() if parameter.default is parameter.empty]


def _inferred(module: nn.Module, required: list[str]) -> TensorSpec:
    layer = next((m for m in module.modules() if isinstance(m, LMKAN2DLayer)), None)
    if len(required) != 1 or required[0].startswith("*") or layer is None:
        raise CheckpointError(
            f"can't infer the shapes of the inputs {', '.join(required)}; pass --input-shape for each, such as "
            f"--input-shape {required[0].strip('*') if required else 'x'}:batch,12"
        )
    name = required[0]
    dtype = str(layer.func_parameter.dtype).removeprefix("torch.")
    features = 2 * layer.func_parameter.shape[3]  # pickles of older classes lack input_dim
    spec = TensorSpec(name, (BATCH, features), dtype)
    try:
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            outputs = [_leaves(module, name, *example_inputs([spec], {BATCH: size})) for size in (2, 3)]
            depend = _rows_depend(module, spec, outputs)
    except Exception as error:  # any network may raise anything
        raise CheckpointError(
            f"can't infer the shape of the input {name}: the network does not take {spec} "
            f"({type(error).__name__}: {one_line(error)}); pass "
            f"--input-shape, such as --input-shape {name}:batch,3,32,32"
        ) from error
    if depend:
        raise CheckpointError(
            f"can't infer the shape of the input {name}: the rows of {spec} depend on each other, as those of a "
            f"sequence do; pass --input-shape, such as --input-shape {name}:batch,length,{features}, or "
            f"--input-shape {name}:batch,{features} if it is right"
        )
    return spec


def _leaves(module: nn.Module, name: str, x: Tensor) -> list[Any]:
    args, kwargs = call_arguments(module, [name], [x])
    return [leaf for leaf in torch.utils._pytree.tree_leaves(module(*args, **kwargs)) if leaf is not None]


def _rows_depend(module: nn.Module, spec: TensorSpec, outputs: Sequence[list[Any]]) -> bool:
    """Whether an output's row depends on other rows of the input.

    Args:
        module: The network.
        spec: Its input, [batch, features].
        outputs: What it returned for two batches of different sizes.
    """
    if any(not isinstance(leaf, Tensor) for leaf in outputs[0]):
        return False  # refused later
    has_rows = [a.shape[:1] != b.shape[:1] for a, b in zip(*outputs, strict=True)]

    def run(feeds: Arrays) -> Arrays:
        x = torch.from_numpy(feeds[spec.name].astype(np.float32)).to(getattr(torch, spec.dtype))
        leaves = [
            (leaf.double() if leaf.is_floating_point() else leaf).numpy()
            for leaf in _leaves(module, spec.name, x)
        ]
        # What has no rows is the same for each, or depends on them.
        return {
            str(index): leaf if rows else np.broadcast_to(leaf, (len(x), *leaf.shape))
            for index, (leaf, rows) in enumerate(zip(leaves, has_rows, strict=True))
        }

    state = {key: buffer.clone() for key, buffer in module.named_buffers()}
    # Networks that change their state, are random, or fail on one row are refused with the reason later.
    try:
        if rows_are_independent(run, [spec]):
            return False
    except Exception:  # any network may raise anything
        return False
    if not all(torch.equal(state[key], buffer) for key, buffer in module.named_buffers()):
        return False
    x = random_inputs([spec], {None: 2}, np.random.default_rng(0))
    first, second = run(x), run(x)
    return all(np.allclose(first[key], second[key], 1e-3, 1e-3, equal_nan=True) for key in first)
