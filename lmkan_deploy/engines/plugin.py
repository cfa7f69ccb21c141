"""Finds the plugin library, and loads it into TensorRT's registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmkan_deploy.engines.tensorrt_api import last_errors
from lmkan_deploy.errors import EngineError
from lmkan_deploy.runtime.libraries import get_library_path
from lmkan_deploy.runtime.tensorrt_plugin import cached_plugin


def find_plugin(trt: Any, plugin: str | Path | None = None) -> Path:
    """The plugin library: the given file; or what `lmkan-deploy plugins build` made for this release of
    TensorRT; or the package's.

    Raises:
        EngineError: There is no such file.
        LibraryError: There is none at all.
    """
    if plugin is not None:
        path = Path(plugin)
        if not path.is_file():
            raise EngineError(f"expected a plugin library, found no file {path}")
        return path.resolve()
    release = ".".join(str(trt.__version__).split(".")[:3])
    built = cached_plugin(release)
    return built if built.is_file() else get_library_path("tensorrt")


def load_plugin(trt: Any, log: Any, path: Path) -> None:
    """Makes TensorRT know the plugins of a library.

    Raises:
        EngineError: TensorRT refuses it.
    """
    if trt.get_plugin_registry().load_library(str(path)) is None:
        raise EngineError(
            f"TensorRT {trt.__version__} could not load the plugin library {path}: {last_errors(log)}; build it "
            "for this release with lmkan-deploy plugins build"
        )
