"""Stand-ins for the upstream `lmKAN` package, whose import needs a CUDA build.

Code and pickles that refer to `lmKAN` load inside `stand_in()`, which changes nothing where the real
package is installed. Layers of the real package are replaced before an export by `replace_layers`,
because their CUDA call can't be traced.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import lmkan_deploy.nn

PACKAGE = "lmKAN"


class LMKAN2DLayer(lmkan_deploy.nn.LMKAN2DLayer):
    """Upstream's layer: batch-last, [N_in, B] -> [N_out, B], otherwise `lmkan_deploy.nn.LMKAN2DLayer`.

    A new one's `func_parameter` is contiguous, as upstream's, since user code may flatten it (pruning does). A
    loaded one gets the operator's memory order.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.func_parameter.data = self.func_parameter.data.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """[N_in, B] -> [N_out, B]."""
        return torch.ops.lmkan.lookup2d(x.transpose(0, 1), self.table).transpose(0, 1)


def lookup_op(
    parameters: Tensor,
    x: Tensor,
    block_size_forward: int,
    block_size_backward: int,
    tile_size_forward: int,
    tile_size_backward: int,
    cdf_grid: bool,
    batch_last: bool,
    backward_fast_mode: bool,
) -> Tensor:
    """Upstream's `lmKAN_2d_op`, of which its layer is made: [N_in, B] -> [N_out, B].

    `parameters` is [G + 1, G + 1, N_out, N_in / 2]. `cdf_grid` and `batch_last` must be set, as in upstream's
    layer; the others choose CUDA tiles and restrict nothing here.

    Raises:
        ValueError: The grid or the layout is another one.
    """
    if not cdf_grid or not batch_last:
        raise ValueError(
            f"expected lmKAN_2d_op with cdf_grid and batch_last, found {cdf_grid} and {batch_last}; call it as "
            "LMKAN2DLayer does"
        )
    table = parameters.permute(3, 0, 1, 2)
    return torch.ops.lmkan.lookup2d(x.transpose(0, 1), table).transpose(0, 1)


def is_installed() -> bool:
    """Whether the real package can be found (it is not imported)."""
    module = sys.modules.get(PACKAGE)
    if module is not None:
        return getattr(module, "__spec__", None) is not None
    return importlib.util.find_spec(PACKAGE) is not None


@contextmanager
def stand_in() -> Iterator[None]:
    """Makes `from lmKAN import LMKAN2DLayer` work inside the block where upstream is not installed."""
    if is_installed():
        yield
        return
    modules = _stand_in_modules()
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)


def _stand_in_modules() -> dict[str, ModuleType]:
    """The modules of upstream's package that user code and pickles refer to."""
    package = ModuleType(PACKAGE)
    layers = ModuleType(f"{PACKAGE}.lmKAN_2d")
    operator = ModuleType(f"{PACKAGE}.custom_op")
    utilities = ModuleType(f"{PACKAGE}.utilities")
    package.__path__ = []
    layers.LMKAN2DLayer = LMKAN2DLayer  # type: ignore[attr-defined]
    package.LMKAN2DLayer = LMKAN2DLayer  # type: ignore[attr-defined]
    for module in (package, layers, operator):
        module.lmKAN_2d_op = lookup_op  # type: ignore[attr-defined]
    utilities.get_borders_cdf_grid = lambda n: list(lmkan_deploy.spec.grid_points(n))  # type: ignore[attr-defined]
    utilities.get_frobenius_regularization = lmkan_deploy.nn.hessian_regularization  # type: ignore[attr-defined]
    package.lmKAN_2d = layers  # type: ignore[attr-defined]
    package.custom_op = operator  # type: ignore[attr-defined]
    package.utilities = utilities  # type: ignore[attr-defined]
    return {module.__name__: module for module in (package, layers, operator, utilities)}


def replace_layers(module: nn.Module) -> nn.Module:
    """Replaces layers of the really installed upstream package by stand-ins that share their parameters.

    Args:
        module: Changed in place, unless it is such a layer itself.

    Returns:
        The module, or its replacement.
    """
    if _is_upstream_layer(module):
        return _replacement(module)
    # A layer that is held in several places stays one.
    twins: dict[nn.Module, LMKAN2DLayer] = {}
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves out the second place
            if child is not None and _is_upstream_layer(child):
                if child not in twins:
                    twins[child] = _replacement(child)
                setattr(parent, name, twins[child])
    return module


def _is_upstream_layer(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__.split(".")[0] == PACKAGE and kind.__name__ == "LMKAN2DLayer"


def _replacement(layer: nn.Module) -> LMKAN2DLayer:
    twin = LMKAN2DLayer.__new__(LMKAN2DLayer)
    twin.__setstate__(dict(layer.__dict__))  # type: ignore[no-untyped-call]
    return twin
