"""Traces a network whose inputs have free axes, and finds out which sizes these may have."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from lmkan_deploy.checkpoints.exported_program import program_limits
from lmkan_deploy.checkpoints.input_shapes import call_arguments, example_inputs
from lmkan_deploy.converters.trace_errors import describe
from lmkan_deploy.converters.trial import check_call
from lmkan_deploy.errors import CheckpointError, ExportError
from lmkan_deploy.runtime.axis_limits import AnySize, AxisLimits
from lmkan_deploy.runtime.tensors import TensorSpec

_TRACE_SIZE = 4
"""Size of the first free axis while tracing; the others have its multiples, lest PyTorch take two for one.
0 and 1 are special to it.
"""

_LARGER_TRACE_SIZES = (48, 60, 140)
"""Instead of it, for axes other than the first where the network does not take small sizes, or not every size:
strides make images smaller, and patches divide them.
"""

_LARGEST_STEP = 64


def trace(
    module: nn.Module, inputs: Sequence[TensorSpec]
) -> tuple[torch.export.ExportedProgram, dict[str, AxisLimits]]:
    """Traces a network.

    Args:
        module: In eval mode.
        inputs: Its inputs in the order of its forward's parameters.

    Returns:
        The program, and the limits of those free axes that can't have every size, by name.

    Raises:
        ExportError: The network can't be called or traced, or fixes the size of a free axis.
    """
    free = list(dict.fromkeys(size for spec in inputs for size in spec.shape if isinstance(size, str)))
    sizes = {name: _TRACE_SIZE * (index + 1) for index, name in enumerate(free)}
    try:
        return _export(module, inputs, sizes, ()), {}
    except Exception as error:  # tracing runs the user's code, which may raise anything
        found = _trace_larger(module, inputs, sizes, _limited_axes(error, sizes))
        if found is not None:
            return found
        if isinstance(error, ExportError | CheckpointError):
            raise
        raise ExportError(f"PyTorch could not trace the network: {describe(error)}") from error


def find_limits(program: torch.export.ExportedProgram, inputs: Sequence[TensorSpec]) -> dict[str, AxisLimits]:
    """Limits of a traced program's free axes, by name: bounds out of the trace, and steps that trying finds.

    Args:
        program: From `torch.export`.
        inputs: Its inputs, in order.
    """
    limits = program_limits(program)
    if program.example_inputs is None:
        return limits
    examples = torch.utils._pytree.tree_leaves(program.example_inputs)
    sizes = {
        name: size
        for spec, example in zip(inputs, examples, strict=True)
        for name, size in zip(spec.shape, example.shape, strict=True)
        if isinstance(name, str)
    }
    module = program.module()
    for name in sizes:
        found = _with_step(module, inputs, sizes, name, limits.get(name, AxisLimits(2)))
        if found is not None and found != AxisLimits(2):
            limits[name] = found
    return limits


def _limited_axes(error: Exception, sizes: Mapping[str, int]) -> list[str] | None:
    """Which axes can't have every size; None where an error says something else."""
    violated = re.match(r"Constraints violated \(([^)]*)\)", str(error))
    if violated is None or "must always be equal" in str(error):
        return None
    return [name for name in re.split(r",\s*", violated[1]) if name in sizes]


def _trace_larger(
    module: nn.Module, inputs: Sequence[TensorSpec], sizes: Mapping[str, int], limited: list[str] | None
) -> tuple[torch.export.ExportedProgram, dict[str, AxisLimits]] | None:
    """Traces on larger examples, and finds the limits of axes that can't have every size.

    Args:
        module: The network.
        inputs: Its inputs.
        sizes: Of the free axes, with which tracing failed.
        limited: Axes that can't have every size, as far as known; None where the failure was another one.

    Returns:
        As `trace`; None where it fails again.
    """
    first, *others = sizes or [""]
    for base in _LARGER_TRACE_SIZES if others else ():
        larger = {name: base * (index + 1) for index, name in enumerate(others)}
        larger = {first: sizes[first], **larger}
        if not _takes(module, inputs, larger):
            continue
        try:
            program = _export(module, inputs, larger, limited or ())
        except Exception as error:  # what was wrong at first says more
            found = _limited_axes(error, sizes)
            if limited is not None or not found:
                return None
            return _trace_larger(module, inputs, sizes, found)
        ranges = _ranges(program, inputs)
        limits = {
            name: _with_step(module, inputs, larger, name, ranges.get(name, AnySize))
            for name in limited or ()
        }
        known = {name: found for name, found in limits.items() if found is not None}
        return (program, known) if len(known) == len(limits) else None
    return None


def _export(
    module: nn.Module, inputs: Sequence[TensorSpec], sizes: Mapping[str, int], limited: Collection[str]
) -> torch.export.ExportedProgram:
    """Traces on examples of these sizes; the tracer itself finds the limits of the limited axes."""
    dims = {name: torch.export.Dim.DYNAMIC if name in limited else torch.export.Dim(name) for name in sizes}
    dynamic = [
        {axis: dims[name] for axis, name in enumerate(spec.shape) if isinstance(name, str)} for spec in inputs
    ]
    names = [spec.name for spec in inputs]
    args, kwargs = call_arguments(module, names, example_inputs(inputs, sizes))
    dynamic_args, dynamic_kwargs = call_arguments(module, names, dynamic)
    # By parameter, since forward may take *args, and has defaults for what is no input.
    shapes = inspect.signature(module.forward).bind(*dynamic_args, **dynamic_kwargs).arguments
    check_call(module, args, kwargs)
    return torch.export.export(module, args, kwargs, dynamic_shapes=dict(shapes))


def _ranges(program: torch.export.ExportedProgram, inputs: Sequence[TensorSpec]) -> dict[str, AxisLimits]:
    """What the tracer found of each free axis."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    ranges = {}
    for input_name, spec in zip(program.graph_signature.user_inputs, inputs, strict=True):
        for size, name in zip(values[str(input_name)].shape, spec.shape, strict=True):
            found = next((r for s, r in program.range_constraints.items() if str(s) == str(size)), None)
            if isinstance(name, str) and found is not None:
                most = int(found.upper) if found.upper.is_Integer else None  # infinity is none
                ranges[name] = AxisLimits(int(found.lower), most)
    return ranges


def _with_step(
    module: nn.Module, inputs: Sequence[TensorSpec], sizes: Mapping[str, int], name: str, limits: AxisLimits
) -> AxisLimits | None:
    """The step with which the network takes sizes as large as those given, and the smallest that it takes."""
    for step in range(1, _LARGEST_STEP + 1):
        stepped = limits._replace(step=step)
        enough = stepped.nearest(sizes[name])
        tried = {enough, stepped.nearest(enough + 1)}
        if all(_takes(module, inputs, {**sizes, name: size}) for size in tried):
            # Means of nothing are no errors, but not answers either.
            finite = _is_finite(module, inputs, {**sizes, name: enough})
            smaller = range(stepped.nearest(limits.least), enough, step)
            answers = _is_finite if finite else _takes
            least = next((s for s in smaller if answers(module, inputs, {**sizes, name: s})), enough)
            return stepped._replace(least=least)
    return None


def _takes(module: nn.Module, inputs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> bool:
    return _outputs(module, inputs, sizes) is not None


def _is_finite(module: nn.Module, inputs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> bool:
    """Whether all outputs have elements, and only finite ones."""
    outputs = _outputs(module, inputs, sizes)
    return outputs is not None and all(y.numel() > 0 and bool(torch.isfinite(y).all()) for y in outputs)


def _outputs(
    module: nn.Module, inputs: Sequence[TensorSpec], sizes: Mapping[str, int]
) -> list[torch.Tensor] | None:
    """What the network returns for examples of these sizes; None where it does not take them."""
    try:
        values = example_inputs(inputs, sizes)
        args, kwargs = call_arguments(module, [spec.name for spec in inputs], values)
        with torch.no_grad():
            leaves = torch.utils._pytree.tree_leaves(module(*args, **kwargs))
    except CheckpointError:
        raise
    except Exception:  # any network may raise anything
        return None
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
