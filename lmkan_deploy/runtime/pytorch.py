"""PyTorch networks as runners: what exported models are verified against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmkan_deploy.checkpoints.input_shapes import call_arguments
from lmkan_deploy.checkpoints.state_dict import one_line
from lmkan_deploy.errors import InputError
from lmkan_deploy.runtime.tensors import Arrays, TensorSpec, check_inputs, numpy_dtype


class TorchRunner:
    """A network on the CPU.

    Args:
        module: In eval mode.
        inputs: Its inputs, in the order of its forward's parameters.
        output_names: Names to give its outputs, in order.
    """

    name = "pytorch"

    def __init__(self, module: nn.Module, inputs: Sequence[TensorSpec], output_names: Sequence[str]) -> None:
        self.module = module
        self.inputs = list(inputs)
        self.outputs = [TensorSpec(name, (), "float32") for name in output_names]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """See `Runner.run`."""
        check_inputs(self.inputs, feeds)
        tensors = [_to_tensor(feeds[spec.name]) for spec in self.inputs]
        args, kwargs = call_arguments(self.module, [spec.name for spec in self.inputs], tensors)
        try:
            with torch.inference_mode():
                leaves = torch.utils._pytree.tree_leaves(self.module(*args, **kwargs))
        except Exception as error:  # the user's network may raise anything
            raise InputError(
                f"the PyTorch network failed: {type(error).__name__}: {one_line(error)}"
            ) from error
        results = [leaf for leaf in leaves if leaf is not None]  # an exported model has no output for None
        if len(results) != len(self.outputs):
            raise InputError(f"expected {len(self.outputs)} outputs, found {len(results)}")
        return {spec.name: _to_array(t) for spec, t in zip(self.outputs, results, strict=True)}


def _to_tensor(array: NDArray[Any]) -> Tensor:
    array = np.array(array, order="C")  # a copy: networks may change their inputs
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _to_array(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
    return np.asarray(tensor.numpy())
