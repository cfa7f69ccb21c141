"""State dicts: unwrapping, filling a network, and inferring a plain stack of layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lmkan_deploy.errors import CheckpointError
from lmkan_deploy.nn import LMKAN2DLayer

_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts commonly put the state dict."""

_PREFIXES = ("module.", "_orig_mod.")
"""Put before every key by DistributedDataParallel and by torch.compile."""


def unwrap(content: Any) -> dict[str, Tensor] | None:
    """The state dict in a checkpoint's content, or None when there is none."""
    if not isinstance(content, Mapping):
        return None
    for key in _WRAPPERS:
        if isinstance(content.get(key), Mapping):
            return unwrap(content[key])
    if not content or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        return None
    state = dict(content)
    while any(all(key.startswith(prefix) for key in state) for prefix in _PREFIXES):
        state = {key.split(".", 1)[1]: value for key, value in state.items()}
    return state


def fill(module: nn.Module, state: dict[str, Tensor], factory: str) -> None:
    """Loads a state dict into a network.

    Raises:
        CheckpointError: Keys or shapes don't fit; the message names the first of them.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    reshaped = [
        f"{key} (expected {list(own[key].shape)}, found {list(state[key].shape)})"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    problems = [
        f"{name}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for name, keys in (
            ("missing in the checkpoint", missing),
            ("unknown to the network", unexpected),
            ("of another shape", reshaped),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"the state dict does not fit {factory}; {'; '.join(problems)}; check --arch and --arch-args"
        )
    module.load_state_dict(state)


def build_stack(state: dict[str, Tensor]) -> nn.Sequential:
    """Builds the `nn.Sequential` of lookup and BatchNorm layers that a state dict alone determines.

    Raises:
        CheckpointError: The keys are not those of such a stack.
    """
    groups: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = re.fullmatch(r"(\d+)\.([a-z_]+)", key)
        if match is None:
            raise _not_a_stack(f"found the key {key!r}")
        groups.setdefault(int(match[1]), {})[match[2]] = value
    if sorted(groups) != list(range(len(groups))):
        absent = min(set(range(max(groups))) - set(groups), default=0)
        raise _not_a_stack(f"found no state of layer {absent}, so what it computes is unknown")
    stack = nn.Sequential(*(_build_layer(index, groups[index]) for index in sorted(groups)))
    _check_widths(stack)
    return stack


def _build_layer(index: int, state: dict[str, Tensor]) -> nn.Module:
    names = set(state)
    if names == {"func_parameter", "borders"}:
        layer: nn.Module = _build_lookup(index, state["func_parameter"])
    elif (
        {"running_mean", "running_var"}
        <= names
        <= {
            "running_mean",
            "running_var",
            "num_batches_tracked",
            "weight",
            "bias",
        }
    ):
        layer = nn.BatchNorm1d(state["running_mean"].numel(), affine="weight" in names)
    else:
        raise _not_a_stack(f"found layer {index} with {', '.join(sorted(names))}")
    layer.load_state_dict(state, strict=False)
    return layer


def _build_lookup(index: int, table: Tensor) -> LMKAN2DLayer:
    shape = list(table.shape)
    if table.dim() != 4 or shape[0] != shape[1] or shape[0] < 4:
        raise CheckpointError(
            f"expected {index}.func_parameter [G+1, G+1, N_out, N_in/2] with equal grid axes and G >= 3, "
            f"found {shape}"
        )
    return LMKAN2DLayer(shape[0] - 1, 2 * shape[3], shape[2]).to(table.dtype)


def _check_widths(stack: nn.Sequential) -> None:
    width: int | None = None
    for index, layer in enumerate(stack):
        expected = int(layer.input_dim if isinstance(layer, LMKAN2DLayer) else layer.num_features)  # type: ignore[arg-type]
        if width is not None and expected != width:
            raise CheckpointError(
                f"expected layer {index} to take the {width} features of layer {index - 1}, "
                f"found {expected}; pass the network with --arch"
            )
        width = layer.output_dim if isinstance(layer, LMKAN2DLayer) else expected


def _not_a_stack(found: str) -> CheckpointError:
    return CheckpointError(
        "a state dict alone determines a network only when it is an nn.Sequential of LMKAN2DLayer and "
        f"BatchNorm1d (keys 0.func_parameter, 1.running_mean, ...); {found}; pass the network's class or "
        "factory with --arch module:factory"
    )
