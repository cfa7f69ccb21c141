"""Finds the TensorRT plugin, or compiles it against a user's TensorRT: the adapter, with a C++ compiler alone.

TensorRT's C++ interfaces may change from release to release, so that no plugin library fits all. The CUDA
kernels do not depend on it: the package brings them compiled, in an archive that is linked in.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import lmkan_deploy
from lmkan_deploy.errors import LibraryError
from lmkan_deploy.runtime.libraries import get_library_path
from lmkan_deploy.staging import output_file, reported, staging_folder
from lmkan_deploy.version import __version__

MIN_TENSORRT_MAJOR = 10
"""First TensorRT that has IPluginV3."""

_VERSIONS = re.compile(rb"lmkan-deploy ([0-9.]+) for TensorRT ([0-9]+\.[0-9.]+)\0")  # in register.cc


@dataclass(frozen=True)
class PluginVersions:
    """What a plugin library was made from.

    Attributes:
        release: Of this package.
        tensorrt: Release of the headers, such as "10.14.1".
    """

    release: str
    tensorrt: str

    def fits(self, tensorrt: str) -> bool:
        """Whether TensorRT of a release can load it: C++ interfaces are those of the major release."""
        return self.tensorrt.split(".")[0] == tensorrt.split(".")[0]


def plugin_versions(path: Path) -> PluginVersions:
    """Reads a plugin library's versions, without loading it.

    Raises:
        LibraryError: The file can't be read, or is no plugin library of this package.
    """
    try:
        found = _VERSIONS.search(path.read_bytes())
    except OSError as error:
        raise LibraryError(f"expected a plugin library, could not read {path}: {error.strerror}") from error
    if found is None:
        raise LibraryError(f"expected a TensorRT plugin library of lmkan-deploy, found another file: {path}")
    return PluginVersions(*(part.decode() for part in found.groups()))


def find_tensorrt_plugin(tensorrt: str | None = None) -> Path:
    """The plugin library for a release of TensorRT: one that `build_tensorrt_plugin` made in the user's cache, or
    the package's own. That for the very release comes first, then others of its major release, the newest first.

    Args:
        tensorrt: Such as "10.14.1"; None takes the only one that there is.

    Raises:
        LibraryError: There is none, or more than one to choose from.
    """
    found = _find_plugins()
    make = "make one with lmkan-deploy plugins build --tensorrt-include DIR"
    if not found:
        raise LibraryError(
            f"expected a TensorRT plugin library of lmkan-deploy {__version__}, found none; {make}"
        )
    releases = ", ".join(sorted(found))
    if tensorrt is None:
        if len(found) > 1:
            raise LibraryError(
                f"expected a release of TensorRT, found plugin libraries for {releases}; name one"
            )
        return next(iter(found.values())).resolve()
    wanted = ".".join(tensorrt.split(".")[:3])
    fitting = [release for release in found if PluginVersions(__version__, release).fits(wanted)]
    if not fitting:
        raise LibraryError(
            f"expected a plugin library for TensorRT {tensorrt}, found those for {releases}, which another major "
            f"release can't load; {make}"
        )
    best = max(fitting, key=lambda release: (release == wanted, [int(part) for part in release.split(".")]))
    return found[best].resolve()


def _find_plugins() -> dict[str, Path]:
    """Release of TensorRT -> plugin library of this package's release."""
    pattern = cached_plugin("*").name
    paths = [path for path in _cache().glob(pattern) if not path.stem.endswith("_register")]
    with contextlib.suppress(LibraryError):
        paths.insert(0, get_library_path("tensorrt"))
    found = {}
    for path in paths:  # the user's own last, since it counts
        with contextlib.suppress(LibraryError):  # another file
            versions = plugin_versions(path)
            if versions.release == __version__:
                found[versions.tensorrt] = path
    return found


def build_tensorrt_plugin(
    include_dir: str | Path, output: str | Path | None = None, *, kernels: str | Path | None = None
) -> Path:
    """Compiles the plugin library NAME.so, and NAME_register.so, with the compiler and options of CXX, by
    default g++, and the options of LDFLAGS.

    NAME.so is for `trtexec --dynamicPlugins` and `IPluginRegistry::loadLibrary`. NAME_register.so has TensorRT
    load it, for programs that only open a library, such as Triton. A file appears complete or not at all. The
    kernels and the CUDA runtime are inside: the files may be moved and copied to other machines.

    Args:
        include_dir: Folder of TensorRT's headers, which has NvInferRuntime.h. CUDA's are not needed.
        output: NAME.so; by default a file in the user's cache whose name has this package's release and
            TensorRT's.
        kernels: The archive of the CUDA kernels, with libcudart_static.a beside it if they need that; by default
            the package's.

    Returns:
        Path of NAME.so.

    Raises:
        LibraryError: The headers, the kernels or the compiler are missing, the compiler refuses, or the
            output does not end in .so.
        ModelError: The file can't be written.
    """
    include_dir = Path(include_dir)
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    version = _tensorrt_version(compiler, include_dir)
    kernels = Path(kernels or _find_kernels()).resolve()
    if output is None:
        output = cached_plugin(version)
        with reported(output.parent):
            output.parent.mkdir(parents=True, exist_ok=True)
    path = output_file(output)
    if path.suffix != ".so":
        raise LibraryError(f"expected an output that ends in .so, found {path}")
    plugins = _sources()
    cuda_runtime = kernels.with_name("libcudart_static.a")
    link = [
        str(kernels),
        *([str(cuda_runtime)] if cuda_runtime.is_file() else []),
        "-ldl",
        "-lrt",
        "-lpthread",
    ]
    link += shlex.split(os.environ.get("LDFLAGS", ""))
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


def _command(compiler: list[str], include_dir: Path, plugins: Path, folder: Path) -> list[str]:
    """Compiles the sources of a folder into one shared library that exports what its exports.map says."""
    return [
        *compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden",
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


def _find_kernels() -> Path:
    archive = get_library_path("cuda").with_suffix(".a")
    if not archive.is_file():
        raise LibraryError(
            f"expected the compiled CUDA kernels in {archive}, found none; install lmkan-deploy where CUDA's "
            "compiler is, with -C cmake.define.LMKAN_BUILD_CUDA=ON"
        )
    return archive


def cached_plugin(tensorrt: str) -> Path:
    """Where a plugin for a release of TensorRT, such as 10.14.1, is built."""
    return _cache() / f"liblmkan_tensorrt-{__version__}-trt{tensorrt}.so"


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lmkan-deploy" / "plugins"


def _tensorrt_version(compiler: list[str], include_dir: Path) -> str:
    """Such as 10.14.1; the preprocessor reads it, since macros stand for macros in this header."""
    header = include_dir / "NvInferVersion.h"
    if not header.is_file() or not (include_dir / "NvInferRuntime.h").is_file():
        raise LibraryError(
            f"expected TensorRT's headers (NvInferRuntime.h, NvInferVersion.h) in {include_dir}, found none; "
            "pass the include folder of a TensorRT installation"
        )
    names = ("NV_TENSORRT_MAJOR", "NV_TENSORRT_MINOR", "NV_TENSORRT_PATCH")
    result = _run([*compiler, "-E", "-P", "-x", "c++", "-include", str(header), "-"], " ".join(names))
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
