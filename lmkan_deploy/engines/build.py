"""Builds a TensorRT engine from an ONNX model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmkan_deploy.converters.model_file import load_model, temporary_model
from lmkan_deploy.converters.onnx_function import attach_function, is_lookup, is_quantized_lookup
from lmkan_deploy.converters.passes.base import dtype_name
from lmkan_deploy.converters.table_dtype import dequantize_tables, store_scales
from lmkan_deploy.engines.device import compute_capability, cuda_version, require_gpu
from lmkan_deploy.engines.manifest import Manifest, manifest_path
from lmkan_deploy.engines.plugin import find_plugin, load_plugin
from lmkan_deploy.engines.profiles import Profile, make_profiles
from lmkan_deploy.engines.tensorrt_api import EngineRuntime, import_tensorrt, last_errors, make_log
from lmkan_deploy.errors import EngineError
from lmkan_deploy.progress import Progress, Step, no_progress
from lmkan_deploy.runtime.tensors import TensorSpec
from lmkan_deploy.spec import DOMAIN
from lmkan_deploy.staging import file_sha256, output_file, reported, staging_folder

if TYPE_CHECKING:
    import onnx_ir as ir


def build_engine(
    model: str | Path,
    output: str | Path,
    *,
    runtime: EngineRuntime = "tensorrt",
    shapes: Sequence[str] = (),
    timing_cache: str | Path | None = None,
    plugin: str | Path | None = None,
    progress: Progress = no_progress,
) -> Manifest:
    """Builds a strongly typed engine: types are those of the ONNX model.

    The engine and its manifest appear complete, or not at all.

    Args:
        model: An ONNX file.
        output: The engine to write, which ends in .engine; the manifest gets the same name with `.json` appended.
        runtime: What will run it; see `EngineRuntime`.
        shapes: See `make_profiles`.
        timing_cache: File of measured kernel timings, read if it exists and written afterwards, so that the
            next build is faster. TensorRT only.
        plugin: The plugin library for TensorRT; by default the package's.
        progress: Called at each step.

    Returns:
        The manifest.

    Raises:
        ModelError: The model can't be read, or a file can't be written.
        EngineError: A shape does not fit, or TensorRT refuses the model.
        LibraryError: TensorRT, the plugin library, or the GPU that TensorRT needs is missing.
    """
    path = output_file(output)
    if path.suffix != ".engine":
        raise EngineError(
            f"expected an output that ends in .engine, by which run, verify and serve know engines, found {path}"
        )
    trt = import_tensorrt(runtime)
    capability = require_gpu(compute_capability()) if runtime == "tensorrt" else None
    progress(Step("loading"))
    source = load_model(Path(model))
    if path.exists() and path.samefile(model):
        raise EngineError(f"expected an output other than the model itself, found {path}; pass -o")
    inputs = [_spec(value) for value in source.graph.inputs]
    profiles = make_profiles(inputs, shapes)
    log = make_log(trt)
    library = find_plugin(trt, plugin) if runtime == "tensorrt" else None
    builder = trt.Builder(log)  # from which TensorRT has the log
    if library is not None:
        load_plugin(trt, log, library)
    _prepare(source, with_functions=library is None)
    layers = sum(is_lookup(node) or is_quantized_lookup(node) for node in source.graph.all_nodes())
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, log)
    progress(Step("parsing"))
    with temporary_model(source, path) as file:
        parsed = parser.parse_from_file(str(file))
    if not parsed:
        problems = [_describe(parser.get_error(i)) for i in range(parser.num_errors)]
        raise EngineError(f"{runtime} could not parse {model}: {'; '.join(problems) or last_errors(log)}")
    if library is not None:
        _require_plugins(trt, network, layers)
    config = builder.create_builder_config()
    for profile in profiles:
        config.add_optimization_profile(_to_tensorrt(builder, profile))
    config.progress_monitor = monitor = _make_monitor(trt, progress)
    with _timing_cache(config, runtime, timing_cache):
        serialized = builder.build_serialized_network(network, config)
    if monitor.error is not None:
        raise monitor.error
    if serialized is None:
        raise EngineError(f"{runtime} could not build an engine from {model}: {last_errors(log)}")
    ends = (*source.graph.inputs, *source.graph.outputs)
    with staging_folder(path) as folder, reported(path):
        staged = folder / path.name
        staged.write_bytes(memoryview(serialized))
        manifest = Manifest(
            runtime=runtime,
            runtime_version=str(trt.__version__),
            cuda_version=cuda_version(),
            compute_capability=capability,
            plugin_sha256=None if library is None else file_sha256(library),
            model=Path(model).name,
            model_sha256=file_sha256(Path(model)),
            engine_sha256=file_sha256(staged),
            profiles=profiles,
            axes={str(value.name): _axes(value.shape) for value in ends if value.shape is not None},
            lookup_layers=layers,
        )
        description = folder / manifest_path(path).name
        description.write_text(json.dumps(manifest.to_json(), indent=2) + "\n")
        # The engine first: a manifest without its engine would describe an older one.
        staged.replace(path)
        description.replace(manifest_path(path))
    return manifest


def _describe(error: Any) -> str:
    return f"{error.node_operator()} node {error.node_name()!r}: {error.desc()}"


def _spec(value: ir.Value) -> TensorSpec:
    if value.shape is None or value.dtype is None:
        raise EngineError(f"expected an input of known rank and type, found {value.name} without")
    return TensorSpec(str(value.name), _axes(value.shape), dtype_name(value.dtype))


def _axes(shape: ir.Shape) -> tuple[int | str | None, ...]:
    return tuple(size if isinstance(size, int) else size.value for size in shape)


def _prepare(model: ir.Model, *, with_functions: bool) -> None:
    """The form that a parser needs: with the functions where there is no plugin, without where there is one,
    because which of the two wins depends on TensorRT's release.
    """
    if with_functions:
        dequantize_tables(model)  # TensorRT takes int8 constants for plugins alone
        attach_function(model)
        return
    store_scales(model)
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]


def _strongly_typed(trt: Any) -> int:
    """The creation flags; releases that know no other networks have no flag."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _require_plugins(trt: Any, network: Any, expected: int) -> None:
    """Every lookup layer is a plugin, not something that the parser made of it."""
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    found = sum(kind == trt.LayerType.PLUGIN_V3 for kind in kinds)
    if found < expected:
        raise EngineError(
            f"expected {expected} lookup layers as plugins, found {found} in TensorRT's network; build the "
            "plugin library for this release of TensorRT"
        )


def _to_tensorrt(builder: Any, profile: Profile) -> Any:
    result = builder.create_optimization_profile()
    for name, shapes in profile.items():
        result.set_shape(name, shapes.smallest, shapes.typical, shapes.largest)
    return result


def _make_monitor(trt: Any, progress: Progress) -> Any:
    """Reports TensorRT's phases, and stops the build when the report raises, as Ctrl-C does."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.error: BaseException | None = None
            self._phases: dict[str, Step] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            text = phase_name if parent_phase is None else f"{parent_phase}: {phase_name}"
            self._phases[phase_name] = Step(text, 0, num_steps)
            self._report(self._phases[phase_name])

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._phases:
                self._report(dataclasses.replace(self._phases[phase_name], done=step + 1))
            return self.error is None

        def _report(self, step: Step) -> None:
            try:
                progress(step)
            except BaseException as error:  # must not cross TensorRT
                self.error = error

    return Monitor()


@contextlib.contextmanager
def _timing_cache(config: Any, runtime: EngineRuntime, file: str | Path | None) -> Iterator[None]:
    if file is None:
        yield
        return
    if runtime != "tensorrt":
        raise EngineError(
            f"expected no timing cache for {runtime}, which measures nothing at the build; leave out "
            "--timing-cache"
        )
    path = output_file(file)
    with reported(path):
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise EngineError(
            f"expected a timing cache of this TensorRT and GPU, found another file {path}; remove it, or name "
            "another"
        )
    yield
    with staging_folder(path) as folder, reported(path):
        (folder / path.name).write_bytes(memoryview(config.get_timing_cache().serialize()))
        (folder / path.name).replace(path)
