"""Compiles the TensorRT plugin against a user's TensorRT: the adapter, with a C++ compiler alone.

TensorRT's C++ interfaces may change from release to release, so that no plugin library fits all. The CUDA
kernels do not depend on it: the compiled ones that the package brings are linked.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import lmkan_deploy
from lmkan_deploy.errors import LibraryError
from lmkan_deploy.runtime.libraries import get_library_path
from lmkan_deploy.staging import output_file, reported, staging_folder
from lmkan_deploy.version import __version__

MIN_TENSORRT_MAJOR = 10
"""First TensorRT that has IPluginV3."""


def build_tensorrt_plugin(
    include_dir: str | Path, output: str | Path | None = None, *, kernels: str | Path | None = None
) -> Path:
    """Compiles the plugin library NAME.so, and NAME_register.so, with the compiler of CXX, by default g++.

    NAME.so is for `trtexec --dynamicPlugins` and `IPluginRegistry::loadLibrary`. NAME_register.so has TensorRT
    load it, for programs that only open a library, such as Triton. A file appears complete or not at all.
    The plugin loads the CUDA kernels from where they are now.

    Args:
        include_dir: Folder of TensorRT's headers, which has NvInferRuntime.h. CUDA's are not needed.
        output: NAME.so; by default a file in the user's cache whose name has this package's release and
            TensorRT's.
        kernels: The library of the CUDA kernels; by default the package's.

    Returns:
        Path of NAME.so.

    Raises:
        LibraryError: The headers, the kernels or the compiler are missing, the compiler refuses, or the
            output does not end in .so.
        ModelError: The file can't be written.
    """
    include_dir = Path(include_dir)
    compiler = os.environ.get("CXX") or "g++"
    version = _tensorrt_version(compiler, include_dir)
    kernels = Path(kernels or get_library_path("cuda")).resolve()
    path = output_file(cached_plugin(version) if output is None else output)
    if path.suffix != ".so":
        raise LibraryError(f"expected an output that ends in .so, found {path}")
    plugins = _sources()
    link = [
        "-L",
        str(kernels.parent),
        f"-l:{kernels.name}",
        "-Xlinker",
        "-rpath",
        "-Xlinker",
        str(kernels.parent),
    ]
    libraries = {
        path: (plugins / "tensorrt", link),
        output_file(path.with_name(f"{path.stem}_register.so")): (plugins / "tensorrt" / "loader", ["-ldl"]),
    }
    with staging_folder(path) as staging:
        for target, (folder, options) in libraries.items():
            command = _command(compiler, include_dir, plugins, folder)
            result = _run([*command, *options, "-o", str(staging / target.name)])
            if result.returncode != 0:
                raise LibraryError(
                    f"could not compile the plugin against TensorRT {version} of {include_dir}: "
                    f"{_first_error(result.stderr)}"
                )
        for target in libraries:
            with reported(target):
                (staging / target.name).replace(target)
    return path


def _command(compiler: str, include_dir: Path, plugins: Path, folder: Path) -> list[str]:
    """Compiles the sources of a folder into one shared library that exports what its exports.map says."""
    return [
        compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden",
        f'-DLMKAN_VERSION="{__version__}"',
        "-isystem", str(include_dir), "-I", str(plugins / "include"),
        "-idirafter", str(plugins / "tensorrt" / "cuda_types"),  # where there are no headers of CUDA
        *(str(source) for source in sorted(folder.glob("*.cc"))),
        f"-Wl,--version-script={folder / 'exports.map'}", "-Wl,--no-undefined",
        "-static-libstdc++", "-static-libgcc",
    ]  # fmt: skip


def _sources() -> Path:
    """The folder of the plugins' sources: the installed package's, or a checkout's."""
    packages = [Path(folder) for folder in lmkan_deploy.__path__]
    folders = [package / "plugins" for package in packages]
    folders += [package.parent / "plugins" for package in packages]
    for folder in folders:
        if (folder / "tensorrt" / "lookup2d_plugin.cc").is_file():
            return folder
    searched = ", ".join(str(folder) for folder in folders)
    raise LibraryError(
        f"expected the sources of the TensorRT plugin in {searched}, found none; install lmkan-deploy from a "
        "wheel that was built with CUDA, or work in a checkout"
    )


def cached_plugin(tensorrt_version: str) -> Path:
    """Where a plugin for a release of TensorRT, such as 10.14.1, is built; the folder exists."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "lmkan-deploy" / "plugins"
    with reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder / f"liblmkan_tensorrt-{__version__}-trt{tensorrt_version}.so"


def _tensorrt_version(compiler: str, include_dir: Path) -> str:
    """Such as 10.14.1; the preprocessor reads it, since macros stand for macros in this header."""
    header = include_dir / "NvInferVersion.h"
    if not header.is_file() or not (include_dir / "NvInferRuntime.h").is_file():
        raise LibraryError(
            f"expected TensorRT's headers (NvInferRuntime.h, NvInferVersion.h) in {include_dir}, found none; "
            "pass the include folder of a TensorRT installation"
        )
    names = ("NV_TENSORRT_MAJOR", "NV_TENSORRT_MINOR", "NV_TENSORRT_PATCH")
    result = _run([compiler, "-E", "-P", "-x", "c++", "-include", str(header), "-"], " ".join(names))
    parts = result.stdout.split()[-3:]
    if result.returncode != 0 or len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise LibraryError(f"expected the version of TensorRT in {header}, found none; reinstall its headers")
    if int(parts[0]) < MIN_TENSORRT_MAJOR:
        raise LibraryError(
            f"expected TensorRT {MIN_TENSORRT_MAJOR} or later, found {'.'.join(parts)} in {include_dir}; "
            "pass the headers of a later one"
        )
    return ".".join(parts)


def _run(command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LibraryError(
            f"expected a C++ compiler, could not run {command[0]}: {error.strerror}; install g++ or set CXX"
        ) from error


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line or "undefined" in line]
    return (errors or lines or ["the compiler said nothing"])[0]
