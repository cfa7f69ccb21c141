"""A GPU on the host, for the code between Python and TensorRT: device memory, streams, captures, and an engine.

Stands for `pycuda.driver`, `cuda.bindings.driver` and `tensorrt`. It is stricter than a GPU: streams work only
once somebody waits for them, memory is checked at every access, and a context that was captured may not change.
Values are real: the engine is ONNX Runtime with the compiled operators.
"""

from __future__ import annotations

import contextlib
import enum
import os
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import lmkan_deploy
from lmkan_deploy.engines import plugin
from lmkan_deploy.engines import runner as engine_runner
from lmkan_deploy.engines.profiles import Profile
from lmkan_deploy.runtime.tensors import numpy_dtype
from lmkan_deploy.spec import DOMAIN, OP_TYPE

Work = Callable[[], None]
COMPUTE_CAPABILITY = "9.0"


_thread = threading.local()
"""`captures`: whether the thread captures a stream."""


def captures() -> bool:
    """Whether the driver refuses to release anything."""
    return getattr(_thread, "captures", False)


class Memory:
    """Device memory: addresses that nothing on the host has."""

    def __init__(self) -> None:
        self._next = 1 << 40
        self._blocks: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def allocate(self, size: int, can_free: Callable[[], bool] = lambda: True) -> Allocation:
        assert size > 0, "the driver refuses to allocate nothing"
        with self._lock:
            address = self._next
            self._next += -(-size // 256) * 256 + 4096  # so that no overrun hits a neighbour
            self._blocks[address] = np.full(size, 0xFF, np.uint8)
        return Allocation(self, address, can_free)

    def free(self, address: int) -> None:
        with self._lock:
            del self._blocks[address]

    def at(self, address: int, size: int) -> np.ndarray:
        blocks = list(self._blocks.items())
        first, block = next(((b, block) for b, block in blocks if b <= address < b + block.nbytes), (0, None))
        assert block is not None, "access to memory that was freed or never allocated"
        assert address + size <= first + block.nbytes, "access beyond an allocation"
        return block[address - first :][:size]

    @property
    def allocations(self) -> int:
        return len(self._blocks)


class Allocation:
    """pycuda's `DeviceAllocation`: freed with its last reference, where that is dropped with the GPU current and
    no capture going on.
    """

    def __init__(self, memory: Memory, address: int, can_free: Callable[[], bool]) -> None:
        self._address = address

        def free() -> None:
            if can_free():
                memory.free(address)

        # The garbage collector does not follow arrays, nor pycuda's: freed after what holds them is finalized.
        self._held = np.empty(0)
        weakref.finalize(self._held, free).atexit = False

    def __int__(self) -> int:
        return self._address


class Stream:
    """A stream: a queue that runs when somebody waits for it. Until then it is one thread's."""

    known: ClassVar[weakref.WeakValueDictionary[int, Stream]] = weakref.WeakValueDictionary()

    def __init__(self, flags: int = 0) -> None:
        assert flags == 1, "a stream that can't be captured beside uses of the default stream"
        self.handle = id(self)
        self.captured: list[Work] | None = None
        self._queue: list[Work] = []
        self._owner: int | None = None
        Stream.known[self.handle] = self

    def put(self, work: Work) -> None:
        thread = threading.get_ident()
        assert self._owner in (None, thread), "a stream that another thread uses"
        self._owner = thread
        (self._queue if self.captured is None else self.captured).append(work)

    def synchronize(self) -> None:
        assert self.captured is None, "waiting for a stream that is being captured"
        queue, self._queue = self._queue, []
        for work in queue:
            work()
        self._owner = None


class Cuda(types.ModuleType):
    """`pycuda.driver`, which has memory for `capacity` allocations. It fails once the file `lost` exists.

    `waited` has the streams of others that were waited for, as `__cuda_array_interface__` names them.
    """

    class Error(Exception):
        pass

    class MemoryError(Error):
        pass

    def __init__(self) -> None:
        super().__init__("pycuda.driver")
        self.memory = Memory()
        self.capacity: float = float("inf")
        self.lost = Path(os.environ.get("EMULATED_GPU_LOST", os.devnull + "/never"))
        self.waited: list[int] = []
        self._current = threading.local()
        self.Stream = Stream

    def init(self) -> None:
        pass

    def Device(self, number: int) -> Any:  # noqa: N802
        def set_current(change: int) -> None:
            self._current.depth = getattr(self._current, "depth", 0) + change

        context = types.SimpleNamespace(push=lambda: set_current(1), pop=lambda: set_current(-1))
        return types.SimpleNamespace(retain_primary_context=lambda: context)

    def Event(self) -> Any:  # noqa: N802
        assert self._is_current(), "no context is current"
        return types.SimpleNamespace(record=lambda: self.waited.append(1), synchronize=lambda: None)

    def mem_alloc(self, size: int) -> Allocation:
        assert self._is_current(), "no context is current"
        self._check()
        if self.memory.allocations >= self.capacity:
            raise self.MemoryError("cuMemAlloc failed: out of memory")
        return self.memory.allocate(size, self._can_free)

    def _check(self) -> None:
        if self.lost.exists():
            raise self.Error("an illegal memory access was encountered")

    def _is_current(self) -> bool:
        return getattr(self._current, "depth", 0) > 0

    def _can_free(self) -> bool:
        return self._is_current() and not captures()

    def memset_d8_async(self, dest: int, data: int, count: int, stream: Stream) -> None:
        stream.put(lambda: self.memory.at(dest, count).fill(data))

    def memcpy_htod_async(self, dest: Any, src: np.ndarray, stream: Stream) -> None:
        assert src.dtype == np.uint8
        self._check()
        stream.put(lambda: np.copyto(self.memory.at(int(dest), src.nbytes), src))

    def memcpy_dtoh_async(self, dest: np.ndarray, src: Any, stream: Stream) -> None:
        assert dest.dtype == np.uint8
        stream.put(lambda: np.copyto(dest, self.memory.at(int(src), dest.nbytes)))

    def memcpy_dtod_async(self, dest: int, src: int, size: int, stream: Stream) -> None:
        def copy() -> None:
            self.memory.at(dest, size)[:] = self.memory.at(src, size)

        stream.put(copy)


class Driver(types.ModuleType):
    """`cuda.bindings.driver`, of which `failing` names functions that fail."""

    class CUresult(enum.IntEnum):
        CUDA_SUCCESS = 0
        CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900

    class CUstreamCaptureMode(enum.IntEnum):
        CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.CUstream = int
        self.failing: set[str] = set()
        self.graphs: set[int] = set()
        self.launches = 0
        self.waited: list[int] = []
        self._work: dict[int, list[Work]] = {}

    def _status(self, name: str) -> CUresult:
        failed = name in self.failing
        return self.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED if failed else self.CUresult.CUDA_SUCCESS

    def _new(self, work: list[Work]) -> int:
        handle = len(self._work) + 1
        self._work[handle] = work
        self.graphs.add(handle)
        return handle

    def cuStreamSynchronize(self, stream: int) -> tuple[CUresult]:  # noqa: N802
        self.waited.append(stream)
        return (self._status("cuStreamSynchronize"),)

    def cuStreamBeginCapture(self, stream: int, mode: CUstreamCaptureMode) -> tuple[CUresult]:  # noqa: N802
        status = self._status("cuStreamBeginCapture")
        if status == 0:
            assert Stream.known[stream].captured is None
            Stream.known[stream].captured = []
            _thread.captures = True
        return (status,)

    def cuStreamEndCapture(self, stream: int) -> tuple[CUresult, int | None]:  # noqa: N802
        work, Stream.known[stream].captured = Stream.known[stream].captured, None
        _thread.captures = False
        assert work is not None
        status = self._status("cuStreamEndCapture")
        return status, self._new(work) if status == 0 else None

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[CUresult, int | None]:  # noqa: N802
        status = self._status("cuGraphInstantiate")
        return status, self._new(self._work[graph]) if status == 0 else None

    def cuGraphLaunch(self, executable: int, stream: int) -> tuple[CUresult]:  # noqa: N802
        assert executable in self.graphs
        self.launches += 1
        for work in self._work[executable]:
            Stream.known[stream].put(work)
        return (self._status("cuGraphLaunch"),)

    def cuGraphDestroy(self, graph: int) -> tuple[CUresult]:  # noqa: N802
        self.graphs.remove(graph)
        return (self.CUresult.CUDA_SUCCESS,)

    def cuGraphExecDestroy(self, executable: int) -> tuple[CUresult]:  # noqa: N802
        if captures():
            return (self.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        return self.cuGraphDestroy(executable)


class Registry:
    """`IPluginRegistry`: refuses a library whose plugins it has."""

    def __init__(self) -> None:
        self.libraries: list[str] = []
        self.all_creators: list[Any] = []

    def load_library(self, path: str) -> object | None:
        if self.all_creators:
            return None
        self.libraries.append(path)
        self.all_creators.append(types.SimpleNamespace(name=OP_TYPE, plugin_namespace=DOMAIN))
        return object()


class Strategy(enum.Enum):
    """`ExecutionContextAllocationStrategy`."""

    STATIC = 0
    USER_MANAGED = 2


class Engine:
    """`ICudaEngine` of an ONNX model."""

    device_memory_size_v2 = 1000

    def __init__(self, trt: TensorRT) -> None:
        self._trt = trt
        self._specs = [*trt.model.inputs, *trt.model.outputs]
        self.num_io_tensors = len(self._specs)

    def get_tensor_name(self, index: int) -> str:
        return self._specs[index].name

    def get_tensor_mode(self, name: str) -> str:
        inputs = [spec.name for spec in self._trt.model.inputs]
        return self._trt.TensorIOMode.INPUT if name in inputs else "OUTPUT"

    def get_tensor_dtype(self, name: str) -> Any:
        names = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
        return types.SimpleNamespace(name=names[self._spec(name).dtype])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._spec(name).shape)

    def create_runtime_config(self) -> Any:
        config = types.SimpleNamespace(strategy=Strategy.STATIC, cuda_graph_strategy=None)
        config.set_execution_context_allocation_strategy = lambda value: setattr(config, "strategy", value)
        return config

    def create_execution_context(self, options: Any = Strategy.STATIC) -> Context:
        strategy = options if isinstance(options, Strategy) else options.strategy
        graphs = getattr(options, "cuda_graph_strategy", None)
        self._trt.contexts.append(graphs)
        return Context(self._trt, self, needs_workspace=strategy is Strategy.USER_MANAGED)

    def _spec(self, name: str) -> Any:
        return next(spec for spec in self._specs if spec.name == name)


class Context:
    """`IExecutionContext`."""

    def __init__(self, trt: TensorRT, engine: Engine, *, needs_workspace: bool) -> None:
        self._trt, self._engine = trt, engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile: int | None = None
        self._workspace: tuple[int, int] | None = None
        self._needs_workspace = needs_workspace
        self._changes = 0
        self._runs = 0

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert Stream.known[stream_handle].captured is None
        assert not self._shapes, "shapes of another profile are lost"
        self._profile = profile_index
        self._changes += 1
        return profile_index < len(self._trt.profiles)

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        assert size >= self._engine.device_memory_size_v2
        self._workspace = memory, size
        self._changes += 1

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None, "which profile a new context has depends on TensorRT's release"
        self._shapes[name] = shape
        self._changes += 1
        return self._trt.profiles[self._profile][name].allows(shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0
        self._addresses[name] = address
        self._changes += 1
        return name not in self._trt.unknown_tensors

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._trt.unknown_shapes:
            return (-1, 1)
        rows = next(iter(self._shapes.values()))[0]
        return (rows, *self._engine.get_tensor_shape(name)[1:])

    def execute_async_v3(self, stream: int) -> bool:
        capturing = Stream.known[stream].captured is not None
        if self._trt.refuses(capturing):
            return False
        assert self._runs > 0 or not capturing, "captured before its first run"
        self._runs += 1
        self._trt.runs.append((self._profile, next(iter(self._shapes.values()))[0]))
        context, changes, shapes, addresses = (
            weakref.ref(self),
            self._changes,
            dict(self._shapes),
            dict(self._addresses),
        )
        trt, workspace = self._trt, self._workspace

        def work() -> None:
            alive = context()
            assert alive is not None, "the context is gone"
            assert alive._changes == changes or not capturing, "the context has changed since the capture"
            if alive._needs_workspace:
                assert workspace is not None, "no device memory was set"
                trt.cuda.memory.at(*workspace)
            feeds = {
                spec.name: trt.read(addresses[spec.name], shapes[spec.name], spec.dtype)
                for spec in trt.model.inputs
            }
            for name, y in trt.model.run(feeds).items():
                trt.cuda.memory.at(addresses[name], y.nbytes)[:] = y.reshape(-1).view(np.uint8)

        Stream.known[stream].put(work)
        return True


class TensorRT(types.ModuleType):
    """`tensorrt`, or `tensorrt_rtx`.

    Attributes:
        registry: Its plugins.
        contexts: The graph strategy of every execution context so far.
        runs: The profile and the rows of every run so far, but for launches of graphs.
        unknown_shapes: Outputs whose shapes the engine does not know.
        unknown_tensors: Tensors whose memory it refuses.
        refuses: Called with whether a run is captured, returns whether it fails.
    """

    __version__ = "10.14.1"
    ExecutionContextAllocationStrategy = Strategy
    ILogger = type("ILogger", (), {})
    TensorIOMode = types.SimpleNamespace(INPUT="INPUT")
    CudaGraphStrategy = types.SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph")

    def __init__(self, name: str, cuda: Cuda, model: Path, profiles: Sequence[Profile]) -> None:
        super().__init__(name)
        self.cuda, self.model, self.profiles = cuda, lmkan_deploy.load_runner(model), profiles
        self.registry = Registry()
        self.contexts: list[Any] = []
        self.runs: list[tuple[int | None, int]] = []
        self.unknown_shapes: set[str] = set()
        self.unknown_tensors: set[str] = set()
        self.refuses: Callable[[bool], bool] = lambda _: False

    def Runtime(self, log: Any) -> Any:  # noqa: N802
        return types.SimpleNamespace(deserialize_cuda_engine=lambda _: Engine(self))

    def get_plugin_registry(self) -> Registry:
        return self.registry

    def read(self, address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        kind = numpy_dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        return self.cuda.memory.at(address, size).copy().view(kind).reshape(shape)


@contextlib.contextmanager
def emulated_gpu(runtime: str, model: Path, profiles: Sequence[Profile]) -> Any:
    """Puts the stand-ins in place. Yields TensorRT and the driver."""
    cuda, driver = Cuda(), Driver()
    trt = TensorRT(runtime.replace("-", "_"), cuda, model, profiles)
    pycuda, bindings = types.ModuleType("pycuda"), types.ModuleType("cuda.bindings")
    pycuda.driver = cuda  # type: ignore[attr-defined]
    bindings.driver = driver  # type: ignore[attr-defined]
    modules = {trt.__name__: trt, "pycuda": pycuda, "pycuda.driver": cuda, "cuda.bindings": bindings,
               "cuda.bindings.driver": driver}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(__import__("sys").modules, name, module)
        patch.setattr(engine_runner, "compute_capability", lambda _: COMPUTE_CAPABILITY)
        patch.setattr(plugin, "_loaded", {})
        yield trt, driver
