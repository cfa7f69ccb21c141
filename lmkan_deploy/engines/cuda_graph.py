"""CUDA graphs, through NVIDIA's bindings of the driver's interface."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

from lmkan_deploy.engines.gpu import capturing, release_outside_captures
from lmkan_deploy.errors import EngineError, LibraryError


class CudaGraph:
    """Work that was captured from a stream, to be launched again by one call.

    Args:
        stream: Handle of the stream to capture from. Only the calling thread may use it meanwhile.
        enqueue: Puts the work into the stream. What it reads and writes must stay where it is for as long as
            the graph is launched.

    Raises:
        LibraryError: cuda-bindings is missing.
        EngineError: The work can't be captured.
    """

    def __init__(self, stream: int, enqueue: Callable[[], None]) -> None:
        self._executable: Any = None
        self._driver = import_driver()
        self._enqueue = enqueue  # and with it what the work needs: it is to outlive the graph
        with capturing():
            graph = self._capture(stream)
        try:
            self._executable = self._call(self._driver.cuGraphInstantiate, graph, 0)
        finally:
            self._call(self._driver.cuGraphDestroy, graph)

    def _capture(self, stream: int) -> Any:
        driver = self._driver
        # Other threads may allocate meanwhile, which a capture in the global mode would forbid them.
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call(driver.cuStreamBeginCapture, driver.CUstream(stream), mode)
        try:
            self._enqueue()
        except BaseException:
            # The stream must leave the capture; what went wrong is known already.
            with contextlib.suppress(EngineError):
                self._call(
                    driver.cuGraphDestroy, self._call(driver.cuStreamEndCapture, driver.CUstream(stream))
                )
            raise
        return self._call(driver.cuStreamEndCapture, driver.CUstream(stream))

    def launch(self, stream: int) -> None:
        """Puts the work into a stream.

        Raises:
            EngineError: The driver refused it.
        """
        self._call(self._driver.cuGraphLaunch, self._executable, self._driver.CUstream(stream))

    def __del__(self) -> None:
        if self._executable is not None:
            release_outside_captures(partial(self._driver.cuGraphExecDestroy, self._executable))

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        status, *results = function(*arguments)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise EngineError(
                f"expected the engine to run as a CUDA graph, but {function.__name__} gave {status.name}; leave "
                "CUDA graphs out"
            )
        return results[0] if results else None


def import_driver() -> Any:
    """The module `cuda.bindings.driver`.

    Raises:
        LibraryError: It is missing.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise LibraryError(
            f"expected cuda-bindings for CUDA graphs and streams, could not import it: {error}; install it in "
            "the release of your CUDA driver, such as cuda-bindings==13.*"
        ) from error
    return driver
