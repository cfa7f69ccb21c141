"""Ends requests that take too long, or whose client has left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from lmkan_deploy.serving.errors import DeadlineError

_LOOK_SECONDS = 0.02

_PRECISE_SECONDS = 0.5
"""Shorter deadlines get a timer of their own: a look at all requests would be too coarse for them."""

Gone = Callable[[], Awaitable[None]]
"""Returns when the client has left."""


class Patience:
    """Watches the requests of one process.

    A timer and a task for each request would cost as much as all the rest of it, so one task looks after all of
    them every few milliseconds; most requests are answered before it sees them.
    """

    def __init__(self) -> None:
        # Future -> when it is too late, the deadline it was given, and what tells that the client has left.
        self._waiting: dict[asyncio.Future[Any], tuple[float, float, Gone | None]] = {}
        self._watchers: dict[asyncio.Future[Any], asyncio.Task[None]] = {}

    async def result(
        self, future: asyncio.Future[Any], timeout: float | None, gone: Gone | None = None
    ) -> Any:
        """Awaits a future.

        Args:
            future: Is cancelled when the client has left.
            timeout: Seconds after which it fails with DeadlineError; None for never.
            gone: See `Gone`; None where cancellation comes by itself.

        Raises:
            DeadlineError: It took too long.
            asyncio.CancelledError: The client has left.
        """
        loop = asyncio.get_running_loop()
        timer = None
        due = float("inf")
        if timeout is not None and timeout < _PRECISE_SECONDS:
            timer = loop.call_later(max(timeout, 0.0), _expire, future, timeout)
        elif timeout is not None:
            due = loop.time() + timeout
        self._waiting[future] = (due, timeout or 0.0, gone)
        try:
            return await future
        finally:
            del self._waiting[future]
            if timer is not None:
                timer.cancel()
            watcher = self._watchers.pop(future, None)
            if watcher is not None:
                watcher.cancel()

    async def watch(self) -> None:
        """Looks after the requests, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            now = loop.time()
            for future, (due, timeout, gone) in list(self._waiting.items()):
                if now >= due:
                    _expire(future, timeout)
                elif gone is not None and future not in self._watchers:
                    self._watchers[future] = loop.create_task(_cancel_when(gone, future))


async def _cancel_when(gone: Gone, future: asyncio.Future[Any]) -> None:
    await gone()
    future.cancel()


def _expire(future: asyncio.Future[Any], timeout: float) -> None:
    if not future.done():
        future.set_exception(
            DeadlineError(f"expected an answer within {timeout:g} s, which have passed; try again later")
        )
