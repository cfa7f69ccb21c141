"""A GPU through pycuda."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any, Generic, TypeVar

from lmkan_deploy.errors import EngineError, LibraryError

T = TypeVar("T")


class Gpu:
    """A GPU and its primary context, which CUDA's runtime and other packages use too.

    Args:
        number: Which GPU.

    Raises:
        LibraryError: pycuda or the GPU is missing.
    """

    def __init__(self, number: int) -> None:
        self.cuda = _import_pycuda()
        self._context = _primary_context(self.cuda, number)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Makes the GPU the calling thread's.

        Raises:
            EngineError: The driver refused something meanwhile.
        """
        self._context.push()
        try:
            yield
        except self.cuda.MemoryError as error:
            raise EngineError(
                f"expected more free memory on the GPU: {error}; run smaller batches, or fewer at a time"
            ) from error
        except self.cuda.Error as error:
            raise EngineError(f"the GPU failed: {error}") from error
        finally:
            self._context.pop()

    def allocate(self, size: int) -> DeviceMemory:
        """Memory of at least `size` bytes."""
        return DeviceMemory(self, self.cuda.mem_alloc(max(size, 1)))  # the driver allocates no empty memory

    def new_stream(self) -> OnGpu[Any]:
        """A pycuda stream."""
        return OnGpu(self, self.cuda.Stream())


class OnGpu(Generic[T]):
    """Keeps what is to be released with the GPU current.

    pycuda does not release what is dropped in another thread than that which made the context, unless the
    context is current there.
    """

    def __init__(self, gpu: Gpu, value: T) -> None:
        self._gpu, self.value = gpu, value

    def __del__(self) -> None:
        with self._gpu.current():
            del self.value


class DeviceMemory(OnGpu[Any]):
    """An allocation; as an integer its address."""

    def __int__(self) -> int:
        return int(self.value)


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
