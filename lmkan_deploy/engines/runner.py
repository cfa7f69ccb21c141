"""Runs a TensorRT engine; device memory and streams are pycuda's."""

from __future__ import annotations

import contextlib
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmkan_deploy.engines.batches import Part, padded_sizes, row_range, split_batch
from lmkan_deploy.engines.cuda_graph import import_driver
from lmkan_deploy.engines.device import compute_capability, require_gpu
from lmkan_deploy.engines.device_tensors import LEGACY_STREAM, device_interface, wait_for_stream
from lmkan_deploy.engines.gpu import Gpu, OnGpu
from lmkan_deploy.engines.lane import MAX_GRAPHS, DeviceArray, GraphLane, Lane, LoadedEngine
from lmkan_deploy.engines.manifest import check_manifest, read_manifest
from lmkan_deploy.engines.plugin import find_plugin, load_plugin
from lmkan_deploy.engines.tensorrt_api import EngineRuntime, import_tensorrt, last_errors, make_log
from lmkan_deploy.errors import EngineError, InputError
from lmkan_deploy.runtime.tensors import (
    Arrays,
    TensorSpec,
    check_input_shapes,
    check_inputs,
    numpy_dtype,
    rows_are_free,
)

# TensorRT's type names and NumPy's.
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


MAX_IDLE_LANES = 8
"""Lanes that are kept; a burst of more calls at the same time gives up what it needed besides."""


class EngineRunner:
    """An engine on one GPU. Calls at the same time have execution contexts and streams of their own.

    Args:
        path: The engine; its manifest lies beside it.
        plugin: The plugin library; by default the package's.
        device: Number of the GPU.
        cuda_graphs: Whether to run with a CUDA graph for each shape, which saves the launches of many small
            kernels; the first run of a shape takes longer. Of each context the last 32 shapes are kept.
        pad_batches: Whether `run` pads batches with rows of zeros to a few sizes, so that there are few shapes.
            Only where rows do not depend on each other.

    Attributes:
        batch_sizes: What batches are padded to, ascending; None where they run as they are.

    Raises:
        EngineError: The engine does not fit this machine; see `check_manifest`.
        LibraryError: TensorRT, pycuda, the plugin or a GPU is missing.
    """

    def __init__(
        self,
        path: Path,
        *,
        plugin: str | Path | None = None,
        device: int = 0,
        cuda_graphs: bool = False,
        pad_batches: bool = False,
    ) -> None:
        manifest = read_manifest(path)
        runtime: EngineRuntime = manifest.runtime  # type: ignore[assignment]
        trt = import_tensorrt(runtime)
        log = make_log(trt)
        library = find_plugin(trt, plugin) if manifest.plugin_sha256 is not None else None
        capability = compute_capability(device)
        check_manifest(
            path,
            manifest,
            runtime_version=str(trt.__version__),
            compute_capability=capability,
            plugin=library,
        )
        if runtime == "tensorrt":
            require_gpu(capability)
        loader = trt.Runtime(log)  # from which TensorRT has the log
        if library is not None:
            load_plugin(trt, log, library)
        gpu = Gpu(device)
        if cuda_graphs and runtime == "tensorrt":
            import_driver()
        with gpu.current():
            engine = loader.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise EngineError(f"{runtime} could not open {path}: {last_errors(log)}")
        self.name = runtime
        specs = {True: [], False: []}  # type: dict[bool, list[TensorSpec]]
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            specs[is_input].append(_spec(engine, name, manifest.axes.get(name)))
        self.inputs, self.outputs = specs[True], specs[False]
        self._profiles = manifest.profiles
        pads = pad_batches and rows_are_free(self.inputs, self.outputs)
        self.batch_sizes = padded_sizes(self.inputs, self._profiles, MAX_GRAPHS) if pads else None
        self._loaded = LoadedEngine(runtime, trt, gpu, OnGpu(gpu, engine), log, self.inputs, self.outputs)
        self._new_lane = GraphLane if cuda_graphs else Lane
        self._idle_lanes: deque[Lane | GraphLane] = deque()  # whose append and pop need no lock

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """See `Runner.run`. Batches run with the profile whose typical shapes are nearest; those that no profile
        takes at once are split.
        """
        check_inputs(self.inputs, feeds)
        parts = self._parts({name: array.shape for name, array in feeds.items()}, self.batch_sizes)
        if not parts:
            return self._empty()
        with self._lane() as lane:
            results = [
                lane.run({name: _rows(array, part.rows) for name, array in feeds.items()}, part)
                for part in parts
            ]
        if len(results) == 1:
            return results[0]
        return {spec.name: np.concatenate([r[spec.name] for r in results]) for spec in self.outputs}

    def run_on_device(self, feeds: Mapping[str, Any], stream: int | None = None) -> dict[str, DeviceArray]:
        """Runs the engine on tensors that are on its GPU already: without a copy where they begin at multiples of
        256 bytes, or with one into and out of the memory of a CUDA graph.

        Args:
            feeds: Every input by name: contiguous objects with `__cuda_array_interface__`, of the engine's types
                and of shapes within one of its profiles.
            stream: Handle of the CUDA stream that writes the inputs, such as
                `torch.cuda.current_stream().cuda_stream`. None takes what the interfaces name, or else the legacy
                default stream, which is PyTorch's unless the program chooses another. The run begins when that
                stream has done its work.

        Returns:
            Every output by name, complete.

        Raises:
            InputError: An input is missing, not contiguous, or does not fit.
        """
        interfaces = {spec.name: device_interface(spec, feeds.get(spec.name)) for spec in self.inputs}
        shapes = {name: tuple(interface["shape"]) for name, interface in interfaces.items()}
        check_input_shapes(self.inputs, shapes)
        parts = self._parts(shapes)
        if len(parts) != 1:
            ranges = [row_range(self.inputs, profile) for profile in self._profiles]
            texts = " or ".join(f"{least} to {most}" for least, most in ranges)
            rows = shapes[self.inputs[0].name][0]
            raise InputError(f"expected {texts} rows on the GPU, found {rows}; split the batch")
        writers = {
            interface.get("stream", LEGACY_STREAM) if stream is None else stream or LEGACY_STREAM
            for interface in interfaces.values()
        }
        with self._lane() as lane:
            for writer in writers - {None}:  # which says that the contents are complete
                wait_for_stream(self._loaded.gpu, writer)
            addresses = {name: interface["data"][0] for name, interface in interfaces.items()}
            return lane.run_on_device(shapes, addresses, parts[0].profile)

    def _parts(self, shapes: Mapping[str, tuple[int, ...]], sizes: Sequence[int] | None = None) -> list[Part]:
        return list(split_batch(self.inputs, self.outputs, self._profiles, shapes, sizes))

    def _empty(self) -> Arrays:
        result = {}
        for spec in self.outputs:
            sizes = [size for size in spec.shape[1:] if isinstance(size, int)]
            if len(sizes) + 1 != len(spec.shape):
                raise InputError(
                    f"expected at least 1 row, found 0, for which the shape of {spec} is unknown"
                )
            result[spec.name] = np.empty((0, *sizes), numpy_dtype(spec.dtype))
        return result

    @contextlib.contextmanager
    def _lane(self) -> Iterator[Lane | GraphLane]:
        """A lane for one call; the one that was used last, whose graphs are there."""
        with self._loaded.gpu.current():
            try:
                lane = self._idle_lanes.pop()
            except IndexError:
                lane = self._new_lane(self._loaded)
            try:
                yield lane
            except InputError:  # the lane is as good as before
                lane.wait()
                self._idle_lanes.append(lane)
                raise
            except BaseException as error:
                # The error would keep what was made for the run; from Python 3.13 on, until a collection.
                traceback.clear_frames(error.__traceback__)
                lane.close()
                raise
            if len(self._idle_lanes) < MAX_IDLE_LANES:
                self._idle_lanes.append(lane)
            else:
                lane.close()


def _rows(array: NDArray[Any], rows: slice) -> NDArray[Any]:
    """Contiguous rows; all of an array without axes, which NumPy would give one."""
    return np.ascontiguousarray(array[rows]) if array.ndim else array


def _spec(engine: Any, name: str, axes: Sequence[int | str | None] | None) -> TensorSpec:
    """What TensorRT says of a tensor, and what it does not keep: the names of free axes."""
    dtype = _DTYPES.get(engine.get_tensor_dtype(name).name, "unknown")
    sizes = tuple(engine.get_tensor_shape(name))
    names = axes if axes is not None and len(axes) == len(sizes) else [None] * len(sizes)
    shape = [
        size if size >= 0 else axis if isinstance(axis, str) else None
        for size, axis in zip(sizes, names, strict=True)
    ]
    return TensorSpec(name, tuple(shape), dtype)
