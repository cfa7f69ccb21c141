"""Patches of a convolution: `torch.nn.functional.unfold` -> reshapes, where patches do not overlap.

The exporter writes unfold as gathers with computed indices. For stride = kernel size, no padding and no
dilation, which is what the paper's networks use, it is a reshape and a transpose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def simplify_unfold(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Rewrites such calls in a traced network; others stay as they are."""
    if not any(node.target is torch.ops.aten.im2col.default for node in program.graph.nodes):
        return program
    return program.run_decompositions({torch.ops.aten.im2col.default: _unfold})


def _unfold(
    x: Tensor, kernel_size: list[int], dilation: list[int], padding: list[int], stride: list[int]
) -> Any:
    sizes = x.shape[-2:]
    exact = (
        x.dim() == 4
        and list(kernel_size) == list(stride)
        and set(padding) == {0}
        and set(dilation) == {1}
        and all(isinstance(size, int) for size in sizes)
        and all(size % k == 0 for size, k in zip(sizes, kernel_size, strict=True))
    )
    if not exact:
        return NotImplemented
    batch, channels, height, width = x.shape
    k1, k2 = kernel_size
    tiles = x.reshape(batch, channels, height // k1, k1, width // k2, k2)
    patches = tiles.permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(batch, channels * k1 * k2, (height // k1) * (width // k2))
