"""Finds the plugin library, and loads it into TensorRT's registry."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from lmkan_deploy.engines.tensorrt_api import last_errors
from lmkan_deploy.errors import EngineError
from lmkan_deploy.runtime.tensorrt_plugin import find_tensorrt_plugin, plugin_versions
from lmkan_deploy.spec import DOMAIN, OP_TYPE
from lmkan_deploy.staging import file_sha256

_lock = threading.Lock()
_loaded: dict[str, tuple[Path, str]] = {}
"""Name of TensorRT's module -> the library that its registry has, and that library's SHA-256."""


def find_plugin(trt: Any, plugin: str | Path | None = None) -> Path:
    """The plugin library: the given file, or what `find_tensorrt_plugin` finds for this release of TensorRT.

    Raises:
        EngineError: There is no such file, or it is for another major release of TensorRT.
        LibraryError: There is none at all, or the file is none.
    """
    if plugin is None:
        return find_tensorrt_plugin(str(trt.__version__))
    path = Path(plugin)
    if not path.is_file():
        raise EngineError(f"expected a plugin library, found no file {path}")
    versions = plugin_versions(path)
    if not versions.fits(str(trt.__version__)):
        raise EngineError(
            f"expected a plugin library for TensorRT {trt.__version__}, found {path} for TensorRT "
            f"{versions.tensorrt}; make one with lmkan-deploy plugins build --tensorrt-include DIR"
        )
    return path.resolve()


def load_plugin(trt: Any, log: Any, path: Path) -> None:
    """Makes TensorRT know the plugins of a library, once in a process: its registry refuses a second library with
    the same plugins, and even the same one again.

    Args:
        trt: TensorRT's module.
        log: What `make_log` made; TensorRT has it already, from a builder or a runtime.
        path: The library.

    Raises:
        EngineError: TensorRT refuses it, or has another one.
    """
    digest = file_sha256(path)
    with _lock:
        if trt.__name__ not in _loaded:
            registry = trt.get_plugin_registry()
            ours = (OP_TYPE, DOMAIN)
            if any((creator.name, creator.plugin_namespace) == ours for creator in registry.all_creators):
                if not _is_mapped(path):  # somebody else loaded one
                    raise EngineError(
                        f"expected to load the plugin library {path}, found one in this process that was loaded "
                        "otherwise; load that file, or none"
                    )
            elif registry.load_library(str(path)) is None:
                raise EngineError(
                    f"TensorRT {trt.__version__} could not load the plugin library {path}: {last_errors(log)}"
                )
            _loaded[trt.__name__] = path, digest
        known, known_digest = _loaded[trt.__name__]
        if known_digest != digest:
            raise EngineError(
                f"expected the plugin library that this process has loaded, {known} (SHA-256 "
                f"{known_digest[:12]}), found {path} ({digest[:12]}); start another process for it"
            )


def _is_mapped(path: Path) -> bool:
    """Whether the process has loaded this very file."""
    inode = str(path.stat().st_ino)
    fields = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    return any(field[4] == inode and field[5:] == [str(path)] for field in fields)
