"""A call of the network before it is traced: mistakes that show here have clearer messages than in the tracer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from lmkan_deploy.converters.trace_errors import describe
from lmkan_deploy.errors import ExportError


def check_call(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Calls a network twice.

    Raises:
        ExportError: It fails, returns something else than tensors, or does not give the same answer twice.
    """
    try:
        _call_twice(module, args, kwargs, "put layers such as BatchNorm into eval mode", "")
    except _CallError as error:
        raise ExportError(
            f"the network does not take its inputs: {error}; check --input-shape, whose example "
            f"inputs have the shapes {', '.join(str(list(x.shape)) for x in (*args, *kwargs.values()))}"
        ) from error


def check_program(program: torch.export.ExportedProgram) -> None:
    """Calls a traced network twice on the inputs that it was traced with, where it has them.

    Raises:
        ExportError: See `check_call`.
    """
    if program.example_inputs is None:
        return
    args, kwargs = program.example_inputs
    eval_mode = "trace the network in eval mode: call model.eval() before torch.export.export"
    try:
        _call_twice(program.module(), args, kwargs, eval_mode, f"{eval_mode}, ")
    except _CallError as error:
        raise ExportError(
            f"the network does not take the inputs that it was traced with: {error}; trace it again"
        ) from error


class _CallError(Exception):
    """A network raised something when it was called."""


def _call_twice(
    module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], against_state: str, against_chance: str
) -> None:
    """Raises ExportError with this advice where the calls differ, or what they return is no tensor."""
    try:
        with torch.no_grad():
            first = _call(module, args, kwargs)
            state = {name: buffer.clone() for name, buffer in module.named_buffers()}
            second = _call(module, args, kwargs)
    except Exception as error:  # the user's network may raise anything
        raise _CallError(describe(error)) from error
    leaves = _pytree.tree_leaves(first)
    check_outputs(leaves)
    # What is made at the first call, such as a cache of positions, may stay.
    changed = [name for name, b in module.named_buffers() if not _agree(state.get(name), b, tolerance=0.0)]
    if changed:
        raise ExportError(
            f"expected a network that keeps its state, found that each call changes {', '.join(changed[:3])}; "
            f"{against_state}, or pass the state as an input and return it"
        )
    if not all(map(_agree, leaves, _pytree.tree_leaves(second))):
        raise ExportError(
            "expected a network that gives the same answers at every call, found others at the second, so "
            f"it is random or counts its calls; {against_chance}call dropout with training=self.training, and "
            "pass random numbers as an input"
        )


def _call(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """On copies of the tensors, since networks may change their inputs."""
    own_args, own_kwargs = _pytree.tree_map_only(Tensor, Tensor.clone, (tuple(args), kwargs))
    return module(*own_args, **own_kwargs)


def check_outputs(leaves: Sequence[Any]) -> None:
    """Checks that a network returns tensors; None beside them is left out of the model.

    Raises:
        ExportError: It returns something else, or nothing.
    """
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor) and leaf is not None]
    if others:
        found = type(others[0])
        name = found.__name__ if found.__module__ == "builtins" else f"{found.__module__}.{found.__name__}"
        hint = (
            "leave it out of what forward returns"
            if found.__module__ == "builtins"
            else f"return a dict, or call torch.export.register_dataclass({found.__name__})"
        )
        raise ExportError(
            f"expected a network that returns tensors, or a tuple, list or dict of tensors, found {name} among "
            f"its outputs; {hint}"
        )
    if all(leaf is None for leaf in leaves):
        raise ExportError("expected a network that returns tensors, found none among its outputs")


def _agree(first: Any, second: Any, tolerance: float = 1e-3) -> bool:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return first is second
    close = first.shape == second.shape and torch.isclose(
        first.double(), second.double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )
    return bool(torch.as_tensor(close).all())
