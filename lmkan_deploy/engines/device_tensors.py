"""Other packages' tensors on a GPU, through `__cuda_array_interface__`."""

from __future__ import annotations

from typing import Any

import numpy as np

from lmkan_deploy.engines.cuda_graph import import_driver
from lmkan_deploy.engines.gpu import Gpu
from lmkan_deploy.errors import EngineError, InputError
from lmkan_deploy.runtime.tensors import TensorSpec, numpy_dtype

LEGACY_STREAM = 1
"""The interface's name for CUDA's legacy default stream."""


def device_interface(spec: TensorSpec, tensor: Any) -> dict[str, Any]:
    """The interface of a tensor for an input.

    Raises:
        InputError: It is no tensor on a GPU, not contiguous, or of another type.
    """
    try:
        interface = getattr(tensor, "__cuda_array_interface__", None)
    except RuntimeError as error:  # PyTorch, of a tensor that needs a gradient
        raise InputError(f"expected a tensor without a gradient for input {spec}: {error}") from error
    if interface is None:
        raise InputError(f"expected a tensor on the GPU for input {spec}, found none; copy it there first")
    if interface.get("strides") is not None:
        raise InputError(f"expected a contiguous tensor for input {spec.name}, found one with strides")
    found = np.dtype(interface["typestr"])
    # bfloat16 has no name there: packages call it bytes, or integers.
    fits = (
        found.itemsize == 2 and found.kind in "Vu"
        if spec.dtype == "bfloat16"
        else found == numpy_dtype(spec.dtype)
    )
    if not fits:
        raise InputError(f"expected input {spec}, found elements of type {interface['typestr']}")
    return dict(interface)


def wait_for_stream(gpu: Gpu, stream: int) -> None:
    """Waits until a stream, the interface's number or a handle, has done its work. The GPU is current.

    Raises:
        EngineError: The driver refuses it.
        LibraryError: cuda-bindings is missing, and it is another stream than the legacy one.
    """
    if stream == LEGACY_STREAM:
        event = gpu.cuda.Event()
        event.record()
        event.synchronize()
        return
    driver = import_driver()
    (status,) = driver.cuStreamSynchronize(driver.CUstream(stream))
    if status != driver.CUresult.CUDA_SUCCESS:
        raise EngineError(
            f"expected to wait for stream {stream:#x}, but cuStreamSynchronize gave {status.name}"
        )
