"""Native work on threads: it is over when the call is over, whatever happens."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lmkan_deploy.runtime import tasks
from lmkan_deploy.runtime.tasks import run_tasks


class Counter:
    """Calls that take a while and are counted."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.begun = self.ended = 0
        self._lock = threading.Lock()
        self._seconds = seconds

    def __call__(self) -> None:
        with self._lock:
            self.begun += 1
        try:
            time.sleep(self._seconds)
        finally:
            with self._lock:
                self.ended += 1


def failing() -> None:
    raise OSError("failed")


@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_each_call_is_made_once(count: int) -> None:
    counter = Counter()
    run_tasks([counter] * count)
    assert (counter.begun, counter.ended) == (count, count)


def test_calls_are_made_at_the_same_time() -> None:
    together = threading.Barrier(2)
    run_tasks([lambda: together.wait(20), lambda: together.wait(20)])  # type: ignore[list-item, return-value]


@pytest.mark.parametrize("place", [0, 1, 40])
def test_an_error_comes_when_nothing_runs_any_more(place: int) -> None:
    counter = Counter(0.01)
    calls = [counter] * 41
    calls[place] = failing  # type: ignore[call-overload]
    with pytest.raises(OSError, match="failed"):
        run_tasks(calls)
    assert counter.begun == counter.ended
    begun = counter.begun
    time.sleep(0.1)
    assert counter.begun == begun


def test_without_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Exhausted:
        def submit(self, call: object) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(tasks, "_thread_pool", Exhausted)
    counter = Counter()
    run_tasks([counter] * 5)
    assert counter.ended == 5


LOOKUPS = """
import os, signal, threading, time
import torch
from lmkan_deploy.nn import LMKAN2DLayer
torch.set_num_threads(2)
layer = LMKAN2DLayer(8, 64, 64).requires_grad_(False)
x = torch.randn(4096, 64)
"""


def run(program: str) -> str:
    command = [sys.executable, "-c", LOOKUPS + program]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("delay", [0.001, 0.02, 0.1])
def test_an_interrupt_comes_when_nothing_runs_any_more(delay: float) -> None:
    program = f"""
from lmkan_deploy.runtime.tasks import run_tasks
from test_tasks import Counter
counter = Counter(0.15)
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    threading.Timer({delay}, os.kill, (os.getpid(), signal.SIGINT)).start()
    run_tasks([counter] * 20)
    time.sleep(20)
except KeyboardInterrupt:
    print("interrupted", counter.begun - counter.ended)
"""
    assert run(program) == "interrupted 0\n"


def test_an_interrupt_while_threads_start() -> None:
    """The process ends, although the start of a thread was cut short after it had begun to run."""
    program = """
from lmkan_deploy.runtime.tasks import run_tasks
start = threading.Thread.start
def interrupted(thread):
    start(thread)
    if threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt
threading.Thread.start = interrupted
try:
    run_tasks([lambda: None] * 3)
except KeyboardInterrupt:
    print("interrupted")
"""
    assert run(program) == "interrupted\n"


def test_lookups_in_a_forked_child() -> None:
    program = """
want = layer(x)
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    os._exit(0 if torch.equal(layer(x), want) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert run(program) == "0\n"


def test_lookups_in_a_thread_that_outlives_the_main_one() -> None:
    program = """
def work():
    threading.main_thread().join()
    print(layer(x).shape)
threading.Thread(target=work).start()
"""
    assert run(program) == "torch.Size([4096, 64])\n"
