"""State dicts: unwrapping, filling a network, and inferring a plain stack of layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lmkan_deploy.errors import CheckpointError
from lmkan_deploy.nn import LMKAN2DLayer
from lmkan_deploy.spec import MIN_NUM_GRIDS

_T = TypeVar("_T")

_PREFIXES = ("module.", "_orig_mod.")
"""Put before every key by DistributedDataParallel and by torch.compile."""

_DEPTH = 3
"""How many dicts deep a state dict may lie."""

_TABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unwrap(content: Any, path: Path, key: str | None = None) -> dict[str, Tensor] | nn.Module:
    """The one network in a checkpoint's content: itself, or in dicts that a training script put around it.

    Args:
        content: What the file holds.
        path: The file, for messages.
        key: Where it lies, where there are several: keys of dicts, joined by dots.

    Returns:
        A state dict, or the module where the file holds one.

    Raises:
        CheckpointError: There is none, there are several, or one holds tensors that can't be read.
    """
    found = list(_networks(content, ()))
    if key is not None:
        paths = [".".join(keys) or "the file itself" for keys, _ in found]
        found = _under(key, found)
        if not found:
            known = (
                f"networks under {', '.join(paths[:5])}; pass one of these"
                if paths
                else f"{_described(content)}; save model.state_dict()"
            )
            raise CheckpointError(
                f"expected a network under --key {key or repr(key)} in {path}, found {known}"
            )
    # Beside the network, scripts save other tensors by name, such as the statistics of the data.
    found = [(keys, network) for keys, network in found if _has_tables(network)] or found
    if len(found) > 1:
        places = ", ".join(".".join(keys) for keys, _ in found[:5])
        which = "the one" if key is None else "all of the path of the one"
        raise CheckpointError(
            f"expected one network in {path}, found several, under {places}; pass --key with {which} to export"
        )
    if not found:
        raise CheckpointError(
            f"expected a state dict or a module in {path}, found {_described(content)}; save model.state_dict()"
        )
    network = found[0][1]
    if isinstance(network, nn.Module):
        return network
    for name, value in network.items():
        _check_readable(name, value)
    return _without_prefixes(dict(network))


def _without_prefixes(entries: dict[str, _T]) -> dict[str, _T]:
    """Entries under their keys without what wrappers put before all of them."""
    averaged = {key: value for key, value in entries.items() if key != "n_averaged"}
    if averaged and all(key.startswith("module.") for key in averaged):  # of AveragedModel
        entries = averaged
    while entries and any(all(key.startswith(prefix) for key in entries) for prefix in _PREFIXES):
        entries = {key.split(".", 1)[1]: value for key, value in entries.items()}
    return entries


_Network = Mapping[str, Tensor] | nn.Module


def _networks(content: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], _Network]]:
    """Every module and state dict inside a checkpoint's content, with the keys that lead to it."""
    if isinstance(content, nn.Module):
        yield keys, content
    if isinstance(content, list | tuple):
        content = {str(index): value for index, value in enumerate(content) if not isinstance(value, Tensor)}
    if not isinstance(content, Mapping) or not content or not all(isinstance(key, str) for key in content):
        return
    if all(isinstance(value, Tensor) for value in content.values()):
        yield keys, content
    elif len(keys) < _DEPTH:
        for key, value in content.items():
            yield from _networks(value, (*keys, key))


def _under(
    key: str, found: Sequence[tuple[tuple[str, ...], _Network]]
) -> list[tuple[tuple[str, ...], _Network]]:
    """What lies under a key: the network of this path, or else those below it, or else the part of a state dict
    whose own keys begin with the rest of it; or else what the key is the end of, such as `model` for what lies
    under `state_dict.model`.
    """
    exact = [(keys, network) for keys, network in found if ".".join(keys) == key]
    below = [(keys, network) for keys, network in found if ".".join(keys).startswith(f"{key}.")]
    if exact or below or not key:
        return exact[:1] or below
    parts = [part for keys, network in found for part in _part(key, keys, network, 0)]
    if parts:
        return parts
    ends = [(keys, network) for keys, network in found if ".".join(keys).endswith(f".{key}")]
    return ends or [
        part
        for keys, network in found
        for left_out in range(1, len(keys) + 1)
        for part in _part(key, keys, network, left_out)
    ]


def _part(
    key: str, keys: tuple[str, ...], network: _Network, left_out: int
) -> list[tuple[tuple[str, ...], _Network]]:
    """What of a state dict lies under a key that may lack the first parts of its path; one or none."""
    path = "".join(f"{each}." for each in keys[left_out:])
    if isinstance(network, nn.Module) or not key.startswith(path):
        return []
    rest = key.removeprefix(path).removesuffix(".")
    for entries in (network, _without_prefixes(dict(network))):
        part = {k.removeprefix(f"{rest}."): v for k, v in entries.items() if k.startswith(f"{rest}.")}
        if part:
            return [((*keys, rest), part)]
    return []


def _has_tables(network: _Network) -> bool:
    state = network.state_dict() if isinstance(network, nn.Module) else network
    return any(map(_is_table, state))


def _is_table(key: str) -> bool:
    return key.split(".")[-1] == "func_parameter"


def _described(content: Any) -> str:
    found = _with_article(type(content).__name__)
    if not isinstance(content, Mapping):
        return found
    if not content:
        return f"{found} without keys"
    if any(isinstance(value, Tensor) for value in content.values()):
        for key, value in content.items():
            if not isinstance(key, str):
                return f"the key {key!r} of type {type(key).__name__}"
            if not isinstance(value, Tensor):
                return f"{key!r} of type {type(value).__name__} beside tensors"
    return f"{found} with the keys {', '.join(map(repr, list(content)[:5]))}"


def _with_article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _check_readable(key: str, value: Tensor) -> None:
    found = None
    if value.is_meta:
        found = "one without data, of the meta device"
    elif value.layout != torch.strided:
        found = f"a {str(value.layout).removeprefix('torch.')} one"
    elif value.is_quantized:
        found = "a quantized one"
    elif _is_table(key) and value.dtype not in (*_TABLE_DTYPES, torch.float64):
        found = f"one of {str(value.dtype).removeprefix('torch.')}"
    elif _is_table(key) and _is_repeated(value):
        found = f"one of {list(value.shape)} in {value.untyped_storage().nbytes()} bytes"
    if found is not None:
        raise CheckpointError(
            f"expected {key} as a dense tensor of {'floating point' if _is_table(key) else 'numbers'}, "
            f"found {found}; save the state dict of the trained network itself"
        )


def _is_repeated(value: Tensor) -> bool:
    """Whether a tensor shows the same memory several times, which costs no space in the file."""
    return value.untyped_storage().nbytes() < value.numel() * value.itemsize


def fill(module: nn.Module, state: dict[str, Tensor], factory: str) -> list[str]:
    """Loads a state dict into a network.

    Its keys may lie under the name that the network had in another module: `model.` of a LightningModule.

    Returns:
        Notes for the user.

    Raises:
        CheckpointError: Keys or shapes don't fit; the message names the first of them.
    """
    own = module.state_dict()
    state, notes = _select(state, own, factory)
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
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"the state dict does not fit {factory}: {one_line(error)}; check --arch"
        ) from error
    return notes


def _select(
    state: dict[str, Tensor], own: Mapping[str, Tensor], factory: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The entries of a network inside the state of a larger module, under the network's own keys."""
    if not own or state.keys() == own.keys():
        return state, []
    # torch.compile of a part puts its prefix inside the keys; the network may or may not be compiled now.
    # The network may be wrapped itself, or have a child of such a name.
    unwrapped = _without_prefixes({key: key for key in own})
    plain = {key.replace("_orig_mod.", ""): own_key for key, own_key in unwrapped.items()}
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    first = next(iter(plain))
    prefixes = [key.removesuffix(first) for key in state if key == first or key.endswith(f".{first}")]
    fitting = [p for p in prefixes if {k for k in state if k.startswith(p)} == {p + k for k in plain}]
    if len(fitting) > 1:
        raise CheckpointError(
            f"expected one set of weights for {factory}, found several, under {', '.join(fitting)}; pass "
            "--key with the one to export"
        )
    if not fitting:
        return {plain.get(key, key): value for key, value in state.items()}, []
    prefix = fitting[0]
    others = [key for key in state if not key.startswith(prefix)]
    notes = [f"left out {len(others)} entries outside {prefix}, such as {others[0]}"] if others else []
    return {own_key: state[prefix + key] for key, own_key in plain.items()}, notes


def build_stack(state: dict[str, Tensor]) -> nn.Sequential:
    """Builds the `nn.Sequential` of lookup and BatchNorm layers that a state dict alone determines.

    It computes in float32 where the state is float64, which the operator does not have.

    Raises:
        CheckpointError: The keys are not those of such a stack.
    """
    groups: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = re.fullmatch(r"(\d{1,9})\.([a-z_]+)", key)
        if match is None:
            raise _not_a_stack(f"found the key {key!r}")
        groups.setdefault(int(match[1]), {})[match[2]] = value
    absent = next(index for index in range(len(groups) + 1) if index not in groups)
    if absent < len(groups):
        raise _not_a_stack(f"found no state of layer {absent}, so what it computes is unknown")
    stack = nn.Sequential(*(_build_layer(index, groups[index]) for index in range(len(groups))))
    _check_widths(stack)
    return stack


def _build_layer(index: int, state: dict[str, Tensor]) -> nn.Module:
    names = set(state)
    if names == {"func_parameter", "borders"}:
        build: Callable[[int, dict[str, Tensor]], nn.Module] = _build_lookup
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
        build = _build_norm
    elif names == {"func_parameter"}:
        raise CheckpointError(
            f"expected {index}.borders beside {index}.func_parameter, found none, so the grid is unknown; "
            "save all of model.state_dict()"
        )
    else:
        raise _not_a_stack(f"found layer {index} with {', '.join(sorted(names))}")
    for name, value in state.items():
        if _is_repeated(value):
            raise CheckpointError(
                f"expected {index}.{name} with a number for each entry, found {list(value.shape)} in "
                f"{value.untyped_storage().nbytes()} bytes; save the state dict of the trained network itself"
            )
    try:
        layer = build(index, state)
        _check_shapes(index, state, layer)
        layer.load_state_dict(state, strict=False)
    except RuntimeError as error:  # more memory than there is
        raise CheckpointError(
            f"could not build layer {index} from its state: {one_line(error)}; take a machine with more memory"
        ) from error
    return layer


def _check_shapes(index: int, state: Mapping[str, Tensor], layer: nn.Module) -> None:
    for name, own in layer.state_dict().items():
        if name in state and state[name].shape != own.shape:
            first = "running_mean" if "running_mean" in state else "func_parameter"
            raise CheckpointError(
                f"expected {index}.{name} {list(own.shape)}, found {list(state[name].shape)}, which contradicts "
                f"{index}.{first} {list(state[first].shape)}; save the state dict of the trained network itself"
            )


def _build_lookup(index: int, state: dict[str, Tensor]) -> LMKAN2DLayer:
    table = state["func_parameter"]
    shape = list(table.shape)
    if table.dim() != 4 or shape[0] != shape[1] or shape[0] <= MIN_NUM_GRIDS or 0 in shape:
        raise CheckpointError(
            f"expected {index}.func_parameter [G+1, G+1, N_out, N_in/2] with equal grid axes, G >= "
            f"{MIN_NUM_GRIDS}, an output and a pair of inputs, found {shape}; "
            + ("train with a finer grid" if 1 < shape[0] <= MIN_NUM_GRIDS else "pass the network with --arch")
        )
    layer = LMKAN2DLayer(shape[0] - 1, 2 * shape[3], shape[2])
    return layer.to(table.dtype) if table.dtype in _TABLE_DTYPES else layer


def _build_norm(index: int, state: dict[str, Tensor]) -> nn.BatchNorm1d:
    shape = list(state["running_mean"].shape)
    if len(shape) != 1 or shape[0] < 1:
        raise CheckpointError(
            f"expected {index}.running_mean [N] with N >= 1, found {shape}; pass the network with --arch"
        )
    return nn.BatchNorm1d(shape[0], affine="weight" in state)


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


def one_line(error: Exception) -> str:
    """An error's message without its line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
