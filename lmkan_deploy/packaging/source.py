"""What every format starts from: the model's tensors, the user's settings, and how files get into the folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from lmkan_deploy.errors import LmkanError
from lmkan_deploy.runtime.tensors import TensorSpec
from lmkan_deploy.version import __version__

if TYPE_CHECKING:
    from lmkan_deploy.engines.manifest import Manifest

LIBRARY = "liblmkan_onnxruntime.so"
"""Name of the custom-op library in a package."""

MODEL = "model.onnx"
"""Name of an ONNX file in a package; its external data is `model.onnx.data`."""

DATATYPES = {
    "float16": "FP16",
    "bfloat16": "BF16",
    "float32": "FP32",
    "float64": "FP64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "bool": "BOOL",
}
"""This package's names of element types, and the Open Inference Protocol's."""

_TEMPLATES = Path(__file__).parent / "templates"
_EXTERNAL_TENSOR_BYTES = 1024


class PackageError(LmkanError):
    """A model can't be packaged in a format, or not with these settings."""


@dataclass(frozen=True)
class Settings:
    """What the user may choose.

    Attributes:
        name: The model's name on the server.
        max_batch: Most rows of one run.
        max_delay_us: Microseconds that a request waits for others.
        threads: Threads of one run; None leaves the choice to the runtime.
        repository_path: Where a Triton repository will lie on the server; None where it starts inside it.
        plugin: TensorRT plugin library; None finds the one that the engine was built with.
        image: Container image for KServe; None for one named like the model.
        wheel: Wheel of this package to put into the folder.
    """

    name: str
    max_batch: int
    max_delay_us: int
    threads: int | None = None
    repository_path: str | None = None
    plugin: Path | None = None
    image: str | None = None
    wheel: Path | None = None


@dataclass(frozen=True)
class Source:
    """The model to package.

    Attributes:
        path: An ONNX file or an engine.
        inputs: Its inputs; empty where only the engine itself knows them.
        outputs: Its outputs; likewise.
        manifest: Of an engine; None for an ONNX file.
        has_external_data: Whether an ONNX file's weights lie in another file.
    """

    path: Path
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    manifest: Manifest | None = None
    has_external_data: bool = False

    @property
    def joins(self) -> bool:
        """Whether requests can be joined: every tensor leads with the same free axis."""
        axes = {spec.shape[0] if spec.shape else 0 for spec in (*self.inputs, *self.outputs)}
        return len(axes) == 1 and isinstance(next(iter(axes)), str)


def read_source(path: Path) -> Source:
    """Reads what a model expects and returns.

    Raises:
        ModelError: The ONNX file can't be read.
        EngineError: The engine or its manifest can't be read.
        PackageError: It is neither, or has tensors that servers have no type for.
    """
    if path.suffix == ".engine":
        return _read_engine(path)
    if path.suffix != ".onnx" and path.is_file():
        raise PackageError(f"expected an .onnx or .engine file, found {path}; rename it, or export it first")
    import onnx_ir as ir

    from lmkan_deploy.converters.model_file import load_model

    model = load_model(path)
    graph = model.graph
    # Old files list their weights as inputs too.
    inputs = [_spec(value) for value in graph.inputs if value.name not in graph.initializers]
    weights = (value.const_value for value in graph.initializers.values())
    external = any(isinstance(tensor, ir.ExternalTensor) for tensor in weights)
    return Source(path, inputs, [_spec(value) for value in graph.outputs], None, external)


def _read_engine(path: Path) -> Source:
    from lmkan_deploy.engines.manifest import read_manifest
    from lmkan_deploy.staging import file_sha256

    manifest = read_manifest(path)
    if file_sha256(path) != manifest.engine_sha256:
        raise PackageError(
            f"expected the engine that its manifest describes, found another or a damaged file {path}; copy both "
            "again, or build the engine again with lmkan-deploy build"
        )
    # The manifest has no types and no outputs: the ONNX file that it names has, if it is still at hand.
    model = path.parent / Path(manifest.model).name
    if model.suffix == ".onnx" and model.is_file() and file_sha256(model) == manifest.model_sha256:
        origin = read_source(model)
        return Source(path, origin.inputs, origin.outputs, manifest)
    return Source(path, [], [], manifest)


def _spec(value: object) -> TensorSpec:
    import onnx_ir as ir

    from lmkan_deploy.converters.passes.base import dtype_name

    assert isinstance(value, ir.Value)
    dtype = "unknown" if value.dtype is None else dtype_name(value.dtype)
    if value.shape is None or dtype not in DATATYPES:
        found = "an unknown number of axes" if value.shape is None else f"type {dtype}"
        raise PackageError(
            f"expected tensors of a known shape and of type {', '.join(DATATYPES)}, found {found} in "
            f"{value.name}; export the model with others"
        )
    shape = tuple(size if isinstance(size, int) else size.value for size in value.shape)
    return TensorSpec(str(value.name), shape, dtype)


def require_onnx(source: Source, format_name: str) -> None:
    """Refuses engines.

    Raises:
        PackageError: The model is one.
    """
    if source.manifest is not None:
        raise PackageError(
            f"expected an .onnx file for the format {format_name}, found the engine {source.path}; pass the "
            "model that it was built from, or --format triton"
        )


def copy_model(source: Source, folder: Path) -> None:
    """Puts an ONNX file into a folder as `MODEL`, with its weights beside it."""
    target = folder / MODEL
    folder.mkdir(parents=True, exist_ok=True)
    if not source.has_external_data:
        shutil.copyfile(source.path, target)
        return
    import onnx_ir as ir

    from lmkan_deploy.converters.model_file import load_model

    # Written anew, since the file names where its weights are.
    model = load_model(source.path)
    ir.save(model, target, external_data=f"{MODEL}.data", size_threshold_bytes=_EXTERNAL_TENSOR_BYTES)


def copy_library(folder: Path) -> None:
    """Puts the custom-op library into a folder as `LIBRARY`.

    Raises:
        LibraryError: It is missing, or of another release.
    """
    from lmkan_deploy.runtime.libraries import get_library_path

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(get_library_path("onnxruntime"), folder / LIBRARY)


def put_wheel(settings: Settings, folder: Path) -> None:
    """Makes the folder that pip finds this package in, with the wheel where the user has one.

    Raises:
        PackageError: It is not a wheel of this release.
    """
    folder.mkdir(parents=True)
    wheel = settings.wheel
    if wheel is None:
        write_template("wheels_readme.md.in", folder / "README.md", version=__version__)
        return
    if not wheel.is_file() or not re.fullmatch(
        rf"lmkan_deploy-{re.escape(__version__)}(-[^-]+){{3,4}}\.whl", wheel.name
    ):
        raise PackageError(
            f"expected a wheel lmkan_deploy-{__version__}-....whl, found {wheel}; make one with pip wheel "
            "--no-deps in a checkout of this release"
        )
    shutil.copyfile(wheel, folder / wheel.name)


def write_template(template: str, target: Path, **values: object) -> None:
    """Fills in one of the files in `templates`.

    Args:
        template: Its name; `.in` files have `$name` places, others are copied as they are.
        target: The file to write.
        values: For the places.
    """
    text = (_TEMPLATES / template).read_text(encoding="utf-8")
    if template.endswith(".in"):
        text = Template(text).substitute({key: str(value) for key, value in values.items()})
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


def tensor_table(source: Source) -> str:
    """Inputs and outputs as a list in Markdown."""
    if not source.inputs:
        return "Inputs and outputs are those of the engine."
    lines = [f"- input `{spec}`" for spec in source.inputs]
    return "\n".join([*lines, *(f"- output `{spec}`" for spec in source.outputs)])
