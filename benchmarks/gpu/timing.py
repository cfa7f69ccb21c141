"""GPU time of launches, without the host's: they are captured, or wait in the queue, before the GPU starts.

Both ways have `enqueue(turn)`, `count` (launches that it enqueues), `turns` and `ys` (what the last launch of a
turn writes).
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from typing import Protocol

import torch

WARM_UPS, RUNS = 10, 30
WARM_UP_SECONDS = 0.1  # an idle GPU's clocks are low
TOGETHER_MS = 2.0  # of the launches that are timed together, about
MOST_TOGETHER = 200  # kernels wait in the queue, which has room for a thousand
FEWEST_CYCLES, MOST_CYCLES = 200_000, 50_000_000  # 0.1 and 25 ms

Run = Callable[[int], torch.Tensor | None]
Flush = Callable[[], object]


class Launches(Protocol):
    """Launches that are timed together."""

    count: int
    turns: int
    ys: list[torch.Tensor | None]
    cycles: int  # that the GPU waits before it begins

    def enqueue(self, turn: int) -> None:
        """Enqueues launches with inputs `turn`, `turn` + 1 and so on."""


class Graphs:
    """CUDA graphs of launches, one for each input, or one that has all inputs."""

    name = "CUDA graphs"

    def __init__(self, run: Run, num_inputs: int, count: int, flush: Flush | None = None) -> None:
        self.count, self.turns = count, num_inputs if count < num_inputs else 1
        self.ys, self._graphs, self.cycles = [], [], FEWEST_CYCLES
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        gc.collect()  # what it found during a capture would spoil that
        pool = torch.cuda.graph_pool_handle()
        with torch.cuda.stream(stream):
            for i in range(num_inputs):
                run(i)  # loads kernels, which a capture may not
            stream.synchronize()
            for turn in range(self.turns):
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=pool)
                try:
                    y = _launch_all(run, turn, num_inputs, count, flush)
                except BaseException:
                    with contextlib.suppress(Exception):
                        graph.capture_end()
                    raise
                graph.capture_end()
                self.ys.append(y)
                self._graphs.append(graph)
        torch.cuda.synchronize()

    def enqueue(self, turn: int) -> None:
        """See `Launches`."""
        self._graphs[turn % self.turns].replay()


class Queue:
    """Launches one after the other, for what can't be captured."""

    name = "launches queued behind a wait"

    def __init__(self, run: Run, num_inputs: int, count: int, flush: Flush | None = None) -> None:
        self.count, self.turns = count, num_inputs
        self._run, self._num_inputs, self._flush = run, num_inputs, flush
        self.ys, self.cycles = [run(turn) for turn in range(num_inputs)], FEWEST_CYCLES
        torch.cuda.synchronize()

    def enqueue(self, turn: int) -> None:
        """See `Launches`."""
        turn %= self.turns
        self.ys[turn] = _launch_all(self._run, turn, self._num_inputs, self.count, self._flush)


def _launch_all(
    run: Run, first: int, num_inputs: int, count: int, flush: Flush | None
) -> torch.Tensor | None:
    for k in range(count):
        if flush is not None:
            flush()
        y = run((first + k) % num_inputs)
    return y


def sample_ms(launches: Launches, turn: int) -> float:
    """GPU time of `enqueue`. The GPU waits until all is in its queue."""
    while True:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(launches.cycles)
        start.record()
        launches.enqueue(turn)
        stop.record()
        is_late = start.query()  # the GPU may have waited for the host
        stop.synchronize()
        if not is_late or launches.cycles >= MOST_CYCLES:
            return start.elapsed_time(stop)
        launches.cycles *= 4


def choose_count(launches: Launches, num_inputs: int) -> int:
    """How many launches to time together, from some that are timed alone."""
    alone = min(sample_ms(launches, turn) for turn in range(3)) / launches.count
    count = int(TOGETHER_MS / max(alone, 1e-3))
    return min(count, MOST_TOGETHER) // num_inputs * num_inputs or 1


def measure_us(launches: Launches, flushes: Launches | None = None) -> list[float]:
    """Microseconds of each launch; of `flushes`, which take turns with them, less."""
    parts = [launches] if flushes is None else [launches, flushes]
    began, warm_ups = time.perf_counter(), 0
    while warm_ups < WARM_UPS or time.perf_counter() - began < WARM_UP_SECONDS:
        for part in parts:
            part.enqueue(warm_ups)
        torch.cuda.synchronize()
        warm_ups += 1
    times = []
    for turn in range(RUNS):
        milliseconds = [sample_ms(part, turn) for part in parts]
        times.append(1e3 * (milliseconds[0] - sum(milliseconds[1:])) / launches.count)
    return times


def flush_l2() -> Flush:
    """A call that writes twice what L2 holds."""
    size = 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    memory = torch.empty(size // 4, device="cuda")
    return lambda: memory.fill_(1.0)
