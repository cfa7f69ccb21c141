"""What the CUDA driver says of this machine, without a CUDA package."""

from __future__ import annotations

import ctypes

from lmkan_deploy.errors import LibraryError


def cuda_version() -> int | None:
    """Release of the CUDA driver's interface, such as 13000; None without a driver."""
    driver = _driver()
    version = ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value


def compute_capability(device: int = 0) -> str | None:
    """Compute capability of a GPU, such as "9.0"; None where there is none."""
    driver = _driver()
    if driver is None or driver.cuInit(0) != 0:
        return None
    handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(handle), device) != 0:
        return None
    for attribute, value in ((75, major), (76, minor)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle) != 0:
            return None
    return f"{major.value}.{minor.value}"


def require_gpu(capability: str | None) -> str:
    """What `compute_capability` found. Without a GPU TensorRT makes objects that end the process when used.

    Raises:
        LibraryError: It found none.
    """
    if capability is None:
        raise LibraryError(
            "expected a GPU and NVIDIA's driver, without which TensorRT neither builds nor opens engines, found "
            "none; run nvidia-smi to see the GPU, or build with --runtime tensorrt-rtx, which needs none"
        )
    return capability


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
