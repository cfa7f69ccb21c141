"""Runs the ONNX file in this folder for Triton's Python backend.

Needs numpy and onnxruntime, 1.17 or later, in the Python that Triton starts; lmkan-deploy is not needed: the
library in this folder has its operators.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# ONNX Runtime's packages send usage data to Microsoft, which is for the user to allow.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

MODEL = "model.onnx"
LIBRARY = "liblmkan_onnxruntime.so"


class TritonPythonModel:
    """The model, as Triton calls it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the model.

        Args:
            args: Triton's: the configuration as JSON, and where the repository is.
        """
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        if not folder.is_dir():  # args may point at the version itself
            folder = Path(__file__).resolve().parent
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(folder / LIBRARY))
        threads = config.get("parameters", {}).get("threads", {}).get("string_value")
        if threads:
            options.intra_op_num_threads = int(threads)
        self.session = ort.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])
        self.joins = int(config.get("max_batch_size", 0)) > 0
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.dtypes = {
            entry["name"]: np.dtype(pb_utils.triton_string_to_numpy(entry["data_type"]))
            for entry in config["input"]
        }

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers requests: those whose rows fit together in one run, and each on its own if that run fails.

        Args:
            requests: Triton's.

        Returns:
            A response, or an error, for each.
        """
        responses: list[Any] = [None] * len(requests)
        groups: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
        for index, request in enumerate(requests):
            try:
                feeds = self._feeds(request)
            except Exception as error:  # a bad request is answered, and spoils no other
                responses[index] = _failure(error)
                continue
            shapes = tuple(array.shape[1:] for array in feeds.values())
            groups.setdefault(shapes if self.joins else index, []).append((index, feeds))
        for group in groups.values():
            results = self._run_joined([feeds for _, feeds in group])
            for (index, _), result in zip(group, results, strict=True):
                responses[index] = self._response(requests[index], result)
        return responses

    def _feeds(self, request: Any) -> dict[str, Any]:
        feeds = {}
        for name in self.inputs:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is None:
                raise ValueError(f"expected the inputs {', '.join(self.inputs)}, found no {name}")
            array = tensor.as_numpy()
            if array.dtype != self.dtypes[name]:
                raise ValueError(f"expected {self.dtypes[name]} as input {name}, found {array.dtype}")
            feeds[name] = array
        if self.joins:
            rows = {array.shape[:1] for array in feeds.values()}
            if len(rows) != 1 or rows == {()}:
                raise ValueError("expected inputs with the same number of rows, found others")
        return feeds

    def _run_joined(self, parts: list[dict[str, Any]]) -> list[Any]:
        """Outputs for each part, or the error that it caused."""
        if len(parts) == 1:
            try:
                return [self._run(parts[0])]
            except Exception as error:
                return [error]
        try:
            outputs = self._run(
                {name: np.concatenate([part[name] for part in parts]) for name in self.inputs}
            )
        except Exception:
            return [result for part in parts for result in self._run_joined([part])]
        ends = np.cumsum([len(part[self.inputs[0]]) for part in parts])[:-1]
        split = {name: np.split(array, ends) for name, array in outputs.items()}
        return [{name: arrays[index] for name, arrays in split.items()} for index in range(len(parts))]

    def _run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self.outputs, self.session.run(None, feeds), strict=True))

    def _response(self, request: Any, result: Any) -> Any:
        if isinstance(result, Exception):
            return _failure(result)
        wanted = request.requested_output_names()
        tensors = [
            pb_utils.Tensor(name, np.ascontiguousarray(array))
            for name, array in result.items()
            if not wanted or name in wanted
        ]
        return pb_utils.InferenceResponse(output_tensors=tensors)


def _failure(error: Exception) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error)))
