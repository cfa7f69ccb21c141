"""A GPU through pycuda."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, Generic, TypeVar

from lmkan_deploy.errors import EngineError, LibraryError

T = TypeVar("T")

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, which pycuda has no name for

_thread = threading.local()
"""`postponed`: what the thread is to release once its capture has ended; missing while there is none."""


class Gpu:
    """A GPU and its primary context, which CUDA's runtime and other packages use too.

    Args:
        number: Which GPU.

    Raises:
        LibraryError: pycuda or the GPU is missing.
    """

    def __init__(self, number: int) -> None:
        self.cuda = _import_pycuda()
        try:
            self._context = _primary_context(self.cuda, number)
        except self.cuda.Error as error:
            raise LibraryError(f"expected to use GPU {number}, found: {error}") from error

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Makes the GPU the calling thread's.

        Raises:
            EngineError: The driver refused something meanwhile.
        """
        try:
            self._context.push()
            try:
                yield
            finally:
                self._context.pop()
        except self.cuda.MemoryError as error:
            raise EngineError(
                f"expected more free memory on the GPU: {error}; run smaller batches, or fewer at a time"
            ) from error
        except self.cuda.Error as error:
            raise EngineError(f"the GPU failed: {error}") from error

    def allocate(self, size: int) -> DeviceMemory:
        """Memory of at least `size` bytes."""
        return DeviceMemory(self, self.cuda.mem_alloc(max(size, 1)))  # the driver allocates no empty memory

    def new_stream(self) -> OnGpu[Any]:
        """A pycuda stream."""
        # Another could not be captured while some thread uses the default stream.
        return OnGpu(self, self.cuda.Stream(_NON_BLOCKING))


class OnGpu(Generic[T]):
    """Keeps what is to be released with the GPU current.

    pycuda does not release what is dropped in another thread than that which made the context, unless the
    context is current there.
    """

    def __init__(self, gpu: Gpu, value: T) -> None:
        self._gpu, self.value = gpu, value

    def __del__(self) -> None:
        held = [self.value]
        del self.value
        release_outside_captures(partial(_drop, self._gpu, held))


class DeviceMemory(OnGpu[Any]):
    """An allocation; as an integer its address."""

    def __int__(self) -> int:
        return int(self.value)


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """For as long as the thread captures a stream, releases wait: the driver would refuse them and the capture.
    The garbage collector may make some at any time.
    """
    postponed: list[Callable[[], None]] = []
    _thread.postponed = postponed
    try:
        yield
    finally:
        del _thread.postponed
        for release in postponed:
            release()


def release_outside_captures(release: Callable[[], None]) -> None:
    """Calls a function now, or when the thread's capture has ended."""
    postponed = getattr(_thread, "postponed", None)
    if postponed is None:
        release()
    else:
        postponed.append(release)


def _drop(gpu: Gpu, held: list[Any]) -> None:
    with gpu.current():
        held.clear()


@cache
def _primary_context(cuda: Any, number: int) -> Any:
    """Never released: pycuda leaves a context that it releases current, and engines may outlive a runner."""
    return cuda.Device(number).retain_primary_context()


def _import_pycuda() -> Any:
    try:
        import pycuda.driver as cuda
    except ImportError as error:
        raise LibraryError(
            f"expected pycuda, could not import it: {error}; install pycuda where CUDA's toolkit is"
        ) from error
    try:
        cuda.init()
    except cuda.Error as error:
        raise LibraryError(f"expected a GPU, found none: {error}") from error
    return cuda
