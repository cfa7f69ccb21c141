"""One thread's way through an engine: a stream, memory, and execution contexts of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmkan_deploy.engines.cuda_graph import CudaGraph
from lmkan_deploy.engines.tensorrt_api import EngineRuntime, last_errors
from lmkan_deploy.errors import EngineError, InputError
from lmkan_deploy.runtime.tensors import Arrays, TensorSpec, numpy_dtype

Shapes = Mapping[str, tuple[int, ...]]

MAX_GRAPHS = 32
"""Shapes that a thread keeps graphs for; the one that was not used for longest makes room."""


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

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return int(np.prod(self.shape)) * numpy_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class LoadedEngine:
    """An engine and what runs it.

    Attributes:
        runtime: What runs it.
        trt: TensorRT's module.
        cuda: pycuda's driver module.
        engine: TensorRT's `ICudaEngine`.
        log: What `make_log` made.
        inputs: Its inputs.
        outputs: Its outputs.
    """

    runtime: EngineRuntime
    trt: Any
    cuda: Any
    engine: Any
    log: Any
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]

    def new_context(self, *options: Any) -> Any:
        """An execution context."""
        context = self.engine.create_execution_context(*options)
        if context is None:
            raise EngineError(f"TensorRT could not make an execution context: {last_errors(self.log)}")
        return context

    def set_inputs(self, context: Any, shapes: Shapes, addresses: Mapping[str, int]) -> None:
        """Tells a context of its inputs."""
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise InputError(f"TensorRT refused input {name} {list(shape)}: {last_errors(self.log)}")
            context.set_tensor_address(name, addresses[name])

    def set_outputs(self, context: Any, allocate: Callable[[str, int], Any]) -> dict[str, DeviceArray]:
        """Gives a context whose inputs are set memory for its outputs."""
        results = {}
        for spec in self.outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            if min(shape, default=1) < 0:
                raise EngineError(
                    f"expected outputs of shapes that follow from those of the inputs, found {spec.name} "
                    f"{list(shape)}; such networks can't be run"
                )
            size = int(np.prod(shape)) * numpy_dtype(spec.dtype).itemsize
            memory = allocate(spec.name, max(size, 1))  # the driver allocates no empty memory
            context.set_tensor_address(spec.name, int(memory))
            results[spec.name] = DeviceArray(memory, shape, spec.dtype)
        return results

    def enqueue(self, context: Any, stream: Any) -> None:
        """Puts a run into a stream."""
        if not context.execute_async_v3(stream.handle):
            raise InputError(f"TensorRT could not run the engine: {last_errors(self.log)}")


class Lane:
    """Runs an engine with one context, whatever the shapes.

    Call it from one thread, with the device's context current. The calls fit the engine's profile.
    """

    def __init__(self, loaded: LoadedEngine) -> None:
        self._loaded, self._cuda = loaded, loaded.cuda
        self._stream = loaded.cuda.Stream()
        self._memory: dict[str, tuple[int, Any]] = {}  # tensor -> bytes, allocation
        self._context = loaded.new_context()

    def run(self, feeds: Arrays) -> Arrays:
        """From host memory to host memory."""
        addresses = {}
        for name, array in feeds.items():
            memory = self._held(name, array.nbytes)
            self._cuda.memcpy_htod_async(memory, _bytes_of(array), self._stream)
            addresses[name] = int(memory)
        shapes = {name: array.shape for name, array in feeds.items()}
        return _to_host(self._cuda, self._enqueue(shapes, addresses, self._held), self._stream)

    def run_on_device(self, shapes: Shapes, addresses: Mapping[str, int]) -> dict[str, DeviceArray]:
        """From device memory to new device memory; waits until the outputs are complete."""
        results = self._enqueue(shapes, addresses, lambda _, size: self._cuda.mem_alloc(size))
        self._stream.synchronize()
        return results

    def _enqueue(
        self, shapes: Shapes, addresses: Mapping[str, int], allocate: Callable[[str, int], Any]
    ) -> dict[str, DeviceArray]:
        self._loaded.set_inputs(self._context, shapes, addresses)
        results = self._loaded.set_outputs(self._context, allocate)
        self._loaded.enqueue(self._context, self._stream)
        return results

    def _held(self, name: str, size: int) -> Any:
        held, memory = self._memory.get(name, (0, None))
        if size > held:
            memory = self._cuda.mem_alloc(size)
            self._memory[name] = (size, memory)
        return memory


class GraphLane:
    """Runs an engine with a CUDA graph for each shape; otherwise as `Lane`.

    A graph holds the addresses of all tensors and the state of its context, so that each has its own; all
    contexts share one workspace, since they run one after the other. TensorRT-RTX captures by itself.
    """

    def __init__(self, loaded: LoadedEngine) -> None:
        self._loaded, self._cuda = loaded, loaded.cuda
        self._stream = loaded.cuda.Stream()
        self._workspace_size = loaded.engine.device_memory_size_v2
        self._workspace = self._cuda.mem_alloc(max(self._workspace_size, 1))
        self._calls: OrderedDict[tuple[tuple[str, tuple[int, ...]], ...], _Call] = OrderedDict()

    def run(self, feeds: Arrays) -> Arrays:
        """From host memory to host memory."""
        call = self._call({name: array.shape for name, array in feeds.items()})
        for name, array in feeds.items():
            self._cuda.memcpy_htod_async(call.inputs[name], _bytes_of(array), self._stream)
        self._enqueue(call)
        return _to_host(self._cuda, call.outputs, self._stream)

    def run_on_device(self, shapes: Shapes, addresses: Mapping[str, int]) -> dict[str, DeviceArray]:
        """From device memory to new device memory, copied there; waits until the outputs are complete."""
        call = self._call(shapes)
        for name, size in call.input_sizes.items():
            self._cuda.memcpy_dtod_async(int(call.inputs[name]), addresses[name], size, self._stream)
        self._enqueue(call)
        results = {}
        for name, source in call.outputs.items():
            memory = self._cuda.mem_alloc(max(source.nbytes, 1))
            self._cuda.memcpy_dtod_async(int(memory), int(source._memory), source.nbytes, self._stream)
            results[name] = DeviceArray(memory, source.shape, source.dtype)
        self._stream.synchronize()
        return results

    def _call(self, shapes: Shapes) -> _Call:
        key = tuple(sorted(shapes.items()))
        call = self._calls.get(key)
        if call is None:
            call = self._new_call(shapes)
            if len(self._calls) >= MAX_GRAPHS:
                self._calls.popitem(last=False)
            self._calls[key] = call
        self._calls.move_to_end(key)
        return call

    def _new_call(self, shapes: Shapes) -> _Call:
        loaded, trt = self._loaded, self._loaded.trt
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        captures_itself = loaded.runtime == "tensorrt-rtx"
        if captures_itself:
            config = loaded.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(managed)
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = loaded.new_context(config)
        else:
            context = loaded.new_context(managed)
        context.set_device_memory(int(self._workspace), self._workspace_size)
        sizes = {
            spec.name: int(np.prod(shapes[spec.name])) * numpy_dtype(spec.dtype).itemsize
            for spec in loaded.inputs
        }
        inputs = {name: self._cuda.mem_alloc(size) for name, size in sizes.items()}
        loaded.set_inputs(context, shapes, {name: int(memory) for name, memory in inputs.items()})
        outputs = loaded.set_outputs(context, lambda _, size: self._cuda.mem_alloc(size))
        return _Call(context, inputs, sizes, outputs, captures_itself)

    def _enqueue(self, call: _Call) -> None:
        if call.graph is not None:
            call.graph.launch(self._stream.handle)
            return
        enqueue = partial(self._loaded.enqueue, call.context, self._stream)
        enqueue()  # TensorRT prepares in the first run what can't be captured
        if not call.captures_itself:
            call.graph = CudaGraph(self._stream.handle, enqueue)


@dataclass
class _Call:
    """What runs one set of shapes."""

    context: Any
    inputs: dict[str, Any]
    input_sizes: dict[str, int]  # bytes
    outputs: dict[str, DeviceArray]
    captures_itself: bool
    graph: CudaGraph | None = None


def _to_host(cuda: Any, sources: Mapping[str, DeviceArray], stream: Any) -> Arrays:
    results = {}
    for name, source in sources.items():
        host = np.empty(source.shape, numpy_dtype(source.dtype))
        if host.nbytes:
            cuda.memcpy_dtoh_async(_bytes_of(host), source._memory, stream)
        results[name] = host
    stream.synchronize()
    return results


def _bytes_of(array: NDArray[Any]) -> NDArray[np.uint8]:
    """An array's memory; pycuda takes no arrays of bfloat16."""
    return array.reshape(-1).view(np.uint8)
