"""Starts a server: its sockets, and one process or several that are kept alive."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path

from lmkan_deploy.errors import InputError, LibraryError
from lmkan_deploy.serving.logs import set_up_logs
from lmkan_deploy.serving.metrics import MULTIPROCESS_FOLDER, forget_process
from lmkan_deploy.serving.options import ServerOptions
from lmkan_deploy.serving.process import STARTUP_FAILURE, run_process, worker_main

_log = logging.getLogger(__name__)

_HEALTHY_SECONDS = 10.0
"""A process that lived longer is replaced at once; one that died sooner after a pause that doubles."""

_LONGEST_PAUSE = 30.0


def serve(options: ServerOptions, announce: Callable[[str], None] = lambda _: None) -> int:
    """Serves until SIGTERM or SIGINT.

    Args:
        options: See `ServerOptions`.
        announce: Called with each line that says what is about to run.

    Returns:
        0 after an orderly end; another number where a process could not start or had to be killed.

    Raises:
        LmkanError: The options or models are wrong, or a port is taken.
    """
    options.check()
    with _sockets(options) as (http_socket, grpc_port):
        for line in describe(options, http_socket.getsockname()[1], grpc_port):
            announce(line)
        if options.processes == 1:
            run_process(options, http_socket, grpc_port)
            return 0
        return _Supervisor(options, http_socket, grpc_port).run()


def describe(options: ServerOptions, http_port: int, grpc_port: int | None) -> list[str]:
    """What a server does, for people."""
    scheme = "http" if options.tls_certificate is None else "https"
    host = f"[{options.host}]" if ":" in options.host else options.host
    processes = "1 process" if options.processes == 1 else f"{options.processes} processes"
    threads = "1 thread" if options.threads == 1 else f"{options.threads} threads"
    lines = [
        f"models    {', '.join(sorted(options.all_models()))}",
        f"HTTP      {scheme}://{host}:{http_port}",
        *([f"gRPC      {host}:{grpc_port}"] if grpc_port is not None else []),
        f"runs in   {processes}, {threads} a run",
        f"batches   up to {options.batching.max_batch} rows, joined for up to "
        f"{options.batching.max_delay * 1e6:.0f} µs, {options.batching.max_queue} rows in the queue",
    ]
    if options.token is None and options.host not in ("127.0.0.1", "localhost", "::1"):
        lines.append("note      everyone who reaches this address can use it; --token-file asks for a token")
    return lines


@contextlib.contextmanager
def _sockets(options: ServerOptions) -> Iterator[tuple[socket.socket, int | None]]:
    """A bound socket for HTTP, and a port for gRPC that stays reserved meanwhile."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        http_socket = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        http_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(http_socket, options.host, options.http_port)
        http_socket.set_inheritable(True)
        if options.grpc_port is None:
            yield http_socket, None
            return
        if options.grpc_port:
            # gRPC shares ports between processes, so it would also share one with a stranger.
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                _bind(probe, options.host, options.grpc_port)
        reserved = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _bind(reserved, options.host, options.grpc_port)
        yield http_socket, int(reserved.getsockname()[1])


def _bind(bound: socket.socket, host: str, port: int) -> None:
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        raise InputError(
            f"expected to listen on {host} port {port}, found {error}; pass another --host, --http-port or "
            "--grpc-port"
        ) from error


@dataclass
class _Worker:
    number: int
    process: SpawnProcess
    started: float
    pause: float = 0.5


class _Supervisor:
    """Keeps worker processes alive that share a socket."""

    def __init__(self, options: ServerOptions, http_socket: socket.socket, grpc_port: int | None) -> None:
        self._options, self._socket, self._grpc_port = options, http_socket, grpc_port
        self._context = multiprocessing.get_context("spawn")
        self._stopping = False

    def run(self) -> int:
        set_up_logs(as_json=self._options.json_logs)
        with tempfile.TemporaryDirectory(prefix="lmkan-serve-") as name:
            self._folder = Path(name)
            (self._folder / "metrics").mkdir()
            os.environ[MULTIPROCESS_FOLDER] = str(self._folder / "metrics")
            wake, wake_write = multiprocessing.Pipe(duplex=False)

            def stop(*_: object) -> None:
                if self._stopping:
                    for worker in workers.values():
                        worker.process.kill()
                self._stopping = True
                wake_write.send(None)

            workers: dict[int, _Worker] = {}
            for sig in (signal.SIGTERM, signal.SIGINT):
                signal.signal(sig, stop)
            for number in range(self._options.processes):
                workers[number] = _Worker(number, self._spawn(number, strict=True), time.monotonic())
            try:
                failed = self._watch(workers, wake)
            finally:
                self._socket.close()
                killed = self._stop(workers)
        return STARTUP_FAILURE if failed else int(killed)

    def _spawn(self, number: int, *, strict: bool) -> SpawnProcess:
        process = self._context.Process(
            target=worker_main,
            args=(self._options, self._socket, self._grpc_port, number, self._folder, strict),
            name=f"lmkan-serve-{number}",
        )
        process.start()
        return process

    def _watch(self, workers: dict[int, _Worker], wake: multiprocessing.connection.Connection) -> bool:
        """Replaces dead processes until a signal; True where one can't even start."""
        while not self._stopping:
            sentinels = {worker.process.sentinel: worker for worker in workers.values()}
            for ready in multiprocessing.connection.wait([*sentinels, wake]):
                worker = sentinels.get(ready) if isinstance(ready, int) else None
                if worker is None or self._stopping:
                    continue
                worker.process.join()
                if worker.process.exitcode == STARTUP_FAILURE:
                    return True
                self._replace(worker)
        return False

    def _replace(self, worker: _Worker) -> None:
        process = worker.process
        _log.error(
            "process %d (pid %s) ended with %s; starting another",
            worker.number,
            process.pid,
            process.exitcode,
        )
        if process.pid is not None:
            forget_process(process.pid)
        if time.monotonic() - worker.started < _HEALTHY_SECONDS:
            worker.pause = min(2 * worker.pause, _LONGEST_PAUSE)
            time.sleep(worker.pause)
        else:
            worker.pause = 0.5
        # A model that became unreadable meanwhile must not keep the others from being served.
        worker.process, worker.started = self._spawn(worker.number, strict=False), time.monotonic()

    def _stop(self, workers: dict[int, _Worker]) -> bool:
        """Asks all processes to end, and kills those that don't; whether there were any."""
        for worker in workers.values():
            if worker.process.is_alive():
                worker.process.terminate()
        deadline = time.monotonic() + 2 * self._options.grace + 5.0
        killed = False
        for worker in workers.values():
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
                killed = True
        return killed


def require_packages() -> None:
    """Checks for the packages of the extra.

    Raises:
        LibraryError: One is missing.
    """
    import importlib

    for module in ("uvicorn", "starlette", "orjson", "prometheus_client", "grpc", "tritonclient.grpc"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise LibraryError(
                f"expected the package {error.name}, found none; install lmkan-deploy[serve]"
            ) from error
