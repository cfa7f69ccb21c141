"""The batcher alone: who joins whom, who gets what, who has to wait or leave."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkan_deploy.errors import InputError
from lmkan_deploy.runtime.tensors import TensorSpec, check_inputs
from lmkan_deploy.serving import batching
from lmkan_deploy.serving.batching import Batcher, BatchingOptions
from lmkan_deploy.serving.errors import DeadlineError, OverloadedError, UnavailableError
from lmkan_deploy.serving.patience import Patience


class Doubler:
    """Returns its input twice as large, and remembers the batches that it ran."""

    name = "doubler"

    def __init__(self, *shape: int | str | None, gate: threading.Event | None = None) -> None:
        self.inputs = [TensorSpec("x", shape or ("batch", 2), "float32")]
        self.outputs = [TensorSpec("y", shape or ("batch", 2), "float32")]
        self.batches: list[tuple[int, ...]] = []
        self._gate = gate

    def run(self, feeds: Any) -> Any:
        check_inputs(self.inputs, feeds)
        self.batches.append(feeds["x"].shape)
        if self._gate is not None:
            assert self._gate.wait(10)
        if (feeds["x"] == 666).any():
            raise InputError("the beast")
        return {"y": 2 * feeds["x"]}


class Observer:
    def __init__(self) -> None:
        self.rows: list[int] = []
        self.waiting = 0

    def queued(self, rows: int) -> None:
        self.waiting = rows

    def ran(self, rows: int, requests: int, seconds: float) -> None:
        self.rows.append(rows)


def make(runner: Doubler, **options: Any) -> tuple[Batcher, Observer]:
    observer = Observer()
    return Batcher(runner, BatchingOptions(**options), observer), observer


def rows(count: int, value: float = 1.0, width: int = 2) -> dict[str, np.ndarray]:
    return {"x": np.full((count, width), value, np.float32)}


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


def test_requests_that_arrive_together_are_joined_and_answered_apart() -> None:
    async def test() -> None:
        runner = Doubler()
        batcher, observer = make(runner)
        futures = [batcher.submit(rows(count, value)) for count, value in ((1, 1.0), (3, 2.0), (2, 3.0))]
        answers = [await future for future in futures]
        assert runner.batches == [(6, 2)]
        assert observer.rows == [6]
        for answer, (count, value) in zip(answers, ((1, 2.0), (3, 4.0), (2, 6.0)), strict=True):
            np.testing.assert_array_equal(answer["y"], np.full((count, 2), value, np.float32))

    run(test)


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=25),
    max_batch=st.integers(1, 16),
    delay=st.sampled_from([0.0, 0.002]),
)
def test_every_caller_gets_its_own_rows(counts: list[int], max_batch: int, delay: float) -> None:
    async def test() -> None:
        runner = Doubler()
        batcher, observer = make(runner, max_batch=max_batch, max_delay=delay, max_queue=10_000)
        feeds = [
            {"x": np.arange(2 * count, dtype=np.float32).reshape(count, 2) + 1000 * i}
            for i, count in enumerate(counts)
        ]
        answers = await asyncio.gather(*[batcher.submit(feed) for feed in feeds])
        for feed, answer in zip(feeds, answers, strict=True):
            np.testing.assert_array_equal(answer["y"], 2 * feed["x"])
        assert max(shape[0] for shape in runner.batches) <= max_batch
        assert sum(observer.rows) == sum(counts)
        assert batcher.queued_rows == 0
        await batcher.close()

    run(test)


def test_it_goes_on_after_no_memory_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[int] = []
    real = np.concatenate

    def concatenate(arrays: list[np.ndarray]) -> np.ndarray:
        if len(failures) < 2:
            failures.append(len(arrays))
            raise MemoryError("no memory")
        return real(arrays)

    async def test() -> None:
        batcher, _ = make(Doubler(), max_batch=4)
        monkeypatch.setattr(batching.np, "concatenate", concatenate)
        joined = await asyncio.gather(*[batcher.submit(rows(1, value)) for value in (1, 2)])
        assert [answer["y"][0, 0] for answer in joined] == [2, 4]  # one by one
        with pytest.raises(MemoryError):  # its parts are answered, and can't be joined
            await batcher.submit(rows(8))
        assert failures == [2, 2]
        assert (await batcher.submit(rows(8, 3)))["y"].shape == (8, 2)
        await asyncio.wait_for(batcher.close(), 5)

    run(test)


def test_requests_wait_for_others_until_the_delay_or_a_full_batch() -> None:
    async def test() -> None:
        runner = Doubler()
        batcher, _ = make(runner, max_batch=4, max_delay=0.2)
        started = time.monotonic()
        await batcher.submit(rows(1))
        assert time.monotonic() - started > 0.15
        assert runner.batches == [(1, 2)]
        runner = Doubler()
        batcher, _ = make(runner, max_batch=4, max_delay=3600)
        await asyncio.gather(batcher.submit(rows(1)), batcher.submit(rows(3)))
        assert runner.batches == [(4, 2)]

    run(test)


def test_other_sizes_never_mix() -> None:
    async def test() -> None:
        runner = Doubler("batch", None)
        batcher, _ = make(runner)
        futures = [batcher.submit(rows(1, i, width)) for i, width in enumerate((2, 3, 2, 3, 5))]
        answers = [await future for future in futures]
        assert sorted(runner.batches) == [(1, 5), (2, 2), (2, 3)]
        assert [answer["y"].shape for answer in answers] == [(1, 2), (1, 3), (1, 2), (1, 3), (1, 5)]
        assert [answer["y"][0, 0] for answer in answers] == [0, 2, 4, 6, 8]

    run(test)


def test_models_without_a_batch_axis_run_each_request_alone() -> None:
    async def test() -> None:
        runner = Doubler(3, 2)
        batcher, observer = make(runner)
        assert not batcher.joins
        await asyncio.gather(*[batcher.submit(rows(3)) for _ in range(4)])
        assert runner.batches == [(3, 2)] * 4
        assert observer.rows == [1] * 4

    run(test)


def test_a_request_that_fails_does_not_fail_the_others() -> None:
    async def test() -> None:
        failures: list[None] = []
        batcher = Batcher(Doubler(), BatchingOptions(), Observer(), lambda: failures.append(None))
        futures = [batcher.submit(rows(1, value)) for value in (1, 666, 3)]
        answers = await asyncio.gather(*futures, return_exceptions=True)
        assert answers[0]["y"][0, 0] == 2
        assert isinstance(answers[1], InputError)
        assert answers[2]["y"][0, 0] == 6
        assert len(failures) == 1
        await batcher.close()

    run(test)


@pytest.mark.parametrize("inline", [False, True])
def test_nothing_of_a_failed_run_waits_for_the_garbage_collector(
    inline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        pass

    class Failing(Doubler):
        def run(self, feeds: Any) -> Any:
            memory = Memory()
            held.add(memory)
            try:
                self.fail()
            except ValueError as error:
                raise InputError("no") from error

        def fail(self) -> None:
            memory = Memory()
            held.add(memory)
            raise ValueError("deeper")

    held: weakref.WeakSet[Memory] = weakref.WeakSet()
    monkeypatch.setattr(batching, "INLINE_SECONDS", 2.0 if inline else 0.0)

    async def test() -> None:
        batcher, _ = make(Failing())
        with pytest.raises(InputError, match="no"):
            await batcher.submit(rows(1))
        await batcher.close()
        assert len(held) == 0

    gc.disable()
    try:
        run(test)
    finally:
        gc.enable()


def test_inputs_are_checked_before_they_wait() -> None:
    async def test() -> None:
        batcher, _ = make(Doubler())
        for feeds in (
            {"x": np.ones((1, 3), np.float32)},
            {"x": np.ones((1, 2), np.float64)},
            {"x": np.ones(2, np.float32)},
            {"z": np.ones((1, 2), np.float32)},
            {},
        ):
            with pytest.raises(InputError, match="expected"):
                batcher.submit(feeds)
        assert batcher.queued_rows == 0

    run(test)


def test_a_full_queue_refuses_at_once_and_frees_places() -> None:
    async def test() -> None:
        gate = threading.Event()
        runner = Doubler(gate=gate)
        batcher, observer = make(runner, max_batch=4, max_queue=10)
        first = batcher.submit(rows(4))
        await asyncio.sleep(0.05)  # runs now, so it waits no more
        waiting = [batcher.submit(rows(5)), batcher.submit(rows(5))]
        with pytest.raises(OverloadedError, match="at most 10 rows in the queue, found 10 and 1 more"):
            batcher.submit(rows(1))
        waiting[0].cancel()
        await asyncio.sleep(0)
        assert batcher.queued_rows == observer.waiting == 5
        late = batcher.submit(rows(5, 7.0))
        gate.set()
        assert (await late)["y"][0, 0] == 14
        assert len((await first)["y"]) == 4
        assert len((await waiting[1])["y"]) == 5
        assert sum(shape[0] for shape in runner.batches) == 14  # the cancelled rows never ran
        await batcher.close()

    run(test)


def test_deadlines_and_leaving_clients() -> None:
    async def test() -> None:
        gate = threading.Event()
        batcher, _ = make(Doubler(gate=gate), max_batch=1)
        patience = Patience()
        watch = asyncio.create_task(patience.watch())
        running = batcher.submit(rows(1))
        await asyncio.sleep(0.05)
        left = asyncio.Event()
        results = await asyncio.gather(
            patience.result(batcher.submit(rows(1)), 0.1),
            patience.result(batcher.submit(rows(1)), 0.6),
            asyncio.gather(
                asyncio.create_task(patience.result(batcher.submit(rows(1)), None, left.wait)),  # type: ignore[arg-type]
                asyncio.get_running_loop().create_task(_later(left)),
                return_exceptions=True,
            ),
            return_exceptions=True,
        )
        assert [type(result) for result in results[:2]] == [DeadlineError, DeadlineError]
        assert "within 0.1 s" in str(results[0])
        assert isinstance(results[2][0], asyncio.CancelledError)
        assert batcher.queued_rows == 0
        gate.set()
        await running
        watch.cancel()

    run(test)


async def _later(event: asyncio.Event) -> None:
    await asyncio.sleep(0.1)
    event.set()


def test_closing_answers_what_waits() -> None:
    async def test() -> None:
        gate = threading.Event()
        batcher, _ = make(Doubler(gate=gate), max_batch=2)
        futures = [batcher.submit(rows(1, value)) for value in range(5)]
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.05)
        with pytest.raises(UnavailableError, match="unloaded"):
            batcher.submit(rows(1))
        gate.set()
        assert [answer["y"][0, 0] for answer in await asyncio.gather(*futures)] == [0, 2, 4, 6, 8]
        await closing

    run(test)


def test_fast_models_run_in_the_event_loop_and_slow_ones_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "INLINE_SECONDS", 0.25)  # for busy machines

    async def test() -> None:
        threads: list[int] = []

        class Recorder(Doubler):
            pause = 0.0

            def run(self, feeds: Any) -> Any:
                threads.append(threading.get_ident())
                time.sleep(self.pause)
                return super().run(feeds)

        runner = Recorder()
        batcher, _ = make(runner)
        for _ in range(3):
            await batcher.submit(rows(1))
        assert threads[0] != threading.get_ident()  # nothing is known of it yet
        assert threads[1:] == [threading.get_ident()] * 2
        runner.pause = 0.6
        await batcher.submit(rows(1))
        await batcher.submit(rows(1))
        assert threads[-1] != threading.get_ident()
        await batcher.close()

    run(test)
