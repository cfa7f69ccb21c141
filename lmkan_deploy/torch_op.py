"""The operator in PyTorch: ``torch.ops.lmkan.lookup2d(x, table)``.

A `torch.library` operator, so that `torch.export` and `torch.compile` keep it as one node. On the CPU the
forward runs the compiled kernel; on other devices, and for float64, it is a weighted `embedding_bag` over
the table's rows. The backward reads the table by rows in chunks, so that no intermediate grows with
batch x pairs x outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lmkan_deploy.reference import check_shapes
from lmkan_deploy.runtime.native import CpuTable, Dtype, Ownership
from lmkan_deploy.spec import grid_points

_NATIVE_DTYPES = {
    torch.float32: Dtype.FLOAT32,
    torch.float16: Dtype.FLOAT16,
    torch.bfloat16: Dtype.BFLOAT16,
}

_DTYPES = (*_NATIVE_DTYPES, torch.float64)

_CHUNK_ELEMENTS = 1 << 22
"""Largest intermediate, in elements, of the forward in PyTorch and of the backward."""


@torch.library.custom_op("lmkan::lookup2d", mutates_args=())
def lookup2d(x: Tensor, table: Tensor) -> Tensor:
    """Evaluates a lookup layer; docs/operator.md defines it.

    Args:
        x: Features, [..., N_in] with N_in even.
        table: Tables, [N_in / 2, G + 1, G + 1, N_out], G at least 3.

    Returns:
        y, [..., N_out], of x's dtype; accumulated in float32 (float64 for float64 x).

    Forward-mode derivatives and derivatives of the gradient are not defined.

    Raises:
        ValueError: The shapes contradict each other, an element type is none of the four floating-point types,
            or the tensors are on different devices.
    """
    check_shapes(tuple(x.shape), tuple(table.shape))
    _check_kinds(x, table)
    if x.device.type == "cpu" and x.dtype in _NATIVE_DTYPES and table.dtype in _NATIVE_DTYPES:
        return _lookup2d_native(x, table)
    return _lookup2d_torch(x, table)


@lookup2d.register_fake
def _(x: Tensor, table: Tensor) -> Tensor:
    check_shapes((*[1] * (x.dim() - 1), int(x.shape[-1])) if x.dim() else (), tuple(table.shape))
    _check_kinds(x, table)
    return x.new_empty((*x.shape[:-1], table.shape[-1]))


def _check_kinds(x: Tensor, table: Tensor) -> None:
    for name, tensor in (("x", x), ("the table", table)):
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"expected {name} of float16, bfloat16, float32 or float64, found {tensor.dtype}; convert it"
            )
    if x.device != table.device:
        raise ValueError(
            f"expected x and the table on one device, found {x.device} and {table.device}; move one of them"
        )


def _lookup2d_native(x: Tensor, table: Tensor) -> Tensor:
    x, table = x.contiguous(), table.contiguous()
    num_pairs, num_points, _, num_outputs = table.shape
    y = x.new_empty((*x.shape[:-1], num_outputs))
    rows = x.numel() // x.shape[-1]
    # The table may change between two calls, so nothing of it is kept.
    with CpuTable(
        table.data_ptr(),
        _NATIVE_DTYPES[table.dtype],
        num_pairs,
        num_points - 1,
        num_outputs,
        ownership=Ownership.BORROW,
    ) as native:
        tasks = native.num_tasks(rows, torch.get_num_threads())
        native.lookup(x.data_ptr(), y.data_ptr(), _NATIVE_DTYPES[x.dtype], rows, num_tasks=tasks)
    return y


def _lookup2d_torch(x: Tensor, table: Tensor) -> Tensor:
    compute = _compute_dtype(x, table)
    rows, corners = x.reshape(-1, x.shape[-1]), table.reshape(-1, table.shape[-1]).to(compute)
    y = rows.new_empty((rows.shape[0], table.shape[-1]))
    for chunk in _chunks(rows.shape[0], 4 * table.shape[0]):
        cells = Cells(rows[chunk].to(compute), table.shape[1] - 1)
        y[chunk] = torch.nn.functional.embedding_bag(
            cells.corner_rows().flatten(1), corners, per_sample_weights=cells.weights().flatten(1), mode="sum"
        ).to(x.dtype)
    return y.reshape(*x.shape[:-1], table.shape[-1])


class Cells:
    """Cells and positions of rows of features.

    Args:
        x: Features, [B, 2P], float32 or float64.
        num_grids: G.
    """

    def __init__(self, x: Tensor, num_grids: int) -> None:
        grid = _grid(num_grids, x.dtype, x.device)
        tail = 0.5 * torch.exp(-x.abs())
        level = torch.where(x > 0, 1.0 - tail, tail) * num_grids
        cell = level.nan_to_num().long().clamp(0, num_grids - 1).reshape(x.shape[0], -1, 2)
        self.num_grids = num_grids
        self.inverse_width = 1.0 / (grid[cell + 1] - grid[cell])
        """[B, P, 2]."""
        self.position = (x.reshape(cell.shape) - grid[cell]) * self.inverse_width
        """[B, P, 2], the d1 and d2 of docs/operator.md."""
        self._cell = cell

    def corner_rows(self) -> Tensor:
        """Rows of the table, seen as [P * (G + 1)^2, N_out], of each pair's corners: [B, P, 4]."""
        points = self.num_grids + 1
        pair = torch.arange(self._cell.shape[1], device=self._cell.device)
        first = (pair * points + self._cell[..., 0]) * points + self._cell[..., 1]
        return torch.stack([first, first + 1, first + points, first + points + 1], dim=-1)

    def weights(self) -> Tensor:
        """Weights of the corners, [B, P, 4]."""
        d1, d2 = self.position.unbind(-1)
        return torch.stack([(1 - d1) * (1 - d2), (1 - d1) * d2, d1 * (1 - d2), d1 * d2], dim=-1)


@torch.library.custom_op("lmkan::lookup2d_backward", mutates_args=())
def lookup2d_backward(
    grad: Tensor, x: Tensor, table: Tensor, need_x: bool, need_table: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `lookup2d` with respect to x and table; an empty tensor for one not needed.

    Args:
        grad: Gradient of y, [..., N_out].
        x: Features, [..., 2P].
        table: Tables, [P, G + 1, G + 1, N_out].
        need_x: Whether to compute the first result.
        need_table: Whether to compute the second.

    Returns:
        Gradients of x's and of table's shape and dtype.
    """
    compute = _compute_dtype(x, table)
    features = x.reshape(-1, x.shape[-1])
    grads = grad.reshape(-1, grad.shape[-1]).to(compute)
    corners = table.reshape(-1, table.shape[-1])
    # As the compiler was told, whatever the strides of x and the table.
    contiguous = torch.contiguous_format
    grad_x = torch.empty_like(features, memory_format=contiguous) if need_x else x.new_empty(0)
    grad_corners = (
        torch.zeros_like(corners, dtype=compute, memory_format=contiguous) if need_table else x.new_empty(0)
    )
    for chunk in _chunks(features.shape[0], table.shape[0] * table.shape[-1]):
        cells = Cells(features[chunk].to(compute), table.shape[1] - 1)
        rows, weights = cells.corner_rows(), cells.weights()
        if need_table:
            _add_table_gradient(grad_corners, rows, weights, grads[chunk])
        if need_x:
            grad_x[chunk] = _x_gradient(corners, cells, rows, grads[chunk]).to(x.dtype)
    return (
        grad_x.reshape(x.shape) if need_x else grad_x,
        grad_corners.reshape(table.shape).to(table.dtype) if need_table else grad_corners,
    )


@lookup2d_backward.register_fake
def _(grad: Tensor, x: Tensor, table: Tensor, need_x: bool, need_table: bool) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0),
        torch.empty_like(table, memory_format=torch.contiguous_format) if need_table else x.new_empty(0),
    )


def _add_table_gradient(grad_corners: Tensor, rows: Tensor, weights: Tensor, grads: Tensor) -> None:
    """grad_corners[rows[b, p, c]] += weights[b, p, c] * grads[b]."""
    batch = torch.arange(grads.shape[0], device=grads.device).repeat_interleave(rows[0].numel())
    scatter = torch.sparse_coo_tensor(
        torch.stack([rows.flatten(), batch]),
        weights.flatten(),
        (grad_corners.shape[0], grads.shape[0]),
        check_invariants=False,
    )
    grad_corners.addmm_(scatter, grads)


def _x_gradient(corners: Tensor, cells: Cells, rows: Tensor, grads: Tensor) -> Tensor:
    # How y changes with each corner's weight, [B, P] a corner. Autocast would round the factors of `bmm`.
    device = grads.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        s00, s01, s10, s11 = (
            torch.bmm(corners[rows[..., c]].to(grads.dtype), grads.unsqueeze(-1)).squeeze(-1)
            for c in range(4)
        )
    d1, d2 = cells.position.unbind(-1)
    slope1 = (1 - d2) * (s10 - s00) + d2 * (s11 - s01)
    slope2 = (1 - d1) * (s01 - s00) + d1 * (s11 - s10)
    return (torch.stack([slope1, slope2], dim=-1) * cells.inverse_width).flatten(1)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, table = ctx.saved_tensors
    need_x, need_table = ctx.needs_input_grad
    grad_x, grad_table = lookup2d_backward(grad, x, table, need_x, need_table)
    return grad_x if need_x else None, grad_table if need_table else None


lookup2d.register_autograd(_backward, setup_context=_setup_context)


def _compute_dtype(x: Tensor, table: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, table.dtype) else torch.float32


def _chunks(rows: int, elements_a_row: int) -> Iterator[slice]:
    size = max(1, _CHUNK_ELEMENTS // elements_a_row)
    for first in range(0, rows, size):
        yield slice(first, first + size)


@functools.lru_cache(maxsize=64)
def _grid(num_grids: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(grid_points(num_grids), dtype=dtype, device=device)
