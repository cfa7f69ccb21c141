"""How long models take, side by side."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmkan_deploy.errors import InputError
from lmkan_deploy.runtime.axis_limits import AnySize, AxisLimits
from lmkan_deploy.runtime.onnxruntime import OnnxRuntimeRunner
from lmkan_deploy.runtime.runner import Runner
from lmkan_deploy.runtime.tensors import TensorSpec, random_inputs

_MOST_INPUTS = 16
"""Different inputs that calls go through in turn, so that a call does not find its own corners in a cache."""

_INPUT_MEMORY = 64 << 20
"""Bytes of all of them, in the larger batches."""

_SHORTEST_TURN = 0.005
"""Seconds; what a round needs to be compared with that of another model."""

_FEWEST_ROUNDS = 5

Feeds = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Latency:
    """Times of one model's calls at one batch size, in seconds.

    Attributes:
        model: Its file.
        runtime: What ran it.
        batch: Rows of a call.
        calls: How many were timed.
        least: The fastest.
        median: Half of them took less.
        p90: Nine in ten took less.
        p99: 99 in 100 took less.
        rows_per_second: Rows over the mean time.
        ratio: Time relative to the first model's at this batch size, in rounds that took turns: median and both
            quartiles. None for the first.
    """

    model: str
    runtime: str
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
    batch_sizes: Sequence[int],
    *,
    seconds: float,
    seed: int,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Latency]:
    """Times every model at every batch size; models take turns, so that a slow moment of the machine hits all.

    Args:
        contenders: The first is what the others are compared with.
        batch_sizes: Sizes of the free axes of random inputs. Given inputs have the one that they have.
        seconds: For each model at each batch size, after as much warm-up as a tenth of it.
        seed: Of random inputs.
        progress: Called with a line at each step.

    Raises:
        InputError: Inputs that don't fit a model.
    """
    if not seconds > 0:
        raise InputError(f"expected a time above 0 seconds, found {seconds}")
    rounds = [_Round(c, size, seed) for size in batch_sizes for c in contenders]
    result = []
    for start in range(0, len(rounds), len(contenders)):
        together = rounds[start : start + len(contenders)]
        progress(f"timing batches of {together[0].batch}")
        _take_turns(together, seconds)
        result += [taken.latency(together[0]) for taken in together]
    return result


class _Round:
    """One model at one batch size."""

    def __init__(self, contender: Contender, size: int, seed: int) -> None:
        self._contender = contender
        rng = np.random.default_rng(seed)
        specs = contender.runner.inputs
        if contender.given is not None:
            feeds = [dict(contender.given)]
        else:
            feeds = [random_inputs(specs, _sizes(specs, size, contender.limits), rng)]
            bytes_of_one = max(1, sum(array.nbytes for array in feeds[0].values()))
            more = min(_MOST_INPUTS, _INPUT_MEMORY // bytes_of_one) - 1
            feeds += [random_inputs(specs, _sizes(specs, size, contender.limits), rng) for _ in range(more)]
        self.batch = _rows(specs, feeds[0])
        self._calls = [_call(contender.runner, each) for each in feeds]
        self._next = 0
        self._per_turn = 1
        self._seconds: list[NDArray[np.float64]] = []

    def warm_up(self, seconds: float) -> None:
        """Runs each input once, and on for a while; the first call of a shape may build or allocate."""
        started = time.perf_counter()
        for call in self._calls:
            call()
        calls = 0
        begun = time.perf_counter()
        while calls == 0 or time.perf_counter() - started < seconds:
            self._calls[calls % len(self._calls)]()
            calls += 1
        self._per_turn = max(1, round(_SHORTEST_TURN * calls / (time.perf_counter() - begun)))

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

    def latency(self, baseline: _Round) -> Latency:
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
            batch=self.batch,
            calls=len(times),
            least=float(times.min()),
            median=float(median),
            p90=float(p90),
            p99=float(p99),
            rows_per_second=float(self.batch / times.mean()),
            ratio=ratio,
        )


def _take_turns(together: Sequence[_Round], seconds: float) -> None:
    collects = gc.isenabled()
    gc.disable()
    try:
        for taken in together:
            taken.warm_up(seconds / 10)
        while together[0].rounds() < _FEWEST_ROUNDS or sum(t.spent() for t in together) < seconds * len(
            together
        ):
            forwards = together[0].rounds() % 2 == 0
            for taken in together if forwards else reversed(together):
                taken.take_turn()
    finally:
        if collects:
            gc.enable()


def _call(runner: Runner, feeds: Feeds) -> Callable[[], Any]:
    """A call as a user's own program makes it, without checks of the inputs."""
    if isinstance(runner, OnnxRuntimeRunner):
        return runner.bind(feeds)
    return functools.partial(runner.run, feeds)


def _sizes(specs: Sequence[TensorSpec], size: int, limits: Mapping[str, AxisLimits]) -> dict[str | None, int]:
    sizes: dict[str | None, int] = {None: size}
    for spec in specs:
        for name in (axis for axis in spec.shape if isinstance(axis, str)):
            sizes[name] = limits.get(name, AnySize).nearest(size)
    return sizes


def _rows(specs: Sequence[TensorSpec], feeds: Feeds) -> int:
    """Size of the first free axis; 1 where there is none."""
    for spec in specs:
        for axis, size in enumerate(spec.shape):
            if not isinstance(size, int):
                return int(feeds[spec.name].shape[axis])
    return 1
