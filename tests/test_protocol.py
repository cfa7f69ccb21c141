"""Connections whose requests don't begin in time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn

from lmkan_deploy.serving import protocol

LIMIT = 0.4
HEAD = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n"


async def _hello(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-length", b"5")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"hello"})


@contextlib.asynccontextmanager
async def _connection() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    config = uvicorn.Config(_hello, port=0, http=protocol.Protocol, lifespan="off", log_level="warning")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()
    reader, writer = await asyncio.open_connection(host, port)
    yield reader, writer
    writer.close()
    server.should_exit = True
    await task


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", LIMIT)


@pytest.mark.parametrize("dripping", [False, True])
def test_a_head_must_arrive_in_time(dripping: bool) -> None:
    async def test() -> None:
        async with _connection() as (reader, writer):
            started = time.monotonic()
            ended = asyncio.create_task(reader.read())
            for i in range(len(HEAD) - 1 if dripping else 0):
                if ended.done():
                    break
                writer.write(HEAD[i : i + 1])
                await asyncio.sleep(LIMIT / 10)
            assert await asyncio.wait_for(ended, 10) == b""
            assert time.monotonic() - started >= 0.9 * LIMIT

    asyncio.run(test())


@pytest.mark.parametrize("first", [b"", HEAD], ids=["at first", "after an answer"])
def test_empty_lines_begin_no_request(first: bytes) -> None:
    async def test() -> None:
        async with _connection() as (reader, writer):
            writer.write(first)
            if first:
                await asyncio.wait_for(reader.readuntil(b"hello"), 10)
            writer.write(b"\r\n")
            assert await asyncio.wait_for(reader.read(), 10) == b""

    asyncio.run(test())


def test_a_body_that_nobody_waits_for_keeps_no_connection() -> None:
    async def test() -> None:
        async with _connection() as (reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n\r\n")
            await asyncio.wait_for(reader.readuntil(b"hello"), 10)
            writer.write(b"x")
            assert await asyncio.wait_for(reader.read(), 10) == b""

    asyncio.run(test())


def test_each_head_has_its_own_time() -> None:
    async def test() -> None:
        async with _connection() as (reader, writer):
            writer.write(HEAD[:10])
            for _ in range(12):  # every piece ends a head and begins the next
                await asyncio.sleep(LIMIT / 4)
                writer.write(HEAD[10:] + HEAD[:10])
                await asyncio.wait_for(reader.readuntil(b"hello"), 10)

    asyncio.run(test())


def test_it_does_not_limit_pauses_between_requests_nor_heads_in_pieces() -> None:
    async def test() -> None:
        async with _connection() as (reader, writer):
            for _ in range(2):
                writer.write(HEAD[:10])
                await asyncio.sleep(LIMIT / 4)
                writer.write(HEAD[10:])
                assert await asyncio.wait_for(reader.readuntil(b"hello"), 10)
                await asyncio.sleep(2 * LIMIT)

    asyncio.run(test())
