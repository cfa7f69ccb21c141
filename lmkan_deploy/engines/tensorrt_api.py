"""TensorRT's Python package, or TensorRT-RTX's: two modules with one interface."""

from __future__ import annotations

import importlib
from collections import deque
from typing import Any, Literal, get_args

from lmkan_deploy.errors import EngineError, LibraryError

EngineRuntime = Literal["tensorrt", "tensorrt-rtx"]
"""``tensorrt``: lookup layers run in the plugin; ``tensorrt-rtx``: plugin-free, from the functions that a model
carries; engines build on machines without a GPU."""

_PACKAGES = {"tensorrt": "tensorrt-cu13", "tensorrt-rtx": "tensorrt-rtx-cu13"}


def import_tensorrt(runtime: EngineRuntime) -> Any:
    """The module of a runtime.

    Raises:
        EngineError: The name is unknown.
        LibraryError: The package is missing, or can't be loaded.
    """
    if runtime not in get_args(EngineRuntime):
        raise EngineError(
            f"expected a runtime of {', '.join(get_args(EngineRuntime))}, found {runtime!r}; pass --runtime"
        )
    try:
        return importlib.import_module(runtime.replace("-", "_"))
    except (ImportError, OSError) as error:
        raise LibraryError(
            f"expected the Python package of {runtime}, could not import it: {error}; install "
            f"{_PACKAGES[runtime]} in the release that your engines need"
        ) from error


def make_log(trt: Any) -> Any:
    """A logger that collects errors instead of printing them.

    Returns:
        An `ILogger` with a queue `errors` of the last messages that are more severe than a warning.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[str] = deque(maxlen=2)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def last_errors(log: Any) -> str:
    """The last messages of a log, or that there are none."""
    return "; ".join(log.errors) or "no reason was given"
