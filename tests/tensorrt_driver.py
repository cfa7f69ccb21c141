"""Calls the virtual methods of the TensorRT plugin, as TensorRT does, through `plugins/tensorrt/tests/driver.cc`.

The structures are those of TensorRT's headers, of the same names.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

Shape = Sequence[int]


class Dims(ctypes.Structure):
    _fields_ = (("nbDims", c_int32), ("d", c_int64 * 8))


class PluginTensorDesc(ctypes.Structure):
    _fields_ = (("dims", Dims), ("type", c_int32), ("format", c_int32), ("scale", c_float))


class DynamicPluginTensorDesc(ctypes.Structure):
    _fields_ = (("desc", PluginTensorDesc), ("min", Dims), ("max", Dims), ("opt", Dims))


class PluginField(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("data", c_void_p), ("type", c_int32), ("length", c_int32))


class PluginFieldCollection(ctypes.Structure):
    _fields_ = (("nbFields", c_int32), ("fields", POINTER(PluginField)))


def dims(shape: Shape) -> Dims:
    return Dims(len(shape), (c_int64 * 8)(*shape[:8]))


def tensor(shape: Shape, dtype: int, layout: int = 0) -> PluginTensorDesc:
    """A tensor; layout 0 is TensorRT's kLINEAR."""
    return PluginTensorDesc(dims(shape), dtype, layout, -1.0)


def dynamic_tensor(
    shape: Shape, dtype: int, layout: int = 0, *, low: Shape | None = None, high: Shape | None = None
) -> DynamicPluginTensorDesc:
    """A tensor with the limits of a profile, by default its own shape."""
    return DynamicPluginTensorDesc(
        tensor(shape, dtype, layout), dims(low or shape), dims(high or shape), dims(high or shape)
    )


class Library:
    """A plugin library, loaded as TensorRT loads it.

    Attributes:
        lines: What the plugin logged, with TensorRT's severity.
        count: Number of creators.
    """

    def __init__(self, driver: Path, plugin: Path) -> None:
        self.driver = ctypes.CDLL(str(driver))
        for name in ("load", "create", "clone", "attach", "fields"):
            getattr(self.driver, f"driver_{name}").restype = c_void_p
        self.driver.driver_name.restype = c_char_p
        self.driver.driver_workspace_size.restype = c_size_t
        self.driver.driver_fields.restype = POINTER(PluginFieldCollection)
        self.lines: list[tuple[int, str]] = []
        self._log = ctypes.CFUNCTYPE(None, c_int32, c_char_p)(
            lambda severity, line: self.lines.append((severity, line.decode()))
        )
        self._path = str(plugin).encode()
        creators, self.count = self._load()
        self._creators = (c_void_p * self.count).from_address(creators)

    def _load(self) -> tuple[int, int]:
        """Loads the library, or once more, and has it log here. Its creators, and how many there are."""
        count = c_int32()
        creators = self.driver.driver_load(self._path, ctypes.byref(count))
        assert creators, f"{self._path.decode()} does not load, or lacks an entry point"
        return creators, count.value

    def listen(self) -> None:
        """Sends what plugins log from now on to this object's lines, which are forgotten."""
        self.lines.clear()
        self._load()  # TensorRT-RTX may have made itself the logger
        self.driver.driver_log_to(self._log)

    def create(
        self, creator: int, name: str | None = "layer 1", fields: Sequence[PluginField] = (), phase: int = 0
    ) -> Plugin | None:
        """Calls createPlugin; phase 0 is the build, 1 the run time. None where it refuses."""
        collection = PluginFieldCollection(len(fields), (PluginField * len(fields))(*fields))
        encoded = None if name is None else name.encode()
        handle = self.driver.driver_create(
            c_void_p(self._creators[creator]), encoded, ctypes.byref(collection), phase
        )
        return Plugin(self, handle) if handle else None

    def only_line(self) -> str:
        """The one line that was logged, which must be an error; forgets it."""
        (severity, line), *others = self.lines
        self.lines.clear()
        assert severity == 1
        assert not others
        assert "\n" not in line
        return line


class Plugin:
    """A plugin object; deleted with this one."""

    def __init__(self, library: Library, handle: int) -> None:
        self.library = library
        self._driver = library.driver
        self._handle = c_void_p(handle)

    def __del__(self) -> None:
        self._driver.driver_destroy(self._handle)

    @property
    def name(self) -> str:
        return self._driver.driver_name(self._handle).decode()

    def clone(self) -> Plugin:
        return Plugin(self.library, self._driver.driver_clone(self._handle))

    def attach(self) -> Plugin:
        return Plugin(self.library, self._driver.driver_attach(self._handle))

    def has_capability(self, kind: int) -> bool:
        return bool(self._driver.driver_has_capability(self._handle, kind))

    def output_types(self, inputs: Sequence[int], num_outputs: int = 1) -> list[int] | None:
        """None where the plugin refuses."""
        outputs = (c_int32 * num_outputs)(*[-1] * num_outputs)
        types = (c_int32 * len(inputs))(*inputs)
        status = self._driver.driver_output_types(self._handle, outputs, num_outputs, types, len(inputs))
        return list(outputs) if status == 0 else None

    def output_shape(self, *inputs: Shape) -> list[int] | None:
        """Shape of y, -1 where it depends on the input; None where the plugin refuses."""
        y = Dims()
        shapes = (Dims * len(inputs))(*map(dims, inputs))
        status = self._driver.driver_output_shapes(self._handle, shapes, len(inputs), ctypes.byref(y), 1)
        return list(y.d)[: y.nbDims] if status == 0 else None

    def supports(
        self, position: int, tensors: Sequence[DynamicPluginTensorDesc], num_inputs: int, num_outputs: int = 1
    ) -> bool:
        array = (DynamicPluginTensorDesc * len(tensors))(*tensors)
        return bool(self._driver.driver_supports(self._handle, position, array, num_inputs, num_outputs))

    def configure(self, tensors: Sequence[DynamicPluginTensorDesc]) -> int:
        """The last tensor is y, here and below."""
        array = (DynamicPluginTensorDesc * len(tensors))(*tensors)
        return self._driver.driver_configure(self._handle, array, len(tensors) - 1, 1)

    def workspace_size(self, tensors: Sequence[DynamicPluginTensorDesc]) -> int:
        array = (DynamicPluginTensorDesc * len(tensors))(*tensors)
        return self._driver.driver_workspace_size(self._handle, array, len(tensors) - 1, 1)

    def tactics(self) -> list[int]:
        count = self._driver.driver_num_tactics(self._handle)
        tactics = (c_int32 * count)()
        assert self._driver.driver_tactics(self._handle, tactics, count) == 0
        return list(tactics)

    def set_tactic(self, tactic: int) -> int:
        return self._driver.driver_set_tactic(self._handle, tactic)

    def shape_change(self, tensors: Sequence[PluginTensorDesc]) -> int:
        array = (PluginTensorDesc * len(tensors))(*tensors)
        return self._driver.driver_shape_change(self._handle, array, len(tensors) - 1, 1)

    def enqueue(
        self, tensors: Sequence[PluginTensorDesc], addresses: Sequence[int], workspace: int, stream: int
    ) -> int:
        """Addresses of the inputs and of y."""
        array = (PluginTensorDesc * len(tensors))(*tensors)
        inputs = (c_void_p * len(addresses))(*addresses)
        outputs = (c_void_p * 1)(addresses[-1])
        return self._driver.driver_enqueue(
            self._handle, array, len(tensors) - 1, inputs, outputs, c_void_p(workspace), c_void_p(stream)
        )

    def fields(self) -> list[PluginField]:
        """What an engine keeps; valid while the plugin lives."""
        collection = self._driver.driver_fields(self._handle).contents
        return [collection.fields[i] for i in range(collection.nbFields)]
