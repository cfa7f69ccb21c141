"""Files that appear complete, or not at all; and hashes of files."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmkan_deploy.errors import ModelError


def output_file(path: str | Path) -> Path:
    """The file that writing to a path makes or replaces: the path itself, or what a link points to.

    Raises:
        ModelError: It is a folder or a device, or its folder is missing or can't be written.
    """
    path = Path(path)
    with reported(path):
        if path.is_symlink():
            path = Path(os.path.realpath(path))
        if path.is_symlink() or (path.exists() and not path.is_file()):
            kind = "folder" if path.is_dir() else "loop of links" if path.is_symlink() else "device"
            raise ModelError(f"expected a file to write, found the {kind} {path}")
        if not path.parent.is_dir():
            raise ModelError(f"expected a writable folder for {path}, found no folder {path.parent}")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise ModelError(f"expected a writable folder for {path}, found no permission to write there")
    return path


@contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """A folder beside a path, on the same file system; removed at the end of the block.

    Raises:
        ModelError: It can't be made.
    """
    with reported(path):
        folder = Path(tempfile.mkdtemp(prefix=".lmkan-", dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Makes the system's errors in the block the user's."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"could not write {path}: {error.strerror or error}") from error


def file_sha256(path: Path) -> str:
    """Hexadecimal hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
