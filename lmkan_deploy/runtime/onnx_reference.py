"""onnx's ReferenceEvaluator: slow, and independent of every runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
from numpy.typing import NDArray

from lmkan_deploy.converters.model_file import load_model
from lmkan_deploy.errors import InputError, ModelError
from lmkan_deploy.runtime.tensors import Arrays, TensorSpec, check_inputs
from lmkan_deploy.spec import DOMAIN


class OnnxReferenceRunner:
    """Evaluates a model's nodes in NumPy; an `LMKAN2D` node through the function that the file carries.

    Args:
        path: An ONNX file.

    Raises:
        ModelError: The file can't be read, or has operators without a function.
    """

    name = "onnx-reference"

    def __init__(self, path: Path) -> None:
        loaded = load_model(path)
        # onnx would read the weights itself, but no links.
        model = ir.serde.serialize_model(ir.external_data.load_to_model(loaded))
        for function in model.functions:
            if function.domain == DOMAIN:
                del function.attribute[:]  # for TensorRT; the evaluator wants nodes to have them
        try:
            self._evaluator = onnx.reference.ReferenceEvaluator(model)
        except (NotImplementedError, RuntimeError) as error:
            raise ModelError(
                f"expected operators that onnx's ReferenceEvaluator has, or their functions in {path}: {error}"
            ) from error
        except Exception as error:  # its operators raise whatever they meet
            raise ModelError(
                f"onnx's ReferenceEvaluator could not load {path}: {type(error).__name__}: {error}; export the "
                "model again"
            ) from error
        self.inputs = [_spec(value) for value in model.graph.input]
        self.outputs = [_spec(value) for value in model.graph.output]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """See `Runner.run`."""
        check_inputs(self.inputs, feeds)
        try:
            with np.errstate(all="ignore"):
                results = self._evaluator.run(None, dict(feeds))
        except Exception as error:  # its operators raise whatever NumPy does
            raise InputError(
                f"onnx's ReferenceEvaluator could not run the model: {type(error).__name__}: {error}; check that "
                "tables fit the features of their nodes"
            ) from error
        return {spec.name: np.asarray(array) for spec, array in zip(self.outputs, results, strict=True)}


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None) for dim in tensor.shape.dim
    )
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    except KeyError as error:
        raise ModelError(
            f"expected inputs and outputs that are tensors of numbers, found {value.name} of another or no type; "
            "export the model again"
        ) from error
    return TensorSpec(value.name, shape, dtype)
