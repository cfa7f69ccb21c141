"""One server process: an event loop with HTTP, gRPC and the models."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import uvicorn

from lmkan_deploy.errors import LmkanError
from lmkan_deploy.serving.context import Context
from lmkan_deploy.serving.control import Control
from lmkan_deploy.serving.errors import BrokenModelError
from lmkan_deploy.serving.http_app import make_http_app
from lmkan_deploy.serving.logs import set_up_logs
from lmkan_deploy.serving.metrics import Metrics
from lmkan_deploy.serving.models import ModelStore
from lmkan_deploy.serving.options import ServerOptions
from lmkan_deploy.serving.protocol import Protocol

_log = logging.getLogger(__name__)

_KEEP_ALIVE_SECONDS = 75
"""Longer than load balancers keep a connection: else they would reuse it while it is being closed."""

_DRAIN_SECONDS = 2.0
"""How long busy clients are answered with the word that their connection ends; idle ones are cut off then."""

_SWITCH_SECONDS = 5e-4
"""How long a thread may keep Python's interpreter lock while others want it. The default is 5 ms, which a model's
thread would wait for the event loop after each run."""

STARTUP_FAILURE = 2
BROKEN_MODEL = 3


def run_process(
    options: ServerOptions,
    http_socket: socket.socket,
    grpc_port: int | None,
    *,
    process: int = 0,
    folder: Path | None = None,
    strict: bool = True,
) -> None:
    """Serves until SIGTERM or SIGINT, then answers what is in flight.

    Args:
        options: See `ServerOptions`.
        http_socket: Bound, perhaps shared with other processes.
        grpc_port: Reserved, perhaps shared with other processes; None for no gRPC.
        process: Number of this process, from 0.
        folder: What `Control` shares; None for a single process.
        strict: Whether a model that can't be loaded ends the process; otherwise the others are served.

    Raises:
        LmkanError: A model can't be loaded.
        BrokenModelError: A model could not run any more.
    """
    set_up_logs(as_json=options.json_logs)
    sys.setswitchinterval(_SWITCH_SECONDS)
    np.seterr(over="ignore")  # numbers beyond a client's own type become infinite, without a line in the log
    config_loop = uvicorn.Config(app=None, log_config=None).get_loop_factory()  # type: ignore[arg-type]
    with (
        asyncio.Runner(loop_factory=config_loop)
        if sys.version_info >= (3, 11)
        else _Runner(config_loop) as runner
    ):
        runner.run(_serve(options, http_socket, grpc_port, process, folder, strict))


class _Runner:
    """asyncio.Runner of Python 3.11, as far as it is used here."""

    def __init__(self, loop_factory: Any) -> None:
        self._loop = loop_factory() if loop_factory is not None else asyncio.new_event_loop()

    def __enter__(self) -> _Runner:
        asyncio.set_event_loop(self._loop)
        return self

    def run(self, main: Any) -> None:
        self._loop.run_until_complete(main)

    def __exit__(self, *_: object) -> None:
        self._loop.close()


async def _serve(
    options: ServerOptions,
    http_socket: socket.socket,
    grpc_port: int | None,
    process: int,
    folder: Path | None,
    strict: bool,
) -> None:
    metrics = Metrics()
    broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def give_up(reason: str) -> None:
        if not broken.done():
            broken.set_result(reason)

    store = ModelStore(
        options.all_models(),
        folder=options.folder,
        options=options.batching,
        metrics=metrics,
        runtime=options.runtime,
        threads=options.threads,
        device=options.device,
        plugin=options.plugin,
        cuda_graphs=options.cuda_graphs,
        give_up=give_up,
    )
    control = Control(store, folder, process, options.processes)
    context = Context(
        store=store,
        control=control,
        metrics=metrics,
        token=options.token,
        max_body=options.max_body,
        body_timeout=options.body_timeout,
        timeout=options.timeout,
        log_requests=options.log_requests,
    )
    for name in await control.start():
        try:
            await store.load(name)
        except LmkanError:
            if strict:
                raise
    grpc_server = None
    if grpc_port is not None:
        grpc_server = await _start_grpc(context, options, grpc_port)
    server = _HttpServer(
        uvicorn.Config(
            make_http_app(context),
            http=Protocol,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            proxy_headers=False,
            ssl_certfile=options.tls_certificate,
            ssl_keyfile=options.tls_key,
            limit_concurrency=options.max_connections,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=round(options.grace),
            backlog=2048,
        ),
        context,
        process,
    )
    # What exists by now stays: looking through it for garbage again and again would stop all requests meanwhile.
    gc.collect()
    gc.freeze()
    tasks = [asyncio.create_task(control.follow()), asyncio.create_task(context.patience.watch())]
    if options.watch is not None:
        tasks.append(asyncio.create_task(_watch(store, options.watch)))
    broken.add_done_callback(lambda _: server.stop())
    await server.serve(sockets=[http_socket])
    if grpc_server is not None:
        await grpc_server.stop(options.grace)
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(store.close(), options.grace)
    metrics.flush()
    _log.info("process %d is done", process)
    if broken.done():
        raise BrokenModelError(f"{broken.result()}; the server ends, to be started anew")


async def _start_grpc(context: Context, options: ServerOptions, port: int) -> Any:
    import grpc

    from lmkan_deploy.serving.grpc_service import make_grpc_server

    server = make_grpc_server(
        context, max_concurrent=options.max_connections, options=[("grpc.so_reuseport", 1)]
    )
    address = f"[{options.host}]:{port}" if ":" in options.host else f"{options.host}:{port}"
    if options.tls_certificate is not None and options.tls_key is not None:
        pair = (options.tls_key.read_bytes(), options.tls_certificate.read_bytes())
        server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    else:
        server.add_insecure_port(address)
    await server.start()
    return server


async def _watch(store: ModelStore, seconds: float) -> None:
    """Loads models again whose files have changed, once they have stayed the same between two looks."""
    seen: list[str] = []
    while True:
        await asyncio.sleep(seconds)
        changed = await store.changed()
        for name in changed:
            if name in seen:
                with contextlib.suppress(LmkanError):  # logged by the store; the old version goes on
                    await store.load(name)
        seen = changed


class _HttpServer(uvicorn.Server):
    """uvicorn's server, which drains its connections before it stops."""

    def __init__(self, config: uvicorn.Config, context: Context, process: int) -> None:
        super().__init__(config)
        self._context, self._process = context, process
        self._draining: asyncio.Task[None] | None = None
        self._listeners: list[socket.socket] = []
        self._accepting: list[asyncio.Task[Any]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn to listen."""
        await super().startup(sockets)
        self._listeners = sockets or []
        _log.info("process %d is ready", self._process)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn for SIGTERM and SIGINT; the second one ends at once."""
        asyncio.get_running_loop().call_soon_threadsafe(self.stop)

    def stop(self) -> None:
        """Drains, then ends; called once more, ends at once."""
        if self._draining is not None:
            self.force_exit = self.should_exit = True
            return
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        # Clients come back at once when they are told that their connection ends: the port is closed before.
        self._accept_waiting()
        for server in self.servers:
            server.close()
        for listener in self._listeners:
            listener.close()
        self._context.draining = True
        _log.info("stopping: no new connections, %d open", len(self.server_state.connections))
        deadline = asyncio.get_running_loop().time() + min(
            _DRAIN_SECONDS, self.config.timeout_graceful_shutdown or 0
        )
        await asyncio.gather(*self._accepting, return_exceptions=True)
        while self.server_state.connections and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        self.should_exit = True

    def _accept_waiting(self) -> None:
        """Accepts connections that the system has made already: closing the port would reset them."""
        loop = asyncio.get_running_loop()

        def make_protocol() -> asyncio.Protocol:
            protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config, server_state=self.server_state, app_state={}, _loop=loop
            )
            return protocol

        for listener in self._listeners:
            with contextlib.suppress(OSError):  # none is left
                while True:
                    connection, _ = listener.accept()
                    connection.setblocking(False)
                    task = loop.connect_accepted_socket(make_protocol, connection, ssl=self.config.ssl)
                    self._accepting.append(loop.create_task(task))


def worker_main(
    options: ServerOptions,
    http_socket: socket.socket,
    grpc_port: int | None,
    process: int,
    folder: Path,
    strict: bool,
) -> None:
    """Entry point of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor's to pass on
    try:
        run_process(options, http_socket, grpc_port, process=process, folder=folder, strict=strict)
    except LmkanError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BROKEN_MODEL if isinstance(error, BrokenModelError) else STARTUP_FAILURE)
