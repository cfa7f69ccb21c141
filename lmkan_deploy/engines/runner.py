"""Runs a TensorRT engine; device memory and streams are pycuda's."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmkan_deploy.engines.batches import split_batch
from lmkan_deploy.engines.device import compute_capability
from lmkan_deploy.engines.manifest import check_manifest, read_manifest
from lmkan_deploy.engines.plugin import find_plugin, load_plugin
from lmkan_deploy.engines.tensorrt_api import EngineRuntime, import_tensorrt, last_errors, make_log
from lmkan_deploy.errors import EngineError, InputError, LibraryError
from lmkan_deploy.runtime.tensors import Arrays, TensorSpec, check_inputs, numpy_dtype

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


class DeviceArray:
    """A tensor in device memory, for everything that takes `__cuda_array_interface__`, such as
    `torch.as_tensor` and `cupy.asarray`.
    """

    def __init__(self, memory: Any, shape: tuple[int, ...], dtype: str) -> None:
        self._memory = memory  # keeps the allocation alive
        self.shape = shape
        self.dtype = dtype
        kind = np.dtype(np.uint16) if dtype == "bfloat16" else np.dtype(dtype)
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": kind.str,
            "data": (int(memory), False),
            "version": 3,
        }


class EngineRunner:
    """An engine on one GPU. Every thread that calls it gets an execution context and a stream of its own.

    Args:
        path: The engine; its manifest lies beside it.
        plugin: The plugin library; by default the package's.
        device: Number of the GPU.

    Raises:
        EngineError: The engine does not fit this machine; see `check_manifest`.
        LibraryError: TensorRT, pycuda, the plugin or a GPU is missing.
    """

    def __init__(self, path: Path, *, plugin: Path | None = None, device: int = 0) -> None:
        manifest = read_manifest(path)
        runtime: EngineRuntime = manifest.runtime  # type: ignore[assignment]
        self._trt = trt = import_tensorrt(runtime)
        self._log = make_log(trt)
        library = find_plugin(trt, plugin) if manifest.plugin_sha256 is not None else None
        check_manifest(
            path,
            manifest,
            runtime_version=str(trt.__version__),
            compute_capability=compute_capability(device),
            plugin=library,
        )
        if library is not None:
            load_plugin(trt, self._log, library)
        self._cuda = _import_pycuda()
        self._device_context = self._cuda.Device(device).retain_primary_context()
        self._profiles = manifest.profiles
        with self._on_device():
            self._engine = trt.Runtime(self._log).deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise EngineError(f"{runtime} could not open {path}: {last_errors(self._log)}")
        self.name = runtime
        specs = {True: [], False: []}  # type: dict[bool, list[TensorSpec]]
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            is_input = self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            specs[is_input].append(self._spec(name))
        self.inputs, self.outputs = specs[True], specs[False]
        self._threads = threading.local()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """See `Runner.run`. Batches beyond the profile's largest are split."""
        check_inputs(self.inputs, feeds)
        shapes = {name: array.shape for name, array in feeds.items()}
        parts = list(split_batch(self.inputs, self.outputs, self._profiles, shapes))
        if not parts:
            return self._empty()
        with self._on_device():
            lane = self._lane()
            results = [
                lane.run({n: np.ascontiguousarray(a[part]) for n, a in feeds.items()}) for part in parts
            ]
        if len(results) == 1:
            return results[0]
        return {spec.name: np.concatenate([r[spec.name] for r in results]) for spec in self.outputs}

    def run_on_device(self, feeds: Mapping[str, Any]) -> dict[str, DeviceArray]:
        """Runs the engine on tensors that are on the GPU already, without a copy.

        Args:
            feeds: Every input by name: contiguous objects with `__cuda_array_interface__`, whose contents
                are complete, of the engine's types and shapes within the profile.

        Returns:
            Every output by name, complete.

        Raises:
            InputError: An input is missing, not contiguous, or does not fit.
        """
        interfaces = {}
        for spec in self.inputs:
            interface = getattr(feeds.get(spec.name), "__cuda_array_interface__", None)
            if interface is None:
                raise InputError(
                    f"expected a tensor on the GPU for input {spec}, found none; copy it there first"
                )
            if interface.get("strides") is not None:
                raise InputError(
                    f"expected a contiguous tensor for input {spec.name}, found one with strides"
                )
            if np.dtype(interface["typestr"]).itemsize != numpy_dtype(spec.dtype).itemsize:
                raise InputError(f"expected input {spec}, found elements of type {interface['typestr']}")
            interfaces[spec.name] = interface
        shapes = {name: tuple(interface["shape"]) for name, interface in interfaces.items()}
        if list(split_batch(self.inputs, self.outputs, self._profiles, shapes)) not in ([slice(None)],):
            rows = {shape[0] for shape in shapes.values()}
            most = min(self._profiles[name].largest[0] for name in shapes)
            if max(rows) > most or 0 in rows:
                raise InputError(f"expected 1 to {most} rows on the GPU, found {max(rows)}; split the batch")
        with self._on_device():
            addresses = {name: interface["data"][0] for name, interface in interfaces.items()}
            return self._lane().launch(shapes, addresses)

    def _spec(self, name: str) -> TensorSpec:
        dtype = _DTYPES.get(self._engine.get_tensor_dtype(name).name, "unknown")
        # TensorRT does not keep the names of free axes; the first one is the batch.
        shape = [
            size if size >= 0 else "batch" if axis == 0 else None
            for axis, size in enumerate(self._engine.get_tensor_shape(name))
        ]
        return TensorSpec(name, tuple(shape), dtype)

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
    def _on_device(self) -> Iterator[None]:
        self._device_context.push()
        try:
            yield
        finally:
            self._device_context.pop()

    def _lane(self) -> _Lane:
        if not hasattr(self._threads, "lane"):
            self._threads.lane = _Lane(self._cuda, self._engine, self._log, self.inputs, self.outputs)
        lane: _Lane = self._threads.lane
        return lane


class _Lane:
    """One thread's execution context, stream and input memory."""

    def __init__(
        self, cuda: Any, engine: Any, log: Any, inputs: list[TensorSpec], outputs: list[TensorSpec]
    ) -> None:
        self._cuda, self._log, self._inputs, self._outputs = cuda, log, inputs, outputs
        self._context = engine.create_execution_context()
        if self._context is None:
            raise EngineError(f"TensorRT could not make an execution context: {last_errors(log)}")
        self._stream = cuda.Stream()
        self._memory: dict[str, tuple[int, Any]] = {}  # input -> bytes, allocation

    def run(self, feeds: Arrays) -> Arrays:
        """From host memory to host memory."""
        addresses = {}
        for name, array in feeds.items():
            memory = self._at_least(name, array.nbytes)
            self._cuda.memcpy_htod_async(memory, _bytes_of(array), self._stream)
            addresses[name] = int(memory)
        on_device = self.launch({name: array.shape for name, array in feeds.items()}, addresses)
        results = {}
        for name, source in on_device.items():
            host = np.empty(source.shape, numpy_dtype(source.dtype))
            if host.nbytes:
                self._cuda.memcpy_dtoh_async(_bytes_of(host), source._memory, self._stream)
            results[name] = host
        self._stream.synchronize()
        return results

    def launch(
        self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]
    ) -> dict[str, DeviceArray]:
        """Runs on device memory, and waits until the outputs are complete."""
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise InputError(f"TensorRT refused input {name} {list(shape)}: {last_errors(self._log)}")
            self._context.set_tensor_address(name, addresses[name])
        results = {}
        for spec in self._outputs:
            shape = tuple(self._context.get_tensor_shape(spec.name))
            size = int(np.prod(shape)) * numpy_dtype(spec.dtype).itemsize
            memory = self._cuda.mem_alloc(max(size, 1))
            self._context.set_tensor_address(spec.name, int(memory))
            results[spec.name] = DeviceArray(memory, shape, spec.dtype)
        if not self._context.execute_async_v3(self._stream.handle):
            raise InputError(f"TensorRT could not run the engine: {last_errors(self._log)}")
        self._stream.synchronize()
        return results

    def _at_least(self, name: str, size: int) -> Any:
        held, memory = self._memory.get(name, (0, None))
        if size > held:
            memory = self._cuda.mem_alloc(size)
            self._memory[name] = (size, memory)
        return memory


def _bytes_of(array: NDArray[Any]) -> NDArray[np.uint8]:
    """An array's memory; pycuda takes no arrays of bfloat16."""
    return array.reshape(-1).view(np.uint8)


def _import_pycuda() -> Any:
    try:
        import pycuda.driver as cuda
    except ImportError as error:
        raise LibraryError(
            f"expected pycuda, could not import it: {error}; install pycuda where CUDA's toolkit is"
        ) from error
    try:
        cuda.init()
    except cuda.Error as error:
        raise LibraryError(f"expected a GPU, found none: {error}") from error
    return cuda
