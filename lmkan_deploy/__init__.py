"""Runs lookup multivariate Kolmogorov-Arnold networks (lmKANs) in production.

    import lmkan_deploy

    lmkan_deploy.export("model.pt", "model.onnx")
    runner = lmkan_deploy.load_runner("model.onnx")
    outputs = runner.run({"x": x})

Importing the package imports neither torch, onnx nor onnxruntime; each function imports what it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lmkan_deploy.version import __version__

if TYPE_CHECKING:
    from lmkan_deploy.api import ExportResult, OptimizeResult, bench, export, inspect, optimize, run, verify
    from lmkan_deploy.checkpoints import Architecture, load_checkpoint
    from lmkan_deploy.errors import LmkanError
    from lmkan_deploy.runtime.libraries import get_library_path
    from lmkan_deploy.runtime.onnxruntime import register_custom_ops
    from lmkan_deploy.runtime.runner import Runner, load_runner

_HOME = {
    "Architecture": "lmkan_deploy.checkpoints",
    "ExportResult": "lmkan_deploy.api",
    "OptimizeResult": "lmkan_deploy.api",
    "LmkanError": "lmkan_deploy.errors",
    "Runner": "lmkan_deploy.runtime.runner",
    "bench": "lmkan_deploy.api",
    "export": "lmkan_deploy.api",
    "get_library_path": "lmkan_deploy.runtime.libraries",
    "inspect": "lmkan_deploy.api",
    "load_checkpoint": "lmkan_deploy.checkpoints",
    "load_runner": "lmkan_deploy.runtime.runner",
    "optimize": "lmkan_deploy.api",
    "register_custom_ops": "lmkan_deploy.runtime.onnxruntime",
    "run": "lmkan_deploy.api",
    "verify": "lmkan_deploy.api",
}
"""Public name -> module that defines it, imported on first use."""

__all__ = [
    "Architecture",
    "ExportResult",
    "LmkanError",
    "OptimizeResult",
    "Runner",
    "__version__",
    "bench",
    "export",
    "get_library_path",
    "inspect",
    "load_checkpoint",
    "load_runner",
    "optimize",
    "register_custom_ops",
    "run",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
