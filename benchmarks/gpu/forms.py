"""The ways to compute a case: the library, upstream's package, dense layers."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from cases import UPSTREAM_LEAST_TILE, Case

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
TACTICS = {"auto": 0, "gather": 1, "shared": 2, "narrow": 3, "split": 4}

QuantizedTable = tuple[torch.Tensor, torch.Tensor | None]
"""Entries [P, G + 1, G + 1, N_out], and scales [P, N_out] where they are integers."""


class TableDesc(ctypes.Structure):
    """lmkan_table_desc."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("num_pairs", ctypes.c_int64),
        ("num_grids", ctypes.c_int64),
        ("num_outputs", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
    )


@dataclass
class Form:
    """One way to compute a case."""

    run: Callable[[int], torch.Tensor]
    """Enqueues it on the current stream for one of the inputs; y is complete when the stream is."""
    buffers: list[torch.Tensor] = field(default_factory=list)
    """What it writes, where that is known beforehand."""
    view: Callable[[torch.Tensor], torch.Tensor] = lambda y: y
    """y as [batch, N_out]."""
    owners: tuple = ()
    """Of memory that the launches know by address."""


def load_library(path: str) -> ctypes.CDLL:
    """The kernels' C interface."""
    library = ctypes.CDLL(path)
    desc, pointer, size, count = ctypes.POINTER(TableDesc), ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    dtype = tactic = ctypes.c_int32
    message = (ctypes.c_char_p, size)
    library.lmkan_cuda_tactics.argtypes = (desc, dtype, pointer, ctypes.c_int32)
    library.lmkan_cuda_workspace_size.argtypes = (desc, dtype, count, tactic, pointer, *message)
    library.lmkan_cuda_lookup2d.argtypes = (
        desc, dtype, pointer, pointer, count, tactic, pointer, size, pointer, *message
    )  # fmt: skip
    return library


def describe(table: torch.Tensor, scales: torch.Tensor | None) -> TableDesc:
    pairs, points, _, outputs = table.shape
    pointer = None if scales is None else scales.data_ptr()
    return TableDesc(table.data_ptr(), DTYPES[table.dtype], pairs, points - 1, outputs, pointer)


def table_tactics(library: ctypes.CDLL, table: QuantizedTable) -> set[str]:
    """Those that this GPU can look a table up with, AUTO among them."""
    found = (ctypes.c_int32 * len(TACTICS))()
    desc = ctypes.byref(describe(*table))
    count = library.lmkan_cuda_tactics(desc, DTYPES[torch.float32], found, len(found))
    return {name for name, number in TACTICS.items() if name == "auto" or number in found[:count]}


def offered_tactics(library: ctypes.CDLL, tables: list[QuantizedTable]) -> list[str]:
    """Those that this GPU can look at least one of the tables up with."""
    offered = set().union(*(table_tactics(library, table) for table in tables))
    return [name for name in TACTICS if name in offered]


def library_form(
    library: ctypes.CDLL, tables: list[QuantizedTable], tactic: str, inputs: list[torch.Tensor]
) -> Form:
    """Calls of the C interface whose arguments are prepared but for the stream.

    Tables that lack the tactic are looked up with AUTO.
    """
    tactics = [TACTICS[tactic if tactic in table_tactics(library, table) else "auto"] for table in tables]
    rows, device, x_dtype = len(inputs[0]), inputs[0].device, inputs[0].dtype
    message, message_size = ctypes.create_string_buffer(512), 512
    buffers = [torch.empty((rows, t.shape[3]), dtype=x_dtype, device=device) for t, _ in tables]
    calls: list[list[tuple]] = []
    workspaces = []
    for x in inputs:
        calls.append([])
        for (table, scales), number, source, y in zip(tables, tactics, [x, *buffers], buffers, strict=False):
            desc, size = describe(table, scales), ctypes.c_size_t()
            status = library.lmkan_cuda_workspace_size(
                desc, DTYPES[x_dtype], rows, number, ctypes.byref(size), message, message_size
            )
            if status != 0:
                raise RuntimeError(message.value.decode())
            workspaces.append(torch.empty(size.value, dtype=torch.uint8, device=device))
            calls[-1].append(
                (desc, DTYPES[x_dtype], source.data_ptr(), y.data_ptr(), rows, number,
                 workspaces[-1].data_ptr() or None, size.value)
            )  # fmt: skip

    def run(i: int) -> torch.Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        for call in calls[i]:
            if library.lmkan_cuda_lookup2d(*call, stream, message, message_size) != 0:
                raise RuntimeError(message.value.decode())
        return buffers[-1]

    return Form(run, buffers, owners=(tables, inputs, workspaces))


def upstream_tiles(case: Case, tile: int) -> list[int]:
    """Widest tile of each layer, up to `tile`; the last width is at least what upstream can compute."""
    return [math.gcd(tile, math.gcd(n_in, max(n_out, UPSTREAM_LEAST_TILE))) for n_in, n_out in case.layers]


def upstream_form(case: Case, tile: int, tables: list[torch.Tensor], inputs: list[torch.Tensor]) -> Form:
    """Upstream's layers with these tables. They take batches last, and make y, zero-filled, in each call."""
    from lmKAN import LMKAN2DLayer

    layers = []
    for (n_in, n_out), layer_tile, table in zip(case.layers, upstream_tiles(case, tile), tables, strict=True):
        with inputs[0].device:
            layer = LMKAN2DLayer(
                case.num_grids,
                n_in,
                max(n_out, UPSTREAM_LEAST_TILE),
                tile_size_forward=layer_tile,
                # As in upstream's README: more threads have too few registers for wide tiles.
                block_size_forward=512 if layer_tile >= 16 else 1024,
            )
        with torch.no_grad():
            layer.func_parameter.normal_(std=(n_in / 2) ** -0.5)
            layer.func_parameter[:, :, :n_out] = table.permute(1, 2, 3, 0)
        layers.append(layer.eval())
    last = [x.t().contiguous() for x in inputs]

    def run(i: int) -> torch.Tensor:
        y = last[i]
        with torch.no_grad():
            for layer in layers:
                y = layer(y)
        return y

    return Form(run, view=lambda y: y.t()[:, : case.widths[-1]])


def dense_form(case: Case, inputs: list[torch.Tensor]) -> Form:
    """Matrix products of the same widths."""
    options = {"device": inputs[0].device, "dtype": inputs[0].dtype}
    weights = [torch.randn(widths, **options) * widths[0] ** -0.5 for widths in case.layers]
    buffers = [torch.empty((len(inputs[0]), n_out), **options) for _, n_out in case.layers]

    def run(i: int) -> torch.Tensor:
        for x, weight, y in zip([inputs[i], *buffers], weights, buffers, strict=False):
            torch.mm(x, weight, out=y)
        return buffers[-1]

    return Form(run, buffers)
