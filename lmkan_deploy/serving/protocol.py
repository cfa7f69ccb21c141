"""uvicorn's HTTP protocol, with answers that leave in one piece and heads that must arrive in time."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 30.0
"""How long a client may take to send the head of a request. uvicorn itself waits for ever, and every
connection that waits takes one of those that the server may have."""


class Protocol(HttpToolsProtocol):
    """Sends the head of an answer together with its body, and closes connections whose requests don't begin.

    uvicorn writes head and body one after the other. Between the two a process can be killed, and a load
    balancer that has the head can't ask another server any more; besides, every write is a system call.
    """

    _in_head = False
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(_JoinedWrites(transport, self.loop))  # type: ignore[arg-type]
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        # A head that comes in one piece needs no timer, and between requests uvicorn has one, until something
        # arrives, be it an empty line or the rest of a body that was answered already.
        idle = self.cycle is None or self.cycle.response_complete
        if (self._in_head or idle) and self._head_timer is None and self.timeout_keep_alive_task is None:
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._stop_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Called by httptools."""
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Called by httptools."""
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._end)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end(self) -> None:
        self._head_timer = None
        self.transport.close()


class _JoinedWrites:
    """A transport whose writes within one turn of the event loop become one."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []
        self.is_closing = transport.is_closing  # asked for with every answer, which __getattr__ would slow

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._parts and not self.is_closing():
            self._transport.write(b"".join(self._parts))
        self._parts.clear()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
