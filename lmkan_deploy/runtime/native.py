"""The C interface of the CPU kernels (``plugins/include/lmkan/lookup2d.h``) from Python.

Arguments are raw pointers, so that NumPy arrays and PyTorch tensors share one path; the callers check
shapes and keep the memory alive.
"""

from __future__ import annotations

import ctypes
import functools
from enum import IntEnum
from typing import TYPE_CHECKING

from lmkan_deploy.runtime.libraries import get_library_path
from lmkan_deploy.runtime.tasks import run_tasks

if TYPE_CHECKING:
    from types import TracebackType


class Dtype(IntEnum):
    """``lmkan_dtype``."""

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2
    INT8 = 3


class Ownership(IntEnum):
    """``lmkan_ownership``: repack the table, or read the caller's memory in place."""

    COPY = 0
    BORROW = 1


class Isa(IntEnum):
    """``lmkan_isa``: instruction set of the kernels."""

    AUTO = 0
    PORTABLE = 1
    AVX2 = 2
    AVX512 = 3


class NativeError(RuntimeError):
    """A native call returned a status other than OK; the message is the library's."""


class _TableDesc(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("num_pairs", ctypes.c_int64),
        ("num_grids", ctypes.c_int64),
        ("num_outputs", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
    )


_MESSAGE_SIZE = 512


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(get_library_path("cpu")))
    library.lmkan_cpu_table_create.argtypes = [
        ctypes.POINTER(_TableDesc),
        ctypes.c_int,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_char_p,
        ctypes.c_size_t,
    ]
    library.lmkan_cpu_table_destroy.argtypes = [ctypes.c_void_p]
    library.lmkan_cpu_table_destroy.restype = None
    library.lmkan_cpu_table_isa.argtypes = [ctypes.c_void_p]
    library.lmkan_cpu_table_isa.restype = ctypes.c_char_p
    library.lmkan_cpu_num_tasks.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
    library.lmkan_cpu_num_tasks.restype = ctypes.c_int64
    library.lmkan_cpu_lookup2d.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_char_p,
        ctypes.c_size_t,
    ]
    return library


class CpuTable:
    """A table made ready for lookups; a context manager that frees it at the end.

    Args:
        data: Address of the table, [num_pairs, num_grids + 1, num_grids + 1, num_outputs], contiguous.
        dtype: Its element type. An int8 entry is its integer times the scale of its pair and output.
        num_pairs: P = N_in / 2.
        num_grids: G, at least 3.
        num_outputs: N_out.
        scales: Address of the scales of an int8 table, [num_pairs, num_outputs] float32, contiguous.
        ownership: BORROW keeps reading `data`, which must then outlive this object.
        isa: Instruction set, AUTO for the best one.

    Raises:
        NativeError: The description is invalid, or memory is short.
    """

    def __init__(
        self,
        data: int,
        dtype: Dtype,
        num_pairs: int,
        num_grids: int,
        num_outputs: int,
        *,
        scales: int | None = None,
        ownership: Ownership = Ownership.COPY,
        isa: Isa = Isa.AUTO,
    ) -> None:
        self._handle = ctypes.c_void_p()
        desc = _TableDesc(data, dtype, num_pairs, num_grids, num_outputs, scales)
        message = ctypes.create_string_buffer(_MESSAGE_SIZE)
        status = _library().lmkan_cpu_table_create(
            ctypes.byref(desc), ownership, isa, ctypes.byref(self._handle), message, _MESSAGE_SIZE
        )
        if status != 0:
            raise NativeError(message.value.decode())

    @property
    def isa(self) -> str:
        """Instruction set in use: "portable", "avx2" or "avx512"."""
        return str(_library().lmkan_cpu_table_isa(self._handle).decode())

    def num_tasks(self, rows: int, num_threads: int) -> int:
        """Number of tasks that a lookup is worth on so many threads."""
        return int(_library().lmkan_cpu_num_tasks(self._handle, rows, num_threads))

    def lookup(self, x: int, y: int, dtype: Dtype, rows: int, *, num_tasks: int = 1) -> None:
        """Writes the outputs of all rows; x is [rows, 2 * num_pairs], y [rows, num_outputs].

        Args:
            x: Address of the features, contiguous, of type `dtype`.
            y: Address of the outputs, contiguous, of type `dtype`.
            dtype: Element type of x and y.
            rows: Number of rows, 0 allowed.
            num_tasks: Tasks to split into; above 1 they run on threads. The result does not depend on it.

        Raises:
            NativeError: An argument is invalid, or memory is short.
        """

        def run(task: int) -> None:
            message = ctypes.create_string_buffer(_MESSAGE_SIZE)
            status = _library().lmkan_cpu_lookup2d(
                self._handle, dtype, x, y, rows, task, num_tasks, message, _MESSAGE_SIZE
            )
            if status != 0:
                raise NativeError(message.value.decode())

        if num_tasks <= 1:
            run(0)
        else:
            run_tasks([functools.partial(run, task) for task in range(num_tasks)])

    def close(self) -> None:
        """Frees the table; more calls do nothing."""
        _library().lmkan_cpu_table_destroy(self._handle)
        self._handle = ctypes.c_void_p()

    def __enter__(self) -> CpuTable:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()
