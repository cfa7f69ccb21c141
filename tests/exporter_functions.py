"""Makes PyTorch's exporter remember what it reads anew for each export."""

from __future__ import annotations

import contextlib
import functools


def remember(*, now: bool = False) -> None:
    """Lets the sources of the exporter's five hundred functions be read once in this process, or now.

    They are half of the time that the export of a small network takes.
    """
    with contextlib.suppress(ImportError, AttributeError):  # it is not public
        from torch.onnx._internal._lazy_import import onnxscript_apis

        onnxscript_apis.get_torchlib_ops = functools.cache(onnxscript_apis.get_torchlib_ops)
        if now:
            onnxscript_apis.get_torchlib_ops()
