"""The Open Inference Protocol (V2) over HTTP, as an ASGI application."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any, NamedTuple

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from lmkan_deploy.errors import LmkanError
from lmkan_deploy.serving.context import EXTENSIONS, SERVER_NAME, Context
from lmkan_deploy.serving.description import model_config, model_metadata, openapi
from lmkan_deploy.serving.errors import BadRequestError, TooLargeError, UnsupportedError, statuses
from lmkan_deploy.serving.json_codec import flag, parse_object, parse_request, write_response
from lmkan_deploy.serving.messages import select_outputs
from lmkan_deploy.serving.metrics import CONTENT_TYPE
from lmkan_deploy.serving.models import ServedModel
from lmkan_deploy.serving.statistics import model_statistics, server_status
from lmkan_deploy.serving.status_page import status_page
from lmkan_deploy.version import __version__

_log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_JSON = (b"content-type", b"application/json")
_BYTES = (b"content-type", b"application/octet-stream")

_LEFT = "408"
"""How a request counts whose client has left: nobody sees an answer."""

_INFER_PATH = re.compile(r"/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer")
"""The one path that is found without Starlette, whose routing would cost a tenth of a request."""

_OPEN_PATHS = ("/v2/health/live", "/v2/health/ready", "/")
"""What needs no token: probes, and the status page, which holds no data itself and asks for the token."""

_PAGE_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'",
}


def make_http_app(context: Context) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The application for uvicorn."""
    pages = _Pages(context)
    model = "/v2/models/{name}"
    version = model + "/versions/{version}"
    routes = [
        *(Route(f"{path}/infer", pages.only_post, methods=["POST"]) for path in (model, version)),
        Route("/v2/health/live", pages.live),
        Route("/v2/health/ready", pages.ready),
        Route("/v2", pages.server),
        Route("/v2/models/stats", pages.statistics),
        *(Route(path, pages.model) for path in (model, version)),
        *(Route(f"{path}/ready", pages.model_ready) for path in (model, version)),
        *(Route(f"{path}/config", pages.config) for path in (model, version)),
        *(Route(f"{path}/stats", pages.statistics) for path in (model, version)),
        Route("/v2/repository/index", pages.index, methods=["POST"]),
        Route("/v2/repository/models/{name}/load", pages.load, methods=["POST"]),
        Route("/v2/repository/models/{name}/unload", pages.unload, methods=["POST"]),
        Route("/metrics", pages.metrics),
        Route("/openapi.json", pages.openapi),
        Route("/status.json", pages.status),
        Route("/", pages.page),
    ]
    handlers: Any = {LmkanError: _answer_error, HTTPException: _answer_http_error}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return _Entrance(app, _Infer(context), context)


class _Entrance:
    """What every request passes: identity, authorization, and the word that the connection ends."""

    def __init__(self, app: Starlette, infer: _Infer, context: Context) -> None:
        self._app, self._infer, self._context = app, infer, context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = self._context
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        identifier = given if 0 < len(given) <= 128 and given.isascii() else context.new_id().encode()
        scope["request_id"] = identifier.decode()
        started = time.perf_counter()
        status = 0

        def own_headers() -> list[tuple[bytes, bytes]]:
            name = (b"x-request-id", identifier)
            return [name, (b"connection", b"close")] if context.draining else [name]

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *own_headers()]
            await send(message)

        path = scope["path"]
        try:
            if context.token is not None and path not in _OPEN_PATHS:
                header = headers.get(b"authorization")
                context.authorize(None if header is None else header.decode("latin-1"))
            match = _INFER_PATH.fullmatch(path) if scope["method"] == "POST" else None
            if match is None:
                await self._app(scope, receive, send_with_headers)
            else:
                answer = await self._infer(match["name"], match["version"], headers, receive)
                if answer is not None:
                    status = 200
                    response = [*answer.headers, *own_headers()]
                    await send({"type": "http.response.start", "status": 200, "headers": response})
                    await send({"type": "http.response.body", "body": answer.body})
        except LmkanError as error:
            await _send(send_with_headers, _error_json(statuses(error)[0], str(error)))
        except Exception as error:
            if status:
                raise
            await _send(send_with_headers, _crash(scope["request_id"], error))
        finally:
            if context.log_requests:
                _log.info(
                    "request",
                    extra={
                        "request_id": scope["request_id"],
                        "method": scope["method"],
                        "path": path,
                        "status": status,
                        "seconds": round(time.perf_counter() - started, 6),
                    },
                )


class _Answer(NamedTuple):
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class _Infer:
    """The endpoint that matters. It answers nothing where nobody is there any more."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(
        self, name: str, version: str | None, headers: dict[bytes, bytes], receive: Receive
    ) -> _Answer | None:
        body = await read_body(headers, receive, self._context)
        model = self._context.store.get(name, version)
        started = time.perf_counter()
        status = "200"
        try:
            answer = await self._answer(model, headers, body, receive)
            if answer is None:
                status = _LEFT
            return answer
        except asyncio.CancelledError:
            status = _LEFT
            raise
        except Exception as error:
            status = str(statuses(error)[0].value) if isinstance(error, LmkanError) else "500"
            raise
        finally:
            model.metrics.answered("http", status, time.perf_counter() - started)

    async def _answer(
        self, model: ServedModel, headers: dict[bytes, bytes], body: bytes, receive: Receive
    ) -> _Answer | None:
        request = parse_request(body, _header_length(headers))
        future = model.submit(request.inputs)

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        timeout = self._context.limit(request.timeout)
        try:
            outputs = await self._context.patience.result(future, timeout, gone)
        except asyncio.CancelledError:
            if not future.cancelled():
                raise
            return None
        outputs = select_outputs(outputs, request.outputs)
        content, header_length = write_response(
            model.name, model.version, request.id, outputs, request.outputs, request.binary
        )
        length = (b"content-length", b"%d" % len(content))
        if header_length is None:
            return _Answer((length, _JSON), content)
        return _Answer((length, _BYTES, (b"inference-header-content-length", b"%d" % header_length)), content)


async def read_body(headers: dict[bytes, bytes], receive: Receive, context: Context) -> bytes:
    """The whole body of a request.

    Raises:
        TooLargeError: It is larger than the server takes.
        BadRequestError: It did not arrive in time, or its client left.
        UnsupportedError: It is compressed.
    """
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise UnsupportedError("compressed bodies are not supported; send it plain")
    declared = headers.get(b"content-length", b"0")
    too_large = declared.isdigit() and int(declared) > context.max_body
    if too_large and b"expect" in headers:
        raise _too_large(context)
    message = await receive()
    if not message.get("more_body", False) and not too_large:
        body: bytes = message.get("body", b"")
        if message["type"] == "http.disconnect" or len(body) > context.max_body:
            raise _too_large(context) if body else BadRequestError("expected a body, found the client gone")
        return body
    try:
        return await asyncio.wait_for(_read_rest(message, receive, context), context.body_timeout)
    except asyncio.TimeoutError as error:
        raise BadRequestError(
            f"expected the whole body within {context.body_timeout:g} s, found it incomplete"
        ) from error


async def _read_rest(message: Message, receive: Receive, context: Context) -> bytes:
    chunks = []
    size = 0
    while True:
        if message["type"] == "http.disconnect":
            raise BadRequestError("expected a whole body, found the client gone")
        chunk = message.get("body", b"")
        size += len(chunk)
        if size <= context.max_body:
            chunks.append(chunk)
        else:
            chunks.clear()  # read on, or the client would never look at the answer
        if not message.get("more_body", False):
            break
        message = await receive()
    if size > context.max_body:
        raise _too_large(context)
    return b"".join(chunks)


def _too_large(context: Context) -> TooLargeError:
    return TooLargeError(f"expected a body of at most {context.max_body} bytes, found more; send fewer rows")


def _header_length(headers: dict[bytes, bytes]) -> int | None:
    text = headers.get(b"inference-header-content-length")
    if text is None:
        return None
    if not text.isdigit() or len(text) > 18:
        raise BadRequestError(
            f"expected a number as Inference-Header-Content-Length, found {text[:50].decode('latin-1')!r}"
        )
    return int(text)


class _Pages:
    """Everything but inference."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def only_post(self, _: Request) -> Response:
        """Stands for the infer path in the table of routes, which answers other methods with 405."""
        raise AssertionError("found before Starlette")

    async def live(self, _: Request) -> Response:
        return _json({"live": True})

    async def ready(self, _: Request) -> Response:
        return _json({"ready": self._context.ready}, _ready_status(self._context.ready))

    async def server(self, _: Request) -> Response:
        return _json({"name": SERVER_NAME, "version": __version__, "extensions": EXTENSIONS})

    async def model(self, request: Request) -> Response:
        model = self._model(request)
        versions = [served.version for served in self._context.store.versions(model.name)]
        return _json(model_metadata(model, versions))

    async def model_ready(self, request: Request) -> Response:
        model = self._model(request)
        ready = not self._context.draining and model.health.problem is None
        return _json({"name": model.name, "ready": ready}, _ready_status(ready))

    async def config(self, request: Request) -> Response:
        return _json(model_config(self._model(request), self._context.store.options))

    async def statistics(self, request: Request) -> Response:
        if "name" not in request.path_params:
            models = self._context.store.loaded()
        elif "version" in request.path_params:
            models = [self._model(request)]
        else:
            models = self._context.store.versions(self._model(request).name)
        return _json({"model_stats": model_statistics(models, self._context.metrics)})

    async def index(self, request: Request) -> Response:
        body = await read_body(dict(request.scope["headers"]), request.receive, self._context)
        only_ready = bool(body) and flag(parse_object(body), "ready", default=False)
        entries = self._context.store.index()
        return _json([entry for entry in entries if entry["state"] == "READY" or not only_ready])

    async def load(self, request: Request) -> Response:
        await self._context.control.load(request.path_params["name"])
        return _json({})

    async def unload(self, request: Request) -> Response:
        await self._context.control.unload(request.path_params["name"])
        return _json({})

    async def metrics(self, _: Request) -> Response:
        return Response(self._context.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def openapi(self, _: Request) -> Response:
        return _json(openapi())

    async def status(self, _: Request) -> Response:
        return _json(server_status(self._context))

    async def page(self, _: Request) -> Response:
        return HTMLResponse(status_page(), headers=_PAGE_HEADERS)

    def _model(self, request: Request) -> ServedModel:
        return self._context.store.get(request.path_params["name"], request.path_params.get("version"))


def _ready_status(ready: bool) -> HTTPStatus:
    return HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE


def _json(value: Any, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def _error_json(status: HTTPStatus, message: str) -> Response:
    headers = {"retry-after": "1"} if status == HTTPStatus.TOO_MANY_REQUESTS else {}
    if status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        headers["connection"] = "close"
    return Response(orjson.dumps({"error": message}), status, headers=headers, media_type="application/json")


async def _send(send: Send, response: Response) -> None:
    start = {
        "type": "http.response.start",
        "status": response.status_code,
        "headers": response.raw_headers,
    }
    await send(start)
    await send({"type": "http.response.body", "body": response.body})


async def _answer_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, LmkanError)
    return _error_json(statuses(error)[0], str(error))


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.NOT_FOUND:
        path = request.url.path[:200]
        message = f"expected a path of the Open Inference Protocol, found {path}; see /openapi.json"
    else:
        message = str(error.detail)
    response = _error_json(HTTPStatus(error.status_code), message)
    response.headers.update(error.headers or {})
    return response


def _crash(identifier: str, error: Exception) -> Response:
    _log.error("request failed", exc_info=error, extra={"request_id": identifier})
    message = f"internal error; the server's log has it under {identifier}"
    return _error_json(HTTPStatus.INTERNAL_SERVER_ERROR, message)
