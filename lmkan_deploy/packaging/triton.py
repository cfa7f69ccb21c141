"""Model repositories for Triton's ONNX Runtime and TensorRT backends."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from lmkan_deploy.engines.manifest import Manifest, manifest_path
from lmkan_deploy.errors import LibraryError
from lmkan_deploy.packaging.source import (
    LIBRARY,
    PackageError,
    Settings,
    Source,
    copy_library,
    copy_model,
    tensor_table,
    write_template,
)
from lmkan_deploy.packaging.triton_config import triton_config
from lmkan_deploy.staging import file_sha256


def write(source: Source, settings: Settings, folder: Path) -> list[str]:
    """Writes a repository; returns the commands that start it."""
    path = settings.repository_path
    # It goes into commands as it is, so that nothing in it may mean something to a shell.
    if path is not None and not re.fullmatch(r"/[A-Za-z0-9/._+-]*", path):
        raise PackageError(
            f"expected an absolute --repository-path of letters, digits and / . _ + -, found {path!r}"
        )
    if source.manifest is None:
        if settings.plugin is not None:
            raise PackageError(
                f"expected an engine with --plugin, found the ONNX file {source.path}; leave it out"
            )
        return _write_onnx(source, settings, folder)
    return _write_engine(source, source.manifest, settings, folder)


def _write_onnx(source: Source, settings: Settings, folder: Path) -> list[str]:
    model = folder / settings.name
    copy_model(source, model / "1")
    copy_library(model)
    threads = [] if settings.threads is None else [("intra_op_thread_count", str(settings.threads))]
    config = triton_config(
        source,
        settings,
        'backend: "onnxruntime"',
        max_batch=settings.max_batch if source.joins else 0,
        libraries=[_on_server(settings, LIBRARY)],
        parameters=threads,
    )
    (model / "config.pbtxt").write_text(config, encoding="utf-8")
    start = _start(settings)
    write_template(
        "triton_readme.md.in",
        folder / "README.md",
        name=settings.name,
        command="\n".join(start),
        where=_where(settings),
        workdir=settings.repository_path or "/models",
        tensors=tensor_table(source),
        joins=_joins(source.joins),
    )
    return start


def _write_engine(source: Source, manifest: Manifest, settings: Settings, folder: Path) -> list[str]:
    if manifest.runtime != "tensorrt":
        raise PackageError(
            f"expected an engine for tensorrt, which Triton runs, found one for {manifest.runtime}; build it "
            "with lmkan-deploy build --runtime tensorrt, or package the ONNX file"
        )
    if settings.threads is not None:
        raise PackageError(
            f"expected an ONNX file with --threads, found the engine {source.path}, which runs on the GPU; "
            "leave it out"
        )
    if settings.plugin is not None and manifest.plugin_sha256 is None:
        raise PackageError(
            f"expected an engine that needs a plugin with --plugin, found {source.path}, which needs none; "
            "leave it out"
        )
    model = folder / settings.name
    (model / "1").mkdir(parents=True)
    shutil.copyfile(source.path, model / "1" / "model.plan")
    shutil.copyfile(manifest_path(source.path), model / "engine.json")
    options = []
    if manifest.plugin_sha256 is not None:
        library = _copy_plugin(manifest, settings, model)
        options = [f"--backend-config=tensorrt,plugins={_on_server(settings, library)}"]
    config = triton_config(
        source,
        settings,
        'platform: "tensorrt_plan"',
        max_batch=_engine_batch(source, manifest, settings),
        gpu=True,
        profiles=len(manifest.profiles),
    )
    (model / "config.pbtxt").write_text(config, encoding="utf-8")
    start = _start(settings, *options)
    write_template(
        "triton_engine_readme.md.in",
        folder / "README.md",
        name=settings.name,
        command="\n".join(start),
        where=_where(settings),
        release=manifest.runtime_version,
        capability=manifest.compute_capability or "any",
        tensors=tensor_table(source),
        joins=_joins(_engine_batch(source, manifest, settings) > 0),
    )
    return start


def _engine_batch(source: Source, manifest: Manifest, settings: Settings) -> int:
    """Most rows that the profiles and the user allow; 0 where requests can't be joined."""
    if source.inputs and not source.joins:
        return 0
    # Triton may hand over any number of rows from 1 on, in all inputs.
    reach = 0
    for smallest, largest in sorted(_row_ranges(manifest)):
        if smallest <= reach + 1:
            reach = max(reach, largest)
    return min(settings.max_batch, reach) if reach > 1 else 0


def _row_ranges(manifest: Manifest) -> Iterator[tuple[int, int]]:
    """Fewest and most rows of each profile whose inputs all have the same."""
    for profile in manifest.profiles:
        ranges = {(p.smallest[0], p.largest[0]) if p.smallest else (0, 0) for p in profile.values()}
        if len(ranges) == 1:
            yield next(iter(ranges))


def _copy_plugin(manifest: Manifest, settings: Settings, folder: Path) -> str:
    """Puts the plugin library, and what registers it, into a folder; returns the latter's name."""
    plugin = settings.plugin or _find_plugin(manifest)
    register = plugin.with_name(f"{plugin.stem}_register.so")
    for file in (plugin, register):
        if not file.is_file():
            raise PackageError(
                f"expected the plugin library that the engine was built with, found no file {file}; pass "
                "--plugin, or make it with lmkan-deploy plugins build"
            )
    found = file_sha256(plugin)
    if found != manifest.plugin_sha256:
        raise PackageError(
            f"expected the plugin library that the engine was built with (SHA-256 {manifest.plugin_sha256}), "
            f"found {found} in {plugin}; pass that one with --plugin, or build the engine again"
        )
    for file in (plugin, register):
        shutil.copyfile(file, folder / file.name)
    return register.name


def _find_plugin(manifest: Manifest) -> Path:
    from lmkan_deploy.runtime.tensorrt_plugin import find_tensorrt_plugin

    try:
        return find_tensorrt_plugin(manifest.runtime_version)
    except LibraryError as error:
        raise PackageError(f"{error}, or pass --plugin") from error


def _on_server(settings: Settings, library: str) -> str:
    """How the server is told of a library: relative to its working folder, or by its full path."""
    path = PurePosixPath(settings.name, library)
    return str(path if settings.repository_path is None else PurePosixPath(settings.repository_path) / path)


def _start(settings: Settings, *options: str) -> list[str]:
    repository = settings.repository_path or "."
    return [" ".join(["tritonserver", f"--model-repository={repository}", *options])]


def _where(settings: Settings) -> str:
    if settings.repository_path is None:
        return "Start it inside this folder: the library is named relative to the server's working folder."
    path = settings.repository_path
    return f"This folder must lie at `{path}` on the server: the library is named by that path."


def _joins(joins: bool) -> str:
    if joins:
        return "Requests that arrive together are joined along the first axis."
    return "Each request runs alone, since not all tensors lead with the same free axis."
