"""Native work on several threads, which may read and write memory that the caller owns."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

Owner = Literal["caller", "pool"]


class _Task:
    """A call that either the caller or a thread of the pool makes."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._owner: dict[None, Owner] = {}
        self._is_over = threading.Event()
        self._error: BaseException | None = None

    def claim(self, owner: Owner) -> Owner:
        """Whose it is: who came first."""
        return self._owner.setdefault(None, owner)  # in one step, also for signal handlers

    def run_in_pool(self) -> None:
        if self.claim("pool") != "pool":
            return
        try:
            self._call()
        except BaseException as error:
            self._error = error
        finally:
            self._is_over.set()

    def run_or_wait(self) -> None:
        if self.claim("caller") == "caller":
            self._call()
            return
        self._is_over.wait()
        if self._error is not None:
            raise self._error

    def wait_if_running(self) -> None:
        """After this nobody runs it, now or later."""
        if self.claim("caller") == "pool":
            self._is_over.wait()


def run_tasks(calls: Sequence[Callable[[], None]]) -> None:
    """Makes all calls, on this thread and others, and returns when none of them runs any more.

    That holds for exceptions too, Ctrl-C among them: native code may still use memory that the caller would
    otherwise free.

    Raises:
        BaseException: What the first call that failed raised; some of the others may not have been made.
    """
    tasks = [_Task(call) for call in calls]
    try:
        for task in tasks[1:]:
            try:
                _thread_pool().submit(task.run_in_pool)
            except RuntimeError:  # no more threads: the interpreter ends, or the system has none
                break
        for task in tasks:
            task.run_or_wait()
    except BaseException:
        _wait_for_all(tasks)
        raise


def _wait_for_all(tasks: Sequence[_Task]) -> None:
    while True:
        try:
            for task in tasks:
                task.wait_if_running()
            return
        except KeyboardInterrupt:  # the first one is on its way already
            continue


@functools.cache
def _thread_pool() -> ThreadPoolExecutor:
    count = os.cpu_count() or 1
    pool = ThreadPoolExecutor(count, thread_name_prefix="lmkan")
    # Not in the main thread: a pool's thread whose start Ctrl-C cuts short would keep the process from ending.
    starter = threading.Thread(target=_start_threads, args=(pool, count))
    starter.start()
    starter.join()
    return pool


def _start_threads(pool: ThreadPoolExecutor, count: int) -> None:
    may_end = threading.Event()
    try:
        for _ in range(count):
            pool.submit(may_end.wait)  # which keeps a thread busy, so that the next one needs another
    except RuntimeError:  # no more threads
        pass
    finally:
        may_end.set()


# A forked child has none of its parent's threads.
os.register_at_fork(after_in_child=_thread_pool.cache_clear)
