"""Models in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lmkan_deploy.errors import InputError, LibraryError, ModelError
from lmkan_deploy.runtime.libraries import get_library_path
from lmkan_deploy.runtime.tensors import Arrays, TensorSpec, check_inputs, numpy_dtype

if TYPE_CHECKING:
    import onnxruntime

# ONNX Runtime's type names and NumPy's.
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int16)": "int16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}

_BFLOAT16 = 16
"""onnx.TensorProto.BFLOAT16, without importing onnx."""


def register_custom_ops(options: onnxruntime.SessionOptions) -> None:
    """Makes a session run `LMKAN2D` nodes with the compiled kernel.

    Args:
        options: Passed to `onnxruntime.InferenceSession` afterwards; any number of sessions may share them.

    Raises:
        LibraryError: The native library is missing or of another release.
    """
    options.register_custom_ops_library(str(get_library_path("onnxruntime")))


class OnnxRuntimeRunner:
    """A model in one ONNX Runtime session on the CPU.

    Args:
        path: An ONNX file.
        custom_ops: Whether to run `LMKAN2D` nodes with the compiled kernel, or with the function that the
            file carries.
        threads: Threads of one call; None leaves the choice to ONNX Runtime.

    Raises:
        ModelError: The file can't be read, or ONNX Runtime refuses it.
        LibraryError: The native library, or ONNX Runtime itself, is missing.
    """

    def __init__(self, path: Path, *, custom_ops: bool = True, threads: int | None = None) -> None:
        ort = _import_onnxruntime()
        if not path.is_file():
            raise ModelError(f"expected an ONNX file, found no file {path}")
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors come back as exceptions; a second copy on stderr helps nobody
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        if custom_ops:
            register_custom_ops(options)
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # pybind exposes a dozen unrelated types
            raise ModelError(f"ONNX Runtime could not load {path}: {error}") from error
        self.name = "onnxruntime" if custom_ops else "onnxruntime-function"
        self.inputs = [_spec(value) for value in self.session.get_inputs()]
        self.outputs = [_spec(value) for value in self.session.get_outputs()]
        self._has_bfloat16 = "bfloat16" in {spec.dtype for spec in (*self.inputs, *self.outputs)}

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """See `Runner.run`."""
        check_inputs(self.inputs, feeds)
        try:
            if self._has_bfloat16:
                return self._run_ort_values(feeds)
            results = self.session.run(None, dict(feeds))
        except Exception as error:
            raise InputError(f"ONNX Runtime could not run the model: {error}") from error
        return {spec.name: array for spec, array in zip(self.outputs, results, strict=True)}

    def _run_ort_values(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Through OrtValue, because NumPy alone has no bfloat16."""
        values = {name: _to_ort_value(np.ascontiguousarray(array)) for name, array in feeds.items()}
        results = self.session.run_with_ort_values(None, values)
        return {spec.name: _from_ort_value(v, spec) for spec, v in zip(self.outputs, results, strict=True)}


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise LibraryError(
            "expected ONNX Runtime, found none; install lmkan-deploy[cpu], or lmkan-deploy[gpu] on a machine "
            "with CUDA"
        ) from error
    return onnxruntime


def _spec(value: Any) -> TensorSpec:
    return TensorSpec(value.name, tuple(value.shape), _DTYPES.get(value.type, value.type))


def _to_ort_value(array: NDArray[Any]) -> Any:
    import onnxruntime as ort

    if array.dtype.name == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def _from_ort_value(value: Any, spec: TensorSpec) -> NDArray[Any]:
    if spec.dtype != "bfloat16":
        return np.asarray(value.numpy())
    import ctypes

    dtype = numpy_dtype(spec.dtype)
    size = int(np.prod(value.shape())) * dtype.itemsize
    # OrtValue.numpy() refuses bfloat16; the copy ends the dependence on the value's memory.
    memory = (ctypes.c_char * size).from_address(value.data_ptr()) if size else b""
    return np.frombuffer(bytes(memory), dtype=dtype).reshape(value.shape())
