"""How long models take, side by side."""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmkan_deploy.errors import InputError
from lmkan_deploy.progress import Progress, Step, no_progress
from lmkan_deploy.runtime.axis_limits import AxisLimits
from lmkan_deploy.runtime.onnxruntime import OnnxRuntimeRunner
from lmkan_deploy.runtime.runner import Runner
from lmkan_deploy.runtime.tensors import TensorSpec, random_rows

_MOST_INPUTS = 16
"""Different inputs that calls go through in turn, so that a call does not find its own corners in a cache."""

_INPUT_MEMORY = 64 << 20
"""Bytes of all of them, in the larger batches."""

_SHORTEST_TURN = 0.005
"""Seconds; what a round needs to be compared with that of another model."""

_FEWEST_ROUNDS = 5

_PAUSE = 0.002
"""Seconds between turns: a session's threads go on spinning for a while, and would take the next one's time."""

Feeds = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Latency:
    """Times of one model's calls at one batch size, in seconds.

    Attributes:
        model: Its file.
        runtime: What ran it.
        asked: The batch size that was asked for; None where inputs were given.
        batch: Rows of a call: another number where the model's batch is fixed, or has limits.
        calls: How many were timed.
        least: The fastest.
        median: Half of them took less.
        p90: Nine in ten took less.
        p99: 99 in 100 took less.
        rows_per_second: Rows over the mean time.
        ratio: Time of a call relative to the first model's at this batch size, in rounds that took turns: median
            and both quartiles. None for the first.
    """

    model: str
    runtime: str
    asked: int | None
    batch: int
    calls: int
    least: float
    median: float
    p90: float
    p99: float
    rows_per_second: float
    ratio: tuple[float, float, float] | None

    def to_json(self) -> dict[str, Any]:
        """The same as plain types."""
        return asdict(self)


@dataclass(frozen=True)
class Contender:
    """A model that is timed.

    Attributes:
        model: Its file, for reports.
        runner: Runs it.
        given: Inputs; None for random ones.
        limits: Which sizes its free axes may have; see `noted_limits`.
    """

    model: str
    runner: Runner
    given: Feeds | None
    limits: Mapping[str, AxisLimits]


def measure(
    contenders: Sequence[Contender],
    batch_sizes: Sequence[int | None],
    *,
    seconds: float,
    seed: int,
    progress: Progress = no_progress,
) -> list[Latency]:
    """Times every model at every batch size; models take turns, so that a slow moment of the machine hits all.

    Args:
        contenders: The first is what the others are compared with.
        batch_sizes: Sizes of the leading free axes of random inputs; None for given inputs.
        seconds: For each model at each batch size, in calls of at least five rounds.
        seed: Of random inputs.
        progress: Called at each step.

    Raises:
        InputError: Inputs that don't fit a model, or with which it fails.
    """
    if not 0 < seconds < math.inf:
        raise InputError(f"expected a time above 0 seconds, found {seconds}")
    if not contenders:
        raise InputError("expected at least one model to time, found none")
    sizes = list(dict.fromkeys(batch_sizes))
    for size in sizes:
        if size is not None and size < 1:
            raise InputError(f"expected batches of at least 1 row, found {size}")
    by_size = [[_Rounds(contender, size, seed) for contender in contenders] for size in sizes]
    # All of them first: a model that fails would otherwise take with it what was measured until then.
    for done, together in enumerate(by_size):
        progress(Step("trying all models", done, len(sizes)))
        for rounds in together:
            rounds.try_once()
    result = []
    for done, (size, together) in enumerate(zip(sizes, by_size, strict=True)):
        progress(
            Step("timing given inputs" if size is None else f"timing batches of {size}", done, len(sizes))
        )
        _take_turns(together, seconds)
        result += [rounds.latency(together[0]) for rounds in together]
    return result


class _Rounds:
    """One model at one batch size."""

    def __init__(self, contender: Contender, size: int | None, seed: int) -> None:
        self._contender = contender
        self._asked = size
        self._seed = seed
        self._calls: list[Callable[[], Any]] = []
        self._batch = 0
        self._next = 0
        self._per_turn = 1
        self._seconds: list[NDArray[np.float64]] = []

    def try_once(self) -> None:
        """Runs the model once, since the first call of a shape may build or allocate.

        Raises:
            InputError: It does not take the inputs.
        """
        feeds = self._feeds(np.random.default_rng(self._seed))
        try:
            self._contender.runner.run(feeds)
        except InputError as error:
            hint = "" if self._asked is None else "; pass --inputs where random numbers don't do"
            raise InputError(f"{self._contender.model}, {self._described()}: {error}{hint}") from error
        self._batch = _rows(self._contender.runner.inputs, feeds)

    def warm_up(self, seconds: float) -> None:
        """Runs the model for a while, on inputs that the timed calls will have."""
        runner, rng = self._contender.runner, np.random.default_rng(self._seed)
        feeds = self._feeds(rng)
        self._calls.append(_call(runner, feeds))
        started = time.perf_counter()
        self._calls[0]()
        once = time.perf_counter() - started
        # A slow model's calls are fewer than its inputs would be.
        most = min(_MOST_INPUTS, _INPUT_MEMORY // max(1, sum(array.nbytes for array in feeds.values())))
        if self._asked is not None:
            for _ in range(min(most, int(seconds / max(once, 1e-9))) - 1):
                self._calls.append(_call(runner, self._feeds(rng)))
        started, calls = time.perf_counter(), 0
        while once * (calls + 1) < seconds and time.perf_counter() - started < seconds:
            self._calls[calls % len(self._calls)]()
            calls += 1
        each = (time.perf_counter() - started) / calls if calls > 0 else once
        self._per_turn = max(1, round(_SHORTEST_TURN / each))

    def take_turn(self) -> None:
        """Times some calls, one by one."""
        clock = time.perf_counter
        times = np.empty(self._per_turn)
        for index in range(self._per_turn):
            call = self._calls[self._next]
            self._next = (self._next + 1) % len(self._calls)
            before = clock()
            call()
            times[index] = clock() - before
        self._seconds.append(times)

    def spent(self) -> float:
        """Seconds of all timed calls."""
        return float(sum(times.sum() for times in self._seconds))

    def rounds(self) -> int:
        """How many turns it had."""
        return len(self._seconds)

    def latency(self, baseline: _Rounds) -> Latency:
        """What came out; `baseline` took turns with this one."""
        times = np.concatenate(self._seconds)
        ratio = None
        if baseline is not self:
            ratios = [
                float(np.median(own) / np.median(other))
                for own, other in zip(self._seconds, baseline._seconds, strict=True)
            ]
            low, middle, high = np.percentile(ratios, [25, 50, 75])
            ratio = (float(middle), float(low), float(high))
        median, p90, p99 = np.percentile(times, [50, 90, 99])
        return Latency(
            model=self._contender.model,
            runtime=self._contender.runner.name,
            asked=self._asked,
            batch=self._batch,
            calls=len(times),
            least=float(times.min()),
            median=float(median),
            p90=float(p90),
            p99=float(p99),
            rows_per_second=float(self._batch / times.mean()),
            ratio=ratio,
        )

    def _feeds(self, rng: np.random.Generator) -> Feeds:
        if self._contender.given is not None:
            return self._contender.given
        return random_rows(self._contender.runner.inputs, self._asked or 1, rng, self._contender.limits)

    def _described(self) -> str:
        return "given inputs" if self._asked is None else f"random batch of {self._asked}"


def _take_turns(together: Sequence[_Rounds], seconds: float) -> None:
    wanted = seconds * len(together)
    collects = gc.isenabled()
    gc.disable()
    try:
        for rounds in together:
            rounds.warm_up(seconds / 10)
        while together[0].rounds() < _FEWEST_ROUNDS or sum(r.spent() for r in together) < wanted:
            forwards = together[0].rounds() % 2 == 0
            for rounds in together if forwards else reversed(together):
                if len(together) > 1:
                    time.sleep(_PAUSE)
                rounds.take_turn()
    finally:
        if collects:
            gc.enable()


def _call(runner: Runner, feeds: Feeds) -> Callable[[], Any]:
    """A call as a user's own program makes it, without checks of the inputs."""
    if isinstance(runner, OnnxRuntimeRunner):
        return runner.bind(feeds)
    return functools.partial(runner.run, feeds)


def _rows(specs: Sequence[TensorSpec], feeds: Feeds) -> int:
    """Size of the first input's first axis; 1 where there is none."""
    shape = feeds[specs[0].name].shape if specs else ()
    return int(shape[0]) if shape else 1
