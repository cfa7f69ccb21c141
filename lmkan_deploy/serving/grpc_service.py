"""The Open Inference Protocol (V2) over gRPC, with the stubs that Triton's client package publishes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import numpy as np
from google.protobuf.json_format import ParseDict
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as rpc

from lmkan_deploy.errors import LmkanError
from lmkan_deploy.runtime.tensors import Arrays
from lmkan_deploy.serving.context import EXTENSIONS, SERVER_NAME, Context
from lmkan_deploy.serving.description import model_config, model_metadata
from lmkan_deploy.serving.errors import BadRequestError, UnsupportedError, statuses
from lmkan_deploy.serving.json_codec import MICROSECONDS
from lmkan_deploy.serving.messages import (
    check_shape,
    dtype_of,
    from_bytes,
    from_values,
    protocol_name,
    select_outputs,
)
from lmkan_deploy.serving.statistics import model_statistics
from lmkan_deploy.version import __version__

_log = logging.getLogger(__name__)

# Field of InferTensorContents that holds numbers of a type; float16 and bfloat16 travel as bytes only.
_CONTENTS = {
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "BOOL": "bool_contents",
}

_OPEN_METHODS = ("/inference.GRPCInferenceService/ServerLive", "/inference.GRPCInferenceService/ServerReady")


def make_grpc_server(context: Context, *, max_concurrent: int | None, options: list[tuple[str, Any]]) -> Any:
    """A server without ports."""
    server = grpc.aio.server(
        interceptors=[_Authorization(context)],
        maximum_concurrent_rpcs=max_concurrent,
        options=[
            ("grpc.max_receive_message_length", context.max_body),
            ("grpc.max_send_message_length", -1),
            *options,
        ],
    )
    rpc.add_GRPCInferenceServiceServicer_to_server(_Service(context), server)
    return server


class _Authorization(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without the token."""

    def __init__(self, context: Context) -> None:
        self._context = context

        async def refuse(_: Any, call: Any) -> None:
            await call.abort(
                grpc.StatusCode.UNAUTHENTICATED, "expected the metadata 'authorization: Bearer TOKEN'"
            )

        self._refusal = grpc.unary_unary_rpc_method_handler(refuse)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        if self._context.token is not None and details.method not in _OPEN_METHODS:
            try:
                self._context.authorize(dict(details.invocation_metadata).get("authorization"))
            except LmkanError:
                return self._refusal
        return await continuation(details)


def _answers_errors(method: Callable[[_Service, Any, Any], Awaitable[Any]]) -> Any:
    """A method whose LmkanErrors become statuses."""

    async def wrapped(self: _Service, request: Any, call: Any) -> Any:
        try:
            return await method(self, request, call)
        except LmkanError as error:
            await call.abort(getattr(grpc.StatusCode, statuses(error)[1]), str(error))

    return wrapped


class _Service(rpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, context: Context) -> None:
        self._context = context

    async def ServerLive(self, request: Any, call: Any) -> Any:  # noqa: N802
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, call: Any) -> Any:  # noqa: N802
        return pb.ServerReadyResponse(ready=self._context.ready)

    async def ServerMetadata(self, request: Any, call: Any) -> Any:  # noqa: N802
        return pb.ServerMetadataResponse(name=SERVER_NAME, version=__version__, extensions=EXTENSIONS)

    async def ModelReady(self, request: Any, call: Any) -> Any:  # noqa: N802
        try:
            model = self._model(request)
        except LmkanError:
            return pb.ModelReadyResponse(ready=False)
        ready = not self._context.draining and model.health.problem is None
        return pb.ModelReadyResponse(ready=ready)

    @_answers_errors
    async def ModelMetadata(self, request: Any, call: Any) -> Any:  # noqa: N802
        model = self._model(request)
        versions = [served.version for served in self._context.store.versions(model.name)]
        return ParseDict(model_metadata(model, versions), pb.ModelMetadataResponse())

    @_answers_errors
    async def ModelConfig(self, request: Any, call: Any) -> Any:  # noqa: N802
        config = model_config(self._model(request), self._context.store.options)
        return ParseDict({"config": config}, pb.ModelConfigResponse())

    @_answers_errors
    async def ModelStatistics(self, request: Any, call: Any) -> Any:  # noqa: N802
        store = self._context.store
        if not request.name:
            models = store.loaded()
        elif request.version:
            models = [self._model(request)]
        else:
            models = store.versions(self._model(request).name)
        return ParseDict(
            {"model_stats": model_statistics(models, self._context.metrics)}, pb.ModelStatisticsResponse()
        )

    @_answers_errors
    async def RepositoryIndex(self, request: Any, call: Any) -> Any:  # noqa: N802
        entries = [
            entry for entry in self._context.store.index() if entry["state"] == "READY" or not request.ready
        ]
        return ParseDict({"models": entries}, pb.RepositoryIndexResponse())

    @_answers_errors
    async def RepositoryModelLoad(self, request: Any, call: Any) -> Any:  # noqa: N802
        if request.parameters:
            raise UnsupportedError("parameters of a load are not supported; change the model's files instead")
        await self._context.control.load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    @_answers_errors
    async def RepositoryModelUnload(self, request: Any, call: Any) -> Any:  # noqa: N802
        await self._context.control.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    async def ModelInfer(self, request: Any, call: Any) -> Any:  # noqa: N802
        try:
            return await self._infer(request, call.time_remaining())
        except LmkanError as error:
            await call.abort(getattr(grpc.StatusCode, statuses(error)[1]), str(error))

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], call: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Answers one after the other; an error is an answer too, and the stream goes on."""
        async for request in requests:
            try:
                yield pb.ModelStreamInferResponse(
                    infer_response=await self._infer(request, call.time_remaining())
                )
            except LmkanError as error:
                # The id tells the client whose error it is.
                yield pb.ModelStreamInferResponse(
                    error_message=str(error), infer_response=pb.ModelInferResponse(id=request.id)
                )

    async def _infer(self, request: Any, remaining: float | None) -> Any:
        model = self._context.store.get(request.model_name, request.model_version)
        started = time.perf_counter()
        status = "OK"
        try:
            timeout = _timeout(request, remaining)
            future = model.submit(_inputs(request))
            outputs = await self._context.patience.result(future, self._context.limit(timeout))
            selected = select_outputs(outputs, [_output_name(output) for output in request.outputs])
            as_bytes = bool(request.raw_input_contents) or not request.inputs
            return _response(request, model.name, model.version, selected, as_bytes)
        except asyncio.CancelledError:
            status = "CANCELLED"
            raise
        except Exception as error:
            status = statuses(error)[1] if isinstance(error, LmkanError) else "INTERNAL"
            raise
        finally:
            model.metrics.answered("grpc", status, time.perf_counter() - started)

    def _model(self, request: Any) -> Any:
        return self._context.store.get(request.name, request.version)


def _timeout(request: Any, remaining: float | None) -> float | None:
    asked = request.parameters["timeout"].int64_param if "timeout" in request.parameters else 0
    if asked <= 0:
        return remaining
    return asked * MICROSECONDS if remaining is None else min(asked * MICROSECONDS, remaining)


def _inputs(request: Any) -> Arrays:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise BadRequestError(f"expected raw contents for all {len(request.inputs)} inputs, found {len(raw)}")
    result: Arrays = {}
    for index, tensor in enumerate(request.inputs):
        name = tensor.name
        if name in result:
            raise BadRequestError(f"expected each input once, found {name} twice")
        dtype = dtype_of(tensor.datatype, name)
        shape = check_shape(list(tensor.shape), name)
        if "shared_memory_region" in tensor.parameters:
            raise UnsupportedError("shared memory is not supported; send the tensor itself")
        if raw:
            result[name] = from_bytes(raw[index], dtype, shape, name)
            continue
        field = _CONTENTS.get(tensor.datatype)
        if field is None:
            raise BadRequestError(
                f"expected raw contents for input {name} of type {tensor.datatype}, found none"
            )
        result[name] = from_values(getattr(tensor.contents, field), dtype, shape, name)
    return result


def _output_name(output: Any) -> str:
    if "classification" in output.parameters or "shared_memory_region" in output.parameters:
        raise UnsupportedError("classification and shared memory are not supported; take the output itself")
    return str(output.name)


def _response(request: Any, model: str, version: str, outputs: Arrays, as_bytes: bool) -> Any:
    """Outputs travel as the inputs did: as bytes or as numbers."""
    response = pb.ModelInferResponse(model_name=model, model_version=version, id=request.id)
    datatypes = {name: protocol_name(array.dtype) for name, array in outputs.items()}
    as_bytes = as_bytes or not all(datatype in _CONTENTS for datatype in datatypes.values())
    for name, array in outputs.items():
        tensor = response.outputs.add(name=name, datatype=datatypes[name], shape=array.shape)
        if as_bytes:
            response.raw_output_contents.append(array.tobytes())
        else:
            getattr(tensor.contents, _CONTENTS[datatypes[name]]).extend(np.ravel(array).tolist())
    return response
