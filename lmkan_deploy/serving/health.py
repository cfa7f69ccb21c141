"""Whether models can still run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import numpy as np

from lmkan_deploy.runtime.runner import Runner
from lmkan_deploy.runtime.tensors import random_rows

_log = logging.getLogger(__name__)

PATIENCE_SECONDS = 10.0
"""How long a model may fail before the process gives up: memory may run out for a moment, but CUDA's errors stay
until the process ends."""

_PAUSE_SECONDS = 0.5


class Health:
    """Finds out whether a model that failed a request fails all of them, as on a GPU that is lost.

    The model is tried on a row like that which it ran when it was loaded. While it fails, again and again, it is
    not ready.

    Args:
        name: The model's, for messages.
        runner: The model.
        give_up: Called once, with the last error, when the model has failed for `PATIENCE_SECONDS`.

    Attributes:
        problem: Why the model is not ready; None where it is.
    """

    def __init__(self, name: str, runner: Runner, give_up: Callable[[str], None]) -> None:
        self._name, self._runner, self._give_up = name, runner, give_up
        self._examination: asyncio.Task[None] | None = None
        self.problem: str | None = None

    def suspect(self) -> None:
        """Tells that a request failed, in the event loop's thread."""
        if self._examination is None:
            self._examination = asyncio.get_running_loop().create_task(self._examine())

    def close(self) -> None:
        """Takes no more interest in the model."""
        if self._examination is not None:
            self._examination.cancel()

    async def _examine(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE_SECONDS
        try:
            while (problem := await asyncio.to_thread(_problem, self._runner)) is not None:
                if self.problem is None:
                    _log.error("model %s: fails on every input: %s", self._name, problem)
                self.problem = problem
                if loop.time() > deadline:
                    self._give_up(f"model {self._name} failed for {PATIENCE_SECONDS:.0f} seconds: {problem}")
                    return
                await asyncio.sleep(_PAUSE_SECONDS)
            if self.problem is not None:
                _log.info("model %s: runs again", self._name)
            self.problem = None
            # Clients that send what the model can't run shall not keep it busy with this.
            await asyncio.sleep(_PAUSE_SECONDS)
        finally:
            self._examination = None


def _problem(runner: Runner) -> str | None:
    """Why a model can't run one row; None where it can."""
    try:
        runner.run(random_rows(runner.inputs, 1, np.random.default_rng(0), getattr(runner, "limits", None)))
    except Exception as error:
        return str(error) or type(error).__name__
    return None
