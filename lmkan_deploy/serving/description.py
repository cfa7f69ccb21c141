"""Models and the server itself in the protocol's words."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

from lmkan_deploy.runtime.tensors import TensorSpec
from lmkan_deploy.serving.batching import BatchingOptions
from lmkan_deploy.serving.messages import PROTOCOL_NAMES, describe
from lmkan_deploy.serving.models import ServedModel
from lmkan_deploy.version import __version__


def model_metadata(model: ServedModel, versions: list[str]) -> dict[str, Any]:
    """Names, types and shapes of a model's tensors."""
    return {
        "name": model.name,
        "versions": versions,
        "platform": model.platform,
        "inputs": describe(model.runner.inputs),
        "outputs": describe(model.runner.outputs),
    }


def model_config(model: ServedModel, options: BatchingOptions) -> dict[str, Any]:
    """In the fields of Triton's `ModelConfig`: with batching, shapes lack the first axis."""
    joins = model.batcher.joins
    config: dict[str, Any] = {
        "name": model.name,
        "platform": model.platform,
        "backend": model.platform.split("_")[0],
        "max_batch_size": options.max_batch if joins else 0,
        "input": [_config_tensor(spec, joins) for spec in model.runner.inputs],
        "output": [_config_tensor(spec, joins) for spec in model.runner.outputs],
    }
    if joins:
        config["dynamic_batching"] = {"max_queue_delay_microseconds": round(options.max_delay * 1e6)}
    return config


def _config_tensor(spec: TensorSpec, joins: bool) -> dict[str, Any]:
    shape = spec.shape[1:] if joins else spec.shape
    return {
        "name": spec.name,
        "data_type": f"TYPE_{PROTOCOL_NAMES.get(spec.dtype, 'INVALID')}",
        "dims": [size if isinstance(size, int) else -1 for size in shape],
    }


@functools.cache
def openapi() -> dict[str, Any]:
    """The OpenAPI description of the HTTP side."""
    text = resources.files("lmkan_deploy.serving").joinpath("openapi.json").read_text(encoding="utf-8")
    description: dict[str, Any] = json.loads(text)
    description["info"]["version"] = __version__
    return description
