"""Serves model.onnx, which lies beside this file, on Ray: the Open Inference Protocol as JSON over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from ray import serve  # type: ignore[import-not-found]
from starlette.requests import Request
from starlette.responses import JSONResponse

import lmkan_deploy
from lmkan_deploy.errors import InputError
from lmkan_deploy.runtime.tensors import Arrays, TensorSpec, check_inputs, numpy_dtype

# ONNX Runtime's packages send usage data to Microsoft, which is for the user to allow.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

MODEL = Path(__file__).resolve().with_name("model.onnx")

DATATYPES = {
    "FP16": "float16",
    "BF16": "bfloat16",
    "FP32": "float32",
    "FP64": "float64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}
NAMES = {dtype: name for name, dtype in DATATYPES.items()}


@serve.deployment(
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 64},
    max_ongoing_requests=256,
)
class Model:
    """A replica.

    Args:
        name: The model's name in URLs.
        max_batch: Most rows of a joined run; a larger request runs alone.
        max_delay_us: Microseconds that a request waits for others.
        threads: Threads of one run.
    """

    def __init__(self, name: str, max_batch: int, max_delay_us: int, threads: int) -> None:
        self.name, self.max_batch = name, max_batch
        self.runner = lmkan_deploy.load_runner(MODEL, threads=threads)
        axes = {spec.shape[0] if spec.shape else 0 for spec in (*self.runner.inputs, *self.runner.outputs)}
        self.joins = len(axes) == 1 and isinstance(next(iter(axes)), str)
        # Every request has a row or more, so no more requests than rows are taken.
        self.infer.set_max_batch_size(max_batch)
        self.infer.set_batch_wait_timeout_s(max_delay_us * 1e-6)

    async def __call__(self, request: Request) -> JSONResponse:
        """Answers a request."""
        path = request.url.path.removeprefix(request.scope.get("root_path", "")).rstrip("/")
        model = f"/v2/models/{self.name}"
        tail = path.removeprefix(model).removeprefix("/versions/1") if path.startswith(model) else None
        if request.method == "POST" and tail == "/infer":
            return await self._answer(await request.body())
        if request.method == "GET" and path in ("/v2/health/live", "/v2/health/ready"):
            return JSONResponse({})
        if request.method == "GET" and tail == "/ready":
            return JSONResponse({"name": self.name, "ready": True})
        if request.method == "GET" and tail == "":
            return JSONResponse(
                {
                    "name": self.name,
                    "versions": ["1"],
                    "platform": "onnxruntime_onnx",
                    "inputs": [_metadata(spec) for spec in self.runner.inputs],
                    "outputs": [_metadata(spec) for spec in self.runner.outputs],
                }
            )
        return _problem(404, f"expected GET {model} or POST {model}/infer, found {request.method} {path}")

    async def _answer(self, body: bytes) -> JSONResponse:
        try:
            content = _parse(body)
            names = _wanted(content, self.runner.outputs)
            outputs, problem = await self.infer(_feeds(content, self.runner.inputs))
        except InputError as error:
            return _problem(400, str(error))
        if problem is not None:
            return _problem(400, problem)
        specs = {spec.name: spec for spec in self.runner.outputs}
        tensors = [_tensor(specs[name], outputs[name]) for name in names]
        answer = {"model_name": self.name, "model_version": "1", "outputs": tensors}
        if "id" in content:
            answer["id"] = content["id"]
        try:
            return JSONResponse(answer)
        except ValueError:
            return _problem(500, "the outputs hold NaN or infinite numbers, for which JSON has no words")

    @serve.batch(max_batch_size=1024, batch_wait_timeout_s=0.0001)  # type: ignore[untyped-decorator]
    async def infer(self, requests: list[Arrays]) -> list[tuple[Arrays, str | None]]:
        """Runs requests, joined along the first axis where the model allows it.

        Returns:
            Outputs of each, or what was wrong with it.
        """
        answers: list[tuple[Arrays, str | None]] = [({}, "was not run")] * len(requests)
        for group in self._groups(requests):
            results = await asyncio.to_thread(self._run, [requests[index] for index in group])
            for index, result in zip(group, results, strict=True):
                answers[index] = result
        return answers

    def _groups(self, requests: list[Arrays]) -> list[list[int]]:
        """Indices of requests that run together: of the same shape behind the rows, and not too many rows."""
        if not self.joins:
            return [[index] for index in range(len(requests))]
        groups: list[list[int]] = []
        filling: dict[Any, tuple[list[int], int]] = {}
        for index, feeds in enumerate(requests):
            shapes = tuple(array.shape[1:] for array in feeds.values())
            rows = len(next(iter(feeds.values())))
            group, have = filling.get(shapes, ([], 0))
            if not group or have + rows > self.max_batch:
                group, have = [], 0
                groups.append(group)
            group.append(index)
            filling[shapes] = (group, have + rows)
        return groups

    def _run(self, parts: list[Arrays]) -> list[tuple[Arrays, str | None]]:
        try:
            if len(parts) == 1:
                return [(self.runner.run(parts[0]), None)]
            joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            outputs = self.runner.run(joined)
        except InputError as error:
            if len(parts) == 1:
                return [({}, str(error))]
            return [answer for part in parts for answer in self._run([part])]  # one request spoils no other
        ends = np.cumsum([len(next(iter(part.values()))) for part in parts])[:-1]
        split = {name: np.split(array, ends) for name, array in outputs.items()}
        return [({name: arrays[i] for name, arrays in split.items()}, None) for i in range(len(parts))]


def build(args: dict[str, Any]) -> Any:
    """The application, for `import_path: app:build`.

    Args:
        args: `name`, and optionally `max_batch`, `max_delay_us`, `threads`.
    """
    deployment: Any = Model  # what the decorator made of it
    return deployment.bind(
        str(args["name"]),
        int(args.get("max_batch", 1024)),
        int(args.get("max_delay_us", 100)),
        int(args.get("threads", 1)),
    )


def _problem(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, status)


def _metadata(spec: TensorSpec) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else -1 for size in spec.shape]
    return {"name": spec.name, "datatype": NAMES[spec.dtype], "shape": shape}


def _tensor(spec: TensorSpec, array: Any) -> dict[str, Any]:
    values = array.astype(np.float32) if spec.dtype == "bfloat16" else array
    return {
        "name": spec.name,
        "datatype": NAMES[spec.dtype],
        "shape": list(array.shape),
        "data": values.ravel().tolist(),
    }


def _parse(body: bytes) -> dict[str, Any]:
    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no JSON")

    try:
        content = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected a JSON object, could not read it: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("inputs"), list):
        raise InputError("expected a JSON object with a list of inputs, found none")
    return content


def _wanted(content: dict[str, Any], specs: Any) -> list[str]:
    """Names of the outputs that a request asks for."""
    known = [spec.name for spec in specs]
    asked = content.get("outputs") or []
    if not isinstance(asked, list) or not all(isinstance(output, dict) for output in asked):
        raise InputError("expected a list of objects as outputs, found something else")
    names = [output.get("name") for output in asked]
    if not all(name in known for name in names):
        raise InputError(f"expected outputs of {', '.join(known)}, found {', '.join(map(repr, names))}")
    return names or known


def _feeds(content: dict[str, Any], specs: Any) -> Arrays:
    known = {spec.name: spec for spec in specs}
    found: Arrays = {}
    for tensor in content["inputs"]:
        spec = known.get(str(tensor.get("name"))) if isinstance(tensor, dict) else None
        if spec is None or spec.name in found:
            raise InputError(f"expected the inputs {', '.join(known)}, each once, found another")
        found[spec.name] = _array(tensor, spec)
    check_inputs(specs, found)
    return {name: found[name] for name in known}


def _array(tensor: dict[str, Any], spec: TensorSpec) -> Any:
    if tensor.get("datatype") != NAMES[spec.dtype]:
        found = tensor.get("datatype")
        raise InputError(f"expected datatype {NAMES[spec.dtype]} of input {spec.name}, found {found!r}")
    try:
        values, shape, dtype = np.asarray(tensor["data"]), tensor["shape"], numpy_dtype(spec.dtype)
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"found shape {shape!r}")
        kind = "f" if spec.dtype == "bfloat16" else dtype.kind
        if values.size and values.dtype.kind not in {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}[kind]:
            raise ValueError(f"found {values.dtype} values")  # a fraction would be cut off
        with np.errstate(over="ignore"):
            array = values.astype(dtype)
        if kind in "iu" and not np.array_equal(array, values):
            raise ValueError("found a number out of range")
        if kind == "f" and not np.isfinite(array.astype(np.float64)).all():
            raise ValueError("found a number out of range")
        return array.reshape(shape)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise InputError(
            f"expected data and shape of {spec.dtype} for input {spec.name}, could not read them: {error}"
        ) from error
