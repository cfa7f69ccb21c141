"""What an engine was built from and for: a JSON file beside it, checked before the engine is opened.

TensorRT refuses an engine of another release or GPU itself, but late and in words that say nothing of the
fix; and it can't know that the plugin library or the engine's file is not the one it was built with.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lmkan_deploy.engines.profiles import Profile, ShapeRange
from lmkan_deploy.errors import EngineError
from lmkan_deploy.staging import file_sha256
from lmkan_deploy.version import __version__

FORMAT = 2
"""Version of the file's format."""


@dataclass(frozen=True)
class Manifest:
    """Origin and requirements of an engine.

    Attributes:
        runtime: "tensorrt" or "tensorrt-rtx".
        runtime_version: Its release, which must run the engine too.
        cuda_version: Release of the CUDA driver's interface at the build, such as 13000; None without a
            driver.
        compute_capability: Of the GPU that it was tuned for, such as "9.0"; None where it fits every GPU
            of the runtime.
        plugin_sha256: Of the plugin library; None where the engine needs none.
        model: Name of the ONNX file.
        model_sha256: Of that file.
        engine_sha256: Of the engine's file.
        profiles: What it is tuned for; TensorRT knows them by their numbers.
        axes: Name of an input or output -> its shape, names for free axes, which TensorRT does not keep.
        lookup_layers: Number of lookup layers.
        lmkan_deploy: Release that built it.
        format: See `FORMAT`.
    """

    runtime: str
    runtime_version: str
    cuda_version: int | None
    compute_capability: str | None
    plugin_sha256: str | None
    model: str
    model_sha256: str
    engine_sha256: str
    profiles: list[Profile]
    axes: dict[str, tuple[int | str | None, ...]]
    lookup_layers: int
    lmkan_deploy: str = __version__
    format: int = field(default=FORMAT)

    def to_json(self) -> dict[str, Any]:
        """The same as plain types."""
        return asdict(self)


def manifest_path(engine: Path) -> Path:
    """The manifest of an engine: the same name with `.json` appended."""
    return Path(f"{engine}.json")


def read_manifest(engine: Path) -> Manifest:
    """Reads an engine's manifest.

    Raises:
        EngineError: The engine or the manifest is missing, or the manifest is not one of this release's.
    """
    path = manifest_path(engine)
    if not engine.is_file():
        raise EngineError(f"expected an engine, found no file {engine}")
    if not path.is_file():
        raise EngineError(
            f"expected a manifest beside the engine, found no file {path}; keep the two together, or build "
            "the engine again with lmkan-deploy build"
        )
    try:
        content = json.loads(path.read_text())
        if content.get("format") != FORMAT:
            raise EngineError(
                f"expected a manifest of format {FORMAT}, found {content.get('format')} in {path}; build the "
                "engine again with this release of lmkan-deploy"
            )
        profiles: list[Profile] = [
            {name: ShapeRange(*map(tuple, shapes.values())) for name, shapes in profile.items()}
            for profile in content.pop("profiles")
        ]
        axes = {name: tuple(shape) for name, shape in content.pop("axes").items()}
        return Manifest(profiles=profiles, axes=axes, **content)
    except (OSError, UnicodeDecodeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise EngineError(f"expected the manifest of an engine, could not read {path}: {error}") from error


def check_manifest(
    engine: Path,
    manifest: Manifest,
    *,
    runtime_version: str,
    compute_capability: str | None,
    plugin: Path | None,
) -> None:
    """Refuses an engine that this machine can't run.

    Args:
        engine: Its file.
        manifest: Its manifest.
        runtime_version: Release of the installed runtime.
        compute_capability: Of the GPU; None where there is none.
        plugin: The plugin library that will be loaded.

    Raises:
        EngineError: With what differs, and the fix.
    """
    again = "build the engine again here with lmkan-deploy build"
    if runtime_version != manifest.runtime_version:
        raise EngineError(
            f"expected {manifest.runtime} {manifest.runtime_version}, which built {engine}, found "
            f"{runtime_version}; install that release, or {again}"
        )
    if manifest.compute_capability not in (None, compute_capability):
        found = "no GPU" if compute_capability is None else f"compute capability {compute_capability}"
        raise EngineError(
            f"expected a GPU of compute capability {manifest.compute_capability}, for which {engine} was "
            f"built, found {found}; {again}"
        )
    if file_sha256(engine) != manifest.engine_sha256:
        raise EngineError(
            f"expected the engine that its manifest describes, found another or a damaged file {engine}; copy "
            f"both again, or {again}"
        )
    if manifest.plugin_sha256 is not None:
        found = "none" if plugin is None else file_sha256(plugin)
        if found != manifest.plugin_sha256:
            raise EngineError(
                f"expected the plugin library that {engine} was built with (SHA-256 "
                f"{manifest.plugin_sha256[:12]}), found {found[:12]}; install that one, or {again}"
            )
