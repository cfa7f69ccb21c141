"""One call's way through an engine: a stream, memory, and execution contexts of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmkan_deploy.engines.batches import Part
from lmkan_deploy.engines.cuda_graph import CudaGraph
from lmkan_deploy.engines.gpu import DeviceMemory, Gpu, OnGpu
from lmkan_deploy.engines.tensorrt_api import EngineRuntime, last_errors
from lmkan_deploy.errors import EngineError, InputError
from lmkan_deploy.runtime.tensors import Arrays, TensorSpec, numpy_dtype

_ALIGNMENT = 256
"""Of the addresses that TensorRT takes, in bytes."""

Shapes = Mapping[str, tuple[int, ...]]

MAX_GRAPHS = 32
"""Shapes that a lane keeps graphs for; the one that was not used for longest makes room."""


class DeviceArray:
    """A tensor in device memory, for everything that takes `__cuda_array_interface__`, such as
    `torch.as_tensor` and `cupy.asarray`.
    """

    def __init__(self, memory: DeviceMemory, shape: tuple[int, ...], dtype: str) -> None:
        self.memory = memory
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
class Workspace:
    """Memory for what a network computes on its way."""

    memory: DeviceMemory
    size: int  # bytes


@dataclass(frozen=True)
class LoadedEngine:
    """An engine and what runs it.

    Attributes:
        runtime: What runs it.
        trt: TensorRT's module.
        gpu: Where it runs.
        engine: TensorRT's `ICudaEngine`.
        log: What `make_log` made.
        inputs: Its inputs.
        outputs: Its outputs.
    """

    runtime: EngineRuntime
    trt: Any
    gpu: Gpu
    engine: OnGpu[Any]
    log: Any
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]

    def new_workspace(self) -> Workspace:
        """Memory for contexts that run one after the other, whatever their profiles."""
        size = self.engine.value.device_memory_size_v2
        return Workspace(self.gpu.allocate(size), size)

    def new_context(
        self, profile: int, workspace: Workspace, stream: OnGpu[Any], *, captures_itself: bool = False
    ) -> OnGpu[Any]:
        """An execution context for a profile.

        Args:
            profile: Number of the profile.
            workspace: What the context works in; it must outlive the context's runs.
            stream: Where it will run.
            captures_itself: Whether TensorRT-RTX is to make and launch its CUDA graphs.
        """
        managed = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        options = managed
        if captures_itself:
            options = self.engine.value.create_runtime_config()
            options.set_execution_context_allocation_strategy(managed)
            options.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        created = self.engine.value.create_execution_context(options)
        if created is None:
            raise EngineError(f"TensorRT could not make an execution context: {last_errors(self.log)}")
        context = OnGpu(self.gpu, created)
        if not context.value.set_optimization_profile_async(profile, stream.value.handle):
            raise EngineError(f"TensorRT refused profile {profile}: {last_errors(self.log)}")
        context.value.set_device_memory(int(workspace.memory), workspace.size)
        return context

    def input_sizes(self, shapes: Shapes) -> dict[str, int]:
        """Bytes of each input."""
        return {
            spec.name: int(np.prod(shapes[spec.name])) * numpy_dtype(spec.dtype).itemsize
            for spec in self.inputs
        }

    def set_inputs(self, context: OnGpu[Any], shapes: Shapes, addresses: Mapping[str, int]) -> None:
        """Tells a context of its inputs."""
        for name, shape in shapes.items():
            if not context.value.set_input_shape(name, shape):
                raise InputError(f"TensorRT refused input {name} {list(shape)}: {last_errors(self.log)}")
            self._set_address(context, name, addresses[name])

    def set_outputs(
        self, context: OnGpu[Any], allocate: Callable[[str, int], DeviceMemory]
    ) -> dict[str, DeviceArray]:
        """Gives a context whose inputs are set memory for its outputs."""
        results = {}
        for spec in self.outputs:
            shape = tuple(context.value.get_tensor_shape(spec.name))
            if min(shape, default=1) < 0:
                raise EngineError(
                    f"expected outputs of shapes that follow from those of the inputs, found {spec.name} "
                    f"{list(shape)}; such networks can't be run"
                )
            memory = allocate(spec.name, int(np.prod(shape)) * numpy_dtype(spec.dtype).itemsize)
            self._set_address(context, spec.name, int(memory))
            results[spec.name] = DeviceArray(memory, shape, spec.dtype)
        return results

    def _set_address(self, context: OnGpu[Any], name: str, address: int) -> None:
        if not context.value.set_tensor_address(name, address):
            raise EngineError(f"TensorRT refused the memory of {name}: {last_errors(self.log)}")

    def enqueue(self, context: OnGpu[Any], stream: OnGpu[Any]) -> None:
        """Puts a run into a stream."""
        if not context.value.execute_async_v3(stream.value.handle):
            raise InputError(f"TensorRT could not run the engine: {last_errors(self.log)}")

    def upload(self, array: NDArray[Any], memory: DeviceMemory, size: int, stream: OnGpu[Any]) -> None:
        """Fills memory of `size` bytes with an array, and zeros behind it."""
        address = int(memory)
        if array.nbytes:
            self.gpu.cuda.memcpy_htod_async(address, _bytes_of(array), stream.value)
        if size > array.nbytes:
            self.gpu.cuda.memset_d8_async(address + array.nbytes, 0, size - array.nbytes, stream.value)

    def download(
        self, sources: Mapping[str, DeviceArray], feeds: Arrays, padded_to: int | None, stream: OnGpu[Any]
    ) -> Arrays:
        """Copies outputs for the rows of the inputs to the host, and waits for the stream."""
        results = {}
        for name, source in sources.items():
            shape = source.shape
            if padded_to is not None:
                if shape[0] != padded_to:
                    raise EngineError(
                        f"expected output {name} with a row for each of the {padded_to} of a padded batch, found "
                        f"{list(shape)}; leave padding out"
                    )
                shape = (len(next(iter(feeds.values()))), *shape[1:])
            host = np.empty(shape, numpy_dtype(source.dtype))
            if host.nbytes:
                self.gpu.cuda.memcpy_dtoh_async(_bytes_of(host), int(source.memory), stream.value)
            results[name] = host
        stream.value.synchronize()
        return results


class Lane:
    """Runs an engine with one context for each profile, whatever the shapes.

    Call it from one thread at a time, with the GPU current. The calls fit the profiles they name.
    """

    def __init__(self, loaded: LoadedEngine) -> None:
        self._loaded = loaded
        self._stream = loaded.gpu.new_stream()
        self._workspace = loaded.new_workspace()
        self._memory: dict[str, tuple[int, DeviceMemory]] = {}  # tensor -> bytes, allocation
        self._contexts: dict[int, OnGpu[Any]] = {}

    def run(self, feeds: Arrays, part: Part) -> Arrays:
        """From host memory to host memory.

        Args:
            feeds: The part's rows.
            part: How they are to run.
        """
        shapes = _shapes(feeds, part.padded_to)
        addresses = {}
        for name, size in self._loaded.input_sizes(shapes).items():
            memory = self._held(name, size)
            self._loaded.upload(feeds[name], memory, size, self._stream)
            addresses[name] = int(memory)
        results = self._enqueue(part.profile, shapes, addresses, self._held)
        return self._loaded.download(results, feeds, part.padded_to, self._stream)

    def run_on_device(
        self, shapes: Shapes, addresses: Mapping[str, int], profile: int
    ) -> dict[str, DeviceArray]:
        """From device memory to new device memory; waits until the outputs are complete."""
        addresses = dict(addresses)
        for name, size in self._loaded.input_sizes(shapes).items():
            if addresses[name] % _ALIGNMENT != 0:
                memory = int(self._held(name, size))
                self._loaded.gpu.cuda.memcpy_dtod_async(memory, addresses[name], size, self._stream.value)
                addresses[name] = memory
        results = self._enqueue(profile, shapes, addresses, lambda _, size: self._loaded.gpu.allocate(size))
        self._stream.value.synchronize()
        return results

    def wait(self) -> None:
        """Waits for what a failed run has left in the stream."""
        self._stream.value.synchronize()

    def close(self) -> None:
        """Gives up all that it holds; nothing can be called any more."""
        try:
            self.wait()
        finally:
            vars(self).clear()

    def _enqueue(
        self,
        profile: int,
        shapes: Shapes,
        addresses: Mapping[str, int],
        allocate: Callable[[str, int], DeviceMemory],
    ) -> dict[str, DeviceArray]:
        context = self._contexts.get(profile)
        if context is None:
            context = self._loaded.new_context(profile, self._workspace, self._stream)
            self._contexts[profile] = context
        self._loaded.set_inputs(context, shapes, addresses)
        results = self._loaded.set_outputs(context, allocate)
        self._loaded.enqueue(context, self._stream)
        return results

    def _held(self, name: str, size: int) -> DeviceMemory:
        held = self._memory.get(name)
        if held is None or size > held[0]:
            held = self._memory[name] = size, self._loaded.gpu.allocate(size)
        return held[1]


class GraphLane:
    """Runs an engine with a CUDA graph for each shape; otherwise as `Lane`.

    A graph holds the addresses of all tensors and the state of its context, so that each has its own; all
    contexts share one workspace, since they run one after the other. TensorRT-RTX captures by itself.
    """

    def __init__(self, loaded: LoadedEngine) -> None:
        self._loaded = loaded
        self._stream = loaded.gpu.new_stream()
        self._workspace = loaded.new_workspace()
        self._calls: OrderedDict[tuple[tuple[str, tuple[int, ...]], ...], _Call] = OrderedDict()

    def run(self, feeds: Arrays, part: Part) -> Arrays:
        """See `Lane.run`."""
        call = self._call(_shapes(feeds, part.padded_to), part.profile)
        for name, size in call.input_sizes.items():
            self._loaded.upload(feeds[name], call.inputs[name], size, self._stream)
        self._enqueue(call)
        return self._loaded.download(call.outputs, feeds, part.padded_to, self._stream)

    def run_on_device(
        self, shapes: Shapes, addresses: Mapping[str, int], profile: int
    ) -> dict[str, DeviceArray]:
        """From device memory to new device memory, copied there; waits until the outputs are complete."""
        gpu, stream = self._loaded.gpu, self._stream
        call = self._call(shapes, profile)
        for name, size in call.input_sizes.items():
            gpu.cuda.memcpy_dtod_async(int(call.inputs[name]), addresses[name], size, stream.value)
        self._enqueue(call)
        results = {}
        for name, source in call.outputs.items():
            memory = gpu.allocate(source.nbytes)
            if source.nbytes:
                gpu.cuda.memcpy_dtod_async(int(memory), int(source.memory), source.nbytes, stream.value)
            results[name] = DeviceArray(memory, source.shape, source.dtype)
        stream.value.synchronize()
        return results

    def wait(self) -> None:
        """See `Lane.wait`."""
        self._stream.value.synchronize()

    def close(self) -> None:
        """See `Lane.close`."""
        try:
            self.wait()
        finally:
            vars(self).clear()

    def _call(self, shapes: Shapes, profile: int) -> _Call:
        key = tuple(sorted(shapes.items()))  # which has one profile
        call = self._calls.get(key)
        if call is None:
            call = self._new_call(shapes, profile)
            if len(self._calls) >= MAX_GRAPHS:
                self._calls.popitem(last=False)
            self._calls[key] = call
        self._calls.move_to_end(key)
        return call

    def _new_call(self, shapes: Shapes, profile: int) -> _Call:
        loaded = self._loaded
        captures_itself = loaded.runtime == "tensorrt-rtx"
        context = loaded.new_context(profile, self._workspace, self._stream, captures_itself=captures_itself)
        sizes = loaded.input_sizes(shapes)
        inputs = {name: loaded.gpu.allocate(size) for name, size in sizes.items()}
        loaded.set_inputs(context, shapes, {name: int(memory) for name, memory in inputs.items()})
        outputs = loaded.set_outputs(context, lambda _, size: loaded.gpu.allocate(size))
        return _Call(context, inputs, sizes, outputs, captures_itself)

    def _enqueue(self, call: _Call) -> None:
        if call.graph is not None:
            call.graph.launch(self._stream.value.handle)
            return
        enqueue = partial(self._loaded.enqueue, call.context, self._stream)
        enqueue()  # TensorRT prepares in the first run what can't be captured
        if not call.captures_itself:
            call.graph = CudaGraph(self._stream.value.handle, enqueue)


@dataclass
class _Call:
    """What runs one set of shapes."""

    context: OnGpu[Any]
    inputs: dict[str, DeviceMemory]
    input_sizes: dict[str, int]  # bytes
    outputs: dict[str, DeviceArray]
    captures_itself: bool
    graph: CudaGraph | None = None


def _shapes(feeds: Arrays, padded_to: int | None) -> Shapes:
    """Shapes that the engine runs."""
    if padded_to is None:
        return {name: array.shape for name, array in feeds.items()}
    return {name: (padded_to, *array.shape[1:]) for name, array in feeds.items()}


def _bytes_of(array: NDArray[Any]) -> NDArray[np.uint8]:
    """An array's memory; pycuda takes no arrays of bfloat16."""
    return array.reshape(-1).view(np.uint8)
