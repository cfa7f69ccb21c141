"""Dynamic batching: requests of one model joined along the batch axis.

Everything here runs in the event loop's thread, except the model itself, which runs in a thread of its own where
a batch takes long. Nothing needs a lock.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lmkan_deploy.runtime.runner import Runner
from lmkan_deploy.runtime.tensors import Arrays, check_inputs, numpy_dtype, rows_are_free
from lmkan_deploy.serving.errors import OverloadedError, UnavailableError

INLINE_SECONDS = 1e-3
"""Batches that take less than this run in the event loop, without a thread in between."""


@dataclass(frozen=True)
class BatchingOptions:
    """How requests are joined and how many may wait.

    Attributes:
        max_batch: Most rows of one run; larger requests are split.
        max_delay: Longest time in seconds that a request waits for others while the model is idle. At 0 only
            those are joined that arrive together, or while the model is busy.
        max_queue: Most rows that wait; a request beyond it is refused at once.
    """

    max_batch: int = 1024
    max_delay: float = 0.0
    max_queue: int = 16384


class BatchObserver(Protocol):
    """Is told what a batcher does."""

    def queued(self, rows: int) -> None:
        """How many rows wait now."""
        ...

    def ran(self, rows: int, requests: int, seconds: float) -> None:
        """A run of the model ended."""
        ...


@dataclass(eq=False, slots=True)
class _Request:
    """A caller's inputs, in one or more parts. `results` has a place for each where there are more."""

    future: asyncio.Future[Arrays]
    parts: list[_Part]
    results: list[Arrays]
    missing: int = 0


@dataclass(eq=False, slots=True)
class _Part:
    """At most `max_batch` rows of a request. It waits until a run takes it or its request leaves."""

    group: _Group
    request: _Request
    index: int
    feeds: Mapping[str, NDArray[Any]]
    rows: int
    since: float
    waits: bool = False


@dataclass(eq=False, slots=True)
class _Group:
    """Parts that may be joined, since all their sizes but the batch are equal; `rows` are those that wait."""

    parts: deque[_Part] = field(default_factory=deque)
    rows: int = 0


class Batcher:
    """Runs one model for many callers.

    Args:
        runner: The model.
        options: See `BatchingOptions`.
        observer: Is told of every run.
        on_failure: Called when the model fails on a request, and not because of others that joined it.
        may_join: Whether rows are known not to depend on each other, as far as shapes don't tell.

    A model whose tensors do not all lead with the same free axis runs each request alone; it then counts as one
    row.
    """

    def __init__(
        self,
        runner: Runner,
        options: BatchingOptions,
        observer: BatchObserver,
        on_failure: Callable[[], None] = lambda: None,
        *,
        may_join: bool = True,
    ) -> None:
        self._runner, self._options, self._observer, self._on_failure = runner, options, observer, on_failure
        self.joins = may_join and rows_are_free(runner.inputs, runner.outputs)
        # Name, type and sizes behind the batch where there is one input of fixed size: quick to check.
        self._only_input: tuple[str, np.dtype[Any], tuple[int, ...]] | None = None
        if self.joins and len(runner.inputs) == 1:
            spec = runner.inputs[0]
            tail = tuple(size for size in spec.shape[1:] if isinstance(size, int))
            if len(tail) + 1 == len(spec.shape):
                self._only_input = (spec.name, numpy_dtype(spec.dtype), tail)
        self._groups: dict[Hashable, _Group] = {}
        self._queued_rows = 0
        self._queued_parts = 0
        self._running = False
        self._starts_soon = False
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="lmkan-run")
        # Size of a batch in bytes, as a power of two -> seconds that such a run took lately.
        self._seconds: dict[int, float] = {}

    @property
    def queued_rows(self) -> int:
        """Rows that wait for a run."""
        return self._queued_rows

    def submit(self, feeds: Mapping[str, NDArray[Any]]) -> asyncio.Future[Arrays]:
        """Puts a request into the queue.

        Args:
            feeds: Every input by name.

        Returns:
            Every output by name, later. Whoever cancels it, or gives it an exception, gives up the request's
            place.

        Raises:
            InputError: The arrays don't fit the model's inputs.
            OverloadedError: The queue is full.
            UnavailableError: The model was unloaded.
        """
        if self._closed:
            raise UnavailableError("the model was unloaded; load it again, or ask another server")
        loop = asyncio.get_running_loop()
        rows, key = self._rows_and_key(feeds)
        if self._queued_rows + rows > self._options.max_queue:
            raise OverloadedError(
                f"expected at most {self._options.max_queue} rows in the queue, found {self._queued_rows} and "
                f"{rows} more; try again later, or send fewer rows"
            )
        request = _Request(loop.create_future(), [], [])
        request.future.add_done_callback(lambda _: self._leave(request))
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group()
        now = loop.time()
        if rows <= self._options.max_batch or not self.joins:
            self._enter(_Part(group, request, 0, feeds, rows, now))
        else:
            slices = _slices(rows, self._options.max_batch)
            request.results, request.missing = [{}] * len(slices), len(slices)
            for index, part_slice in enumerate(slices):
                part_feeds = {name: array[part_slice] for name, array in feeds.items()}
                part_rows = part_slice.stop - part_slice.start
                self._enter(_Part(group, request, index, part_feeds, part_rows, now))
        self._idle.clear()
        self._plan(loop)
        return request.future

    async def close(self) -> None:
        """Takes no more requests, and returns when those in the queue are done."""
        self._closed = True
        await self._idle.wait()
        self._executor.shutdown(wait=False)

    def _rows_and_key(self, feeds: Mapping[str, NDArray[Any]]) -> tuple[int, Hashable]:
        """Rows of a request, and what those have in common that may be joined with it. Checks the inputs."""
        if self._only_input is not None and len(feeds) == 1:
            name, dtype, tail = self._only_input
            array = feeds.get(name)
            if (
                array is not None
                and array.dtype == dtype
                and array.shape[1:] == tail
                and array.shape[:1] > (0,)
            ):
                return array.shape[0], tail
        check_inputs(self._runner.inputs, feeds, getattr(self._runner, "limits", None))
        if not self.joins:
            return 1, object()
        shapes = [feeds[spec.name].shape for spec in self._runner.inputs]
        rows = shapes[0][0]
        # An empty batch has nothing to join: kernels of some operators take no empty part of one.
        return rows, tuple(shape[1:] for shape in shapes) if rows else object()

    def _enter(self, part: _Part) -> None:
        part.waits = True
        part.request.parts.append(part)
        part.group.parts.append(part)
        part.group.rows += part.rows
        self._queued_rows += part.rows
        self._queued_parts += 1

    def _withdraw(self, part: _Part) -> None:
        """Its place is free, whoever removes it from the queue."""
        part.waits = False
        part.group.rows -= part.rows
        self._queued_rows -= part.rows
        self._queued_parts -= 1

    def _leave(self, request: _Request) -> None:
        """A request is answered, cancelled or too late: what still waits of it gives up its place."""
        # They refer to the request: a cycle would be garbage that has to be searched for.
        parts, request.parts = request.parts, []
        waited = False
        for part in parts:
            if part.waits:
                self._withdraw(part)
                waited = True
        if waited:
            self._observer.queued(self._queued_rows)
            self._rest()

    def _rest(self) -> None:
        if not self._running and self._queued_parts == 0:
            self._groups.clear()
            self._idle.set()

    def _plan(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts a run now, or when the oldest request has waited long enough."""
        if self._running or self._starts_soon or not self._groups:
            return
        delay = self._options.max_delay
        if delay and not any(group.rows >= self._options.max_batch for group in self._groups.values()):
            due = min(group.parts[0].since for group in self._groups.values()) + delay
            if due > loop.time():
                if self._timer is None:
                    self._timer = loop.call_at(due, self._start)
                return
        # Not at once: whatever has arrived by now is read first, and joins.
        self._starts_soon = True
        loop.call_soon(self._start)

    def _start(self) -> None:
        self._starts_soon = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running:
            return
        loop = asyncio.get_running_loop()
        batch = self._take()
        if not batch:
            self._rest()
            return
        self._running = True
        feeds = [part.feeds for part in batch]
        size = sum(array.nbytes for arrays in feeds for array in arrays.values()).bit_length()
        if self._seconds.get(size, 1.0) < INLINE_SECONDS:
            self._finish(batch, *_timed(self._runner, feeds), size)
        else:
            loop.run_in_executor(self._executor, _timed, self._runner, feeds).add_done_callback(
                lambda done: self._finish(batch, *done.result(), size)
            )

    def _take(self) -> list[_Part]:
        """The parts of the next run: from the group whose head waits longest."""
        for key in [key for key, group in self._groups.items() if not _drop_left(group)]:
            del self._groups[key]
        if not self._groups:
            return []
        key, group = min(self._groups.items(), key=lambda item: item[1].parts[0].since)
        batch: list[_Part] = []
        rows = 0
        parts, most = group.parts, self._options.max_batch
        while parts:
            part = parts[0]
            if part.waits:
                if batch and rows + part.rows > most:
                    break
                self._withdraw(part)
                batch.append(part)
                rows += part.rows
            parts.popleft()
        if not parts:
            del self._groups[key]
        self._observer.queued(self._queued_rows)
        return batch

    def _finish(self, batch: list[_Part], outcome: Arrays | Exception, seconds: float, size: int) -> None:
        self._running = False
        try:
            if isinstance(outcome, Exception) and len(batch) > 1:
                # One request's values may be at fault: the others shall not suffer from it.
                for part in batch:
                    if not part.request.future.done():
                        part.group = self._groups[object()] = _Group()
                        part.request.parts.remove(part)
                        self._enter(part)
                return
            self._seconds[size] = 0.5 * (seconds + self._seconds.get(size, seconds))
            rows = sum(part.rows for part in batch)
            self._observer.ran(rows, len(batch), seconds)
            if isinstance(outcome, Exception):
                _fail(batch, outcome)
                self._on_failure()
            else:
                self._answer(batch, outcome)
        except Exception as error:  # there is no memory for the answers
            _fail(batch, error)
        finally:
            self._plan(asyncio.get_running_loop())
            self._rest()

    def _answer(self, batch: list[_Part], outputs: Arrays) -> None:
        first = 0
        for part in batch:
            last = first + part.rows
            own = outputs if len(batch) == 1 else {name: array[first:last] for name, array in outputs.items()}
            first = last
            request = part.request
            if request.results:
                request.results[part.index] = own
                request.missing -= 1
                if request.missing:
                    continue
                own = _joined(request.results)
            if not request.future.done():
                request.future.set_result(own)


def _slices(rows: int, most: int) -> list[slice]:
    """Nearly equal slices of at most `most` rows."""
    count = max(1, -(-rows // most))
    return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def _joined(parts: list[Any]) -> Arrays:
    if len(parts) == 1:
        return dict(parts[0])
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _drop_left(group: _Group) -> bool:
    """Removes parts whose request has left from the head; whether there are others."""
    while group.parts and not group.parts[0].waits:
        group.parts.popleft()
    return bool(group.parts)


def _timed(runner: Runner, parts: list[Mapping[str, NDArray[Any]]]) -> tuple[Arrays | Exception, float]:
    """Joins the parts and runs the model: its outputs or its error, and the seconds that it took."""
    started = time.perf_counter()
    try:
        feeds = _joined(parts)
        started = time.perf_counter()
        return runner.run(feeds), time.perf_counter() - started
    except Exception as error:
        _clear_frames(error)
        return error, time.perf_counter() - started


def _clear_frames(error: BaseException | None) -> None:
    """Lets go of what the frames of tracebacks hold, such as memory of a GPU. The request has its error, which
    has its frames, which lead back to the request: all that would wait for the garbage collector.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _fail(batch: list[_Part], error: Exception) -> None:
    for part in batch:
        if not part.request.future.done():
            part.request.future.set_exception(error)
