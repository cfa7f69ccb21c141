"""Writes a folder in one of the formats: complete, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lmkan_deploy.errors import InputError, ModelError
from lmkan_deploy.model_name import check_model_name
from lmkan_deploy.packaging import kserve, ray, triton, triton_python
from lmkan_deploy.packaging.source import PackageError, Settings, Source, read_source
from lmkan_deploy.staging import reported, staging_folder

FormatName = Literal["triton", "triton-python", "kserve", "ray"]
"""``triton``: repository for Triton's ONNX Runtime or TensorRT backend; ``triton-python``: for its Python
backend; ``kserve``: Kubernetes manifests and a Dockerfile; ``ray``: Ray Serve application."""

DEFAULT_MAX_BATCH = 1024
DEFAULT_MAX_DELAY_US = 100

# Those of `lmkan-deploy serve`, which the KServe format starts.
MAX_BATCH = 2**24
MAX_DELAY_US = 10**7

_FORMATS_WITH = {
    "--repository-path": ("triton",),
    "--plugin": ("triton",),
    "--image": ("kserve",),
    "--wheel": ("kserve", "ray"),
}
"""Options that not all formats have, and those which do."""

_WRITERS: dict[str, Callable[[Source, Settings, Path], list[str]]] = {
    "triton": triton.write,
    "triton-python": triton_python.write,
    "kserve": kserve.write,
    "ray": ray.write,
}


@dataclass(frozen=True)
class PackageResult:
    """What was written.

    Attributes:
        path: The folder.
        format: See `FormatName`.
        name: The model's name on the server.
        files: Every file, relative to the folder.
        start: Shell commands that start a server, from inside the folder; README.md there says more.
    """

    path: Path
    format: str
    name: str
    files: list[str]
    start: list[str]

    def to_json(self) -> dict[str, Any]:
        """The same as plain types."""
        return {**asdict(self), "path": str(self.path)}


def package_model(
    model: str | Path,
    output: str | Path,
    *,
    format: FormatName = "triton",  # noqa: A002
    name: str | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    max_delay_us: int = DEFAULT_MAX_DELAY_US,
    threads: int | None = None,
    repository_path: str | None = None,
    plugin: str | Path | None = None,
    image: str | None = None,
    wheel: str | Path | None = None,
) -> PackageResult:
    """Writes a folder that a server is started from.

    Args:
        model: An ONNX file; for `triton` also a TensorRT engine (.engine) beside its manifest.
        output: The folder to make; it may exist if it is empty.
        format: See `FormatName`.
        name: The model's name on the server; the file's name without its suffix by default.
        max_batch: Most rows of one run. Models whose tensors do not all lead with the same free axis run each
            request alone.
        max_delay_us: Microseconds that a request waits for others.
        threads: Threads of one run of an ONNX file; None leaves the choice to the runtime.
        repository_path: For `triton`, where the repository will lie on the server, so that it may be started
            anywhere; by default it is started inside the repository.
        plugin: For an engine, the plugin library that it was built with, where not the package's own.
        image: For `kserve`, the name of the container image.
        wheel: For `kserve` and `ray`, a wheel of this package to put into the folder.

    Raises:
        LmkanError: The model can't be read, does not fit the format, the format does not have an option, or the
            folder can't be written.
    """
    path = Path(model)
    if format not in get_args(FormatName):
        raise PackageError(f"expected a format of {', '.join(get_args(FormatName))}, found {format!r}")
    given = {"--repository-path": repository_path, "--plugin": plugin, "--image": image, "--wheel": wheel}
    for option, formats in _FORMATS_WITH.items():
        if given[option] is not None and format not in formats:
            raise PackageError(
                f"expected {option} with the format {' or '.join(formats)}, found it with {format}; leave it out"
            )
    for what, number, least, most in (
        ("--max-batch", max_batch, 1, MAX_BATCH),
        ("--max-delay-us", max_delay_us, 0, MAX_DELAY_US),
        ("--threads", 1 if threads is None else threads, 1, 1024),
    ):
        if not least <= number <= most:
            raise PackageError(f"expected {what} of {least} to {most}, found {number}")
    settings = Settings(
        name=_checked_name(path.stem if name is None else name),
        max_batch=max_batch,
        max_delay_us=max_delay_us,
        threads=threads,
        repository_path=repository_path,
        plugin=None if plugin is None else Path(plugin),
        image=image,
        wheel=None if wheel is None else Path(wheel),
    )
    target = _new_folder(Path(output))
    source = read_source(path)
    with staging_folder(target) as staging, reported(target):
        folder = staging / "package"  # the staging folder itself is the user's alone
        folder.mkdir()
        start = _WRITERS[format](source, settings, folder)
        files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        folder.replace(target)
    return PackageResult(Path(output), format, settings.name, files, start)


def _checked_name(name: str) -> str:
    try:
        return check_model_name(name)
    except InputError as error:
        raise PackageError(f"{error}; pass --name") from error


def _new_folder(output: Path) -> Path:
    """The absolute path of a folder that can be made, or replaced because nothing is in it."""
    with reported(output):
        target = Path(os.path.realpath(output))
        if target.exists():
            if not target.is_dir():
                raise ModelError(
                    f"expected a folder to write, found the file {output}; choose another --output"
                )
            if any(target.iterdir()):
                raise ModelError(
                    f"expected a new or empty folder, found files in {output}; choose another --output, or move "
                    "them away"
                )
        if not target.parent.is_dir():
            raise ModelError(
                f"expected a writable folder for {output}, found no folder {target.parent}; make it first"
            )
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise ModelError(
                f"expected a writable folder for {output}, found no permission to write in {target.parent}; "
                "choose another --output"
            )
    return target
