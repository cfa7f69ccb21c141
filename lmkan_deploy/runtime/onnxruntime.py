"""Models in ONNX Runtime."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lmkan_deploy.errors import InputError, LibraryError, ModelError
from lmkan_deploy.runtime.axis_limits import noted_limits
from lmkan_deploy.runtime.libraries import get_library_path
from lmkan_deploy.runtime.onnxruntime_problems import ends_at_empty_batches, load_problem, run_problem
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
    "tensor(uint64)": "uint64",
    "tensor(uint32)": "uint32",
    "tensor(uint16)": "uint16",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}

_BFLOAT16 = 16
"""onnx.TensorProto.BFLOAT16, without importing onnx."""


def register_custom_ops(options: onnxruntime.SessionOptions, *, cuda: bool = False) -> None:
    """Makes a session run `LMKAN2D` and `LMKAN2DQuantized` nodes with the compiled kernels.

    Args:
        options: Passed to `onnxruntime.InferenceSession` afterwards; any number of sessions may share them.
        cuda: Whether the CUDA provider gets the operators too.

    Raises:
        LibraryError: The native library is missing or of another release.
    """
    options.register_custom_ops_library(str(get_library_path("onnxruntime-cuda" if cuda else "onnxruntime")))


_CUDA = "CUDAExecutionProvider"


class OnnxRuntimeRunner:
    """A model in one ONNX Runtime session.

    Args:
        path: An ONNX file.
        custom_ops: Whether to run `LMKAN2D` nodes with the compiled kernel, or with the function that the
            file carries.
        threads: Threads of one call; None leaves the choice to ONNX Runtime.
        cuda: Whether to run in the CUDA provider. Inputs and outputs stay in the memory of the host.
        device: Number of the GPU for it.

    Raises:
        ModelError: The file can't be read, or ONNX Runtime refuses it.
        LibraryError: The native library, ONNX Runtime itself, or its CUDA provider is missing.
    """

    def __init__(
        self,
        path: Path,
        *,
        custom_ops: bool = True,
        threads: int | None = None,
        cuda: bool = False,
        device: int = 0,
    ) -> None:
        ort = _import_onnxruntime()
        if cuda and _CUDA not in ort.get_available_providers():
            raise LibraryError(
                "expected ONNX Runtime with its CUDA provider, found "
                f"{', '.join(ort.get_available_providers())}; install lmkan-deploy[gpu] and not [cpu]"
            )
        if not path.is_file():
            raise ModelError(f"expected an ONNX file, found no file {path}")
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors come back as exceptions; a second copy on stderr helps nobody
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        if custom_ops:
            register_custom_ops(options, cuda=cuda)
        providers = [*([(_CUDA, {"device_id": device})] if cuda else []), "CPUExecutionProvider"]
        try:
            self.session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # pybind exposes a dozen unrelated types
            message = str(error).replace(str(path), path.name)
            raise ModelError(load_problem(path.name, message, ort.__version__)) from error
        # ONNX Runtime goes on without a provider that fails to start.
        if cuda and _CUDA not in self.session.get_providers():
            raise LibraryError(
                f"expected GPU {device} and CUDA's libraries for ONNX Runtime's CUDA provider, which could not "
                "start; run nvidia-smi to see the GPU, and compare CUDA's release with ONNX Runtime's"
            )
        self.name = f"onnxruntime{'' if custom_ops else '-function'}{'-cuda' if cuda else ''}"
        self.inputs = [_spec(value) for value in self.session.get_inputs()]
        self.outputs = [_spec(value) for value in self.session.get_outputs()]
        other = next((spec for spec in self.inputs if spec.dtype not in _DTYPES.values()), None)
        if other is not None:
            raise ModelError(
                f"expected inputs that are tensors of numbers, found {other.name}, a {other.dtype}"
            )
        self.limits = noted_limits(self.session.get_modelmeta().custom_metadata_map)
        self._needs_rows = ends_at_empty_batches(path, ort.__version__)
        self._has_bfloat16 = "bfloat16" in {spec.dtype for spec in (*self.inputs, *self.outputs)}

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """See `Runner.run`."""
        self._check(feeds)
        try:
            if self._has_bfloat16:
                return self._run_ort_values(feeds)
            results = self.session.run(None, dict(feeds))
        except Exception as error:
            raise InputError(run_problem(str(error))) from error
        return {spec.name: array for spec, array in zip(self.outputs, results, strict=True)}

    def bind(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], object]:
        """The session's own call on these inputs, which are checked here.

        Args:
            feeds: See `Runner.run`.

        Raises:
            InputError: The arrays don't fit the inputs.
        """
        self._check(feeds)
        if self._has_bfloat16:
            values = {name: _to_ort_value(np.ascontiguousarray(array)) for name, array in feeds.items()}
            return functools.partial(self.session.run_with_ort_values, None, values)
        return functools.partial(self.session.run, None, dict(feeds))

    def _check(self, feeds: Mapping[str, NDArray[Any]]) -> None:
        check_inputs(self.inputs, feeds, self.limits)
        if not self._needs_rows:
            return
        empty = next((name for name, array in feeds.items() if array.size == 0), None)
        if empty is not None:
            raise InputError(
                f"expected at least one row of {empty}, found shape {list(feeds[empty].shape)}: ONNX Runtime "
                "before 1.25 ends the process at an Einsum of an empty batch; install a later release"
            )

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
