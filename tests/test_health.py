"""Whether a model runs, as a server finds out."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from lmkan_deploy.errors import EngineError
from lmkan_deploy.runtime.tensors import TensorSpec
from lmkan_deploy.serving import health
from lmkan_deploy.serving.health import Health


class Fragile:
    """Copies its input; fails in the first `failures` calls."""

    name = "fragile"
    inputs = (TensorSpec("x", ("batch", 2), "float32"),)
    outputs = (TensorSpec("y", ("batch", 2), "float32"),)

    def __init__(self, failures: float) -> None:
        self.failures, self.calls = failures, 0

    def run(self, feeds: Any) -> Any:
        assert feeds["x"].shape == (1, 2)
        assert feeds["x"].dtype == np.float32
        self.calls += 1
        if self.calls <= self.failures:
            raise EngineError("the GPU failed")
        return {"y": feeds["x"]}


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(health, "_PAUSE_SECONDS", 0.1)


async def until(condition: Any) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to be")


def test_one_that_runs_is_tried_once_a_pause() -> None:
    async def test() -> None:
        runner, reasons = Fragile(0), []  # type: ignore[var-annotated]
        examined = Health("m", runner, reasons.append)
        for _ in range(3):  # clients with values at fault
            examined.suspect()
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert runner.calls == 1
        examined.suspect()
        await until(lambda: runner.calls == 2)
        assert examined.problem is None
        assert reasons == []
        examined.close()

    asyncio.run(test())


def test_one_that_runs_again_is_ready_again() -> None:
    async def test() -> None:
        reasons: list[str] = []
        examined = Health("m", Fragile(2), reasons.append)
        examined.suspect()
        await until(lambda: examined.problem == "the GPU failed")
        await until(lambda: examined.problem is None)
        await asyncio.sleep(0.7)
        assert reasons == []

    asyncio.run(test())


def test_one_that_fails_for_good_is_given_up() -> None:
    async def test() -> None:
        reasons: list[str] = []
        examined = Health("m", Fragile(float("inf")), reasons.append)
        examined.suspect()
        await until(lambda: reasons)
        assert reasons == ["model m failed for 0 seconds: the GPU failed"]
        assert examined.problem == "the GPU failed"

    asyncio.run(test())


def test_one_that_was_replaced_is_not_given_up() -> None:
    async def test() -> None:
        reasons: list[str] = []
        examined = Health("m", Fragile(float("inf")), reasons.append)
        examined.suspect()
        await until(lambda: examined.problem is not None)
        examined.close()
        await asyncio.sleep(0.8)
        assert reasons == []

    asyncio.run(test())
