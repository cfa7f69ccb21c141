#!/usr/bin/env python3
"""Puts the headers of a runtime, which no Python package of it ships, into the user's cache.

Prints the folder that holds them. A pinned package is downloaded by its registry's own client, its
hash is checked, only the headers are kept, and the folder appears complete or not at all.

Usage: fetch_headers.py onnxruntime|tensorrt
"""

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class HeaderPackage:
    """A registry package that contains a runtime's headers.

    Attributes:
        package: Package name and version as its client takes it.
        command: Client call that downloads the archive into the current folder.
        sha256: Hash of the archive.
        folder: Folder of the headers inside the archive.
        variable: Environment variable that names a folder of such headers instead.
        header: One of them.
    """

    package: str
    command: tuple[str, ...]
    sha256: str
    folder: str
    variable: str
    header: str


PACKAGES = {
    "onnxruntime": HeaderPackage(
        package="com.github.asus4.onnxruntime@0.4.9",
        command=("npm", "pack", "--silent", "com.github.asus4.onnxruntime@0.4.9"),
        sha256="e59788788818fdde1b2e522e766a21ba0f7d8391de55737abf81e32cc801785d",
        folder="package/Plugins/iOS~/onnxruntime.xcframework/ios-arm64/onnxruntime.framework/Headers",
        variable="ORT_INCLUDE_DIR",
        header="onnxruntime_c_api.h",
    ),
    "tensorrt": HeaderPackage(
        package="kernel-lens==2.0.1",
        command=(
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "kernel-lens==2.0.1",
        ),
        sha256="07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0",
        folder="kernel_lens/include/tensorrt",
        variable="TENSORRT_INCLUDE_DIR",
        header="NvInferRuntime.h",
    ),
}


def cache_folder() -> Path:
    """The user's cache of headers."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lmkan-deploy" / "headers"


def files_in(archive: Path, folder: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the regular files directly in a folder of a wheel or a compressed tar archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                name = PurePosixPath(info.filename)
                if str(name.parent) == folder and not info.is_dir():
                    yield name.name, wheel.read(info)
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if str(name.parent) == folder and member.isfile():
                source = tar.extractfile(member)
                assert source is not None
                yield name.name, source.read()


def extract_headers(archive: Path, folder: str, target: Path) -> int:
    """Copies the regular files directly in `folder` of the archive to `target`; returns their number."""
    count = 0
    for name, content in files_in(archive, folder):
        (target / name).write_bytes(content)
        count += 1
    return count


def download(package: HeaderPackage, folder: Path) -> None:
    """Downloads a package into a folder; without its client, says what to do instead."""
    program = package.command[0]
    fix = f"or set {package.variable} to a folder that has {package.header}"
    try:
        subprocess.run(package.command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SystemExit(
            f"expected {program} or {package.variable}, found neither; install {program}, {fix}"
        ) from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"expected a download by {shlex.join(package.command)}, found exit code {error.returncode}; "
            f"run it to see why, {fix}"
        ) from None


def fetch(package: HeaderPackage, target: Path) -> None:
    """Downloads a package and puts its headers into a new folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        print(f"downloading {package.package} for its headers", file=sys.stderr)
        download(package, Path(scratch))
        archives = list(Path(scratch).iterdir())
        if len(archives) != 1:
            raise SystemExit(f"expected one archive from {package.command}, found {archives}")
        found = hashlib.sha256(archives[0].read_bytes()).hexdigest()
        if found != package.sha256:
            raise SystemExit(f"{package.package}: expected sha256 {package.sha256}, found {found}")
        headers = Path(scratch) / "headers"
        headers.mkdir()
        if extract_headers(archives[0], package.folder, headers) == 0:
            raise SystemExit(f"{package.package}: expected headers in {package.folder}, found none")
        try:
            headers.rename(target)
        except OSError:  # another build was faster
            if not target.is_dir():
                raise


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runtime", choices=sorted(PACKAGES))
    package = PACKAGES[parser.parse_args().runtime]
    target = cache_folder() / package.package.replace("/", "-")
    if not target.is_dir():
        fetch(package, target)
    print(target)


if __name__ == "__main__":
    main()
