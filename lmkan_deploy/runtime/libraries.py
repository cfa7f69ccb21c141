"""Finds the package's native libraries and refuses those of another release.

Order of the search, the first hit wins:

1. the folder that the environment variable ``LMKAN_DEPLOY_LIBRARY_DIR`` names;
2. ``lib`` inside the installed package.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Literal, get_args

import lmkan_deploy
from lmkan_deploy.errors import LibraryError
from lmkan_deploy.version import __version__

LibraryName = Literal["cpu", "onnxruntime", "cuda", "onnxruntime-cuda", "tensorrt"]
"""``cpu``, ``cuda``: the C interfaces of ``lmkan/lookup2d.h`` and ``lookup2d_cuda.h``; ``onnxruntime``: custom
operators for its CPU provider; ``onnxruntime-cuda``: the same and those for its CUDA provider; ``tensorrt``: the
plugin."""

_NEEDS_CUDA = ("cuda", "onnxruntime-cuda", "tensorrt")

ENVIRONMENT_VARIABLE = "LMKAN_DEPLOY_LIBRARY_DIR"

ABI_VERSION = 2
"""``LMKAN_ABI_VERSION`` of ``plugins/include/lmkan/lookup2d.h``."""


@functools.cache
def get_library_path(name: LibraryName = "onnxruntime") -> Path:
    """Path of a native library of this package, for `register_custom_ops_library` or a C++ program.

    Args:
        name: Which library; see `LibraryName`.

    Returns:
        Absolute path of an existing library whose release is this package's.

    Raises:
        LibraryError: It does not exist, does not load, or is of another release.
    """
    if name not in get_args(LibraryName):
        raise LibraryError(f"expected a library of {', '.join(get_args(LibraryName))}, found {name!r}")
    path = _find(name)
    if name != "tensorrt":  # which exports what TensorRT looks for, and nothing else
        _check_release(path)
    return path


def _find(name: LibraryName) -> Path:
    file_name = f"liblmkan_{name.replace('-', '_')}.so"
    override = os.environ.get(ENVIRONMENT_VARIABLE)
    if override:
        folders = [Path(override)]
    else:
        # An editable install has two folders: the sources, and the one with the built libraries.
        folders = [Path(folder) / "lib" for folder in lmkan_deploy.__path__]
    for folder in folders:
        if (folder / file_name).is_file():
            return (folder / file_name).resolve()
    searched = ", ".join(str(folder) for folder in folders)
    fix = (
        "install lmkan-deploy where CUDA's compiler is, with -C cmake.define.LMKAN_BUILD_CUDA=ON "
        "-C cmake.define.LMKAN_BUILD_TENSORRT=ON"
        if name in _NEEDS_CUDA
        else "install lmkan-deploy from a wheel, or run `make setup` in a checkout"
    )
    raise LibraryError(
        f"expected {file_name} in {searched}, found none; {fix}, or set {ENVIRONMENT_VARIABLE}"
    )


def _check_release(path: Path) -> None:
    try:
        library = ctypes.CDLL(str(path))
        library.lmkan_version.restype = ctypes.c_char_p
        version, abi = library.lmkan_version().decode(), library.lmkan_abi_version()
    except (OSError, AttributeError) as error:
        raise LibraryError(f"expected a library of lmkan-deploy, could not load {path}: {error}") from error
    if (version, abi) != (__version__, ABI_VERSION):
        raise LibraryError(
            f"expected lmkan-deploy {__version__} (interface {ABI_VERSION}), found {version} (interface "
            f"{abi}) in {path}; reinstall lmkan-deploy, or rebuild with `make setup`"
        )
