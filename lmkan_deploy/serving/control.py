"""Loads and unloads that reach every process of a server.

The processes share a folder: `models.json` says which models were loaded and unloaded by request, each with the
number of the change; a file for each process says up to which change it has followed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmkan_deploy.errors import LmkanError
from lmkan_deploy.serving.errors import UnavailableError
from lmkan_deploy.serving.models import ModelStore

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_FOLLOW_SECONDS = 60.0


class Control:
    """Changes the models of this process, and has the other processes of the server follow.

    Args:
        store: The models of this process.
        folder: Shared by the processes; None where there is only one.
        process: Number of this process, from 0.
        processes: How many there are.
    """

    def __init__(self, store: ModelStore, folder: Path | None, process: int, processes: int) -> None:
        self._store, self._folder, self._process, self._processes = store, folder, process, processes
        self._applied = 0

    async def load(self, name: str) -> None:
        """See `ModelStore.load`.

        Raises:
            UnavailableError: Another process did not follow.
        """
        await self._store.load(name)
        await self._publish(name, loaded=True)

    async def unload(self, name: str) -> None:
        """See `ModelStore.unload`.

        Raises:
            UnavailableError: Another process did not follow.
        """
        await self._store.unload(name)
        await self._publish(name, loaded=False)

    async def start(self) -> list[str]:
        """Names of the models that a new process loads: all known, but for what was unloaded by request."""
        state = self._read()
        changes, self._applied = state["models"], state["change"]
        self._acknowledge()
        names = dict.fromkeys(self._store.names, True)
        names |= {name: change["loaded"] for name, change in changes.items()}
        return [name for name, loaded in names.items() if loaded]

    async def follow(self) -> None:
        """Does what other processes publish, for ever."""
        if self._folder is None:
            return
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            state = self._read()
            if state["change"] == self._applied:
                continue
            for name, change in state["models"].items():
                if change["change"] > self._applied and change["process"] != self._process:
                    with contextlib.suppress(LmkanError):  # logged by the store
                        await (self._store.load(name) if change["loaded"] else self._store.unload(name))
            self._applied = state["change"]
            self._acknowledge()

    async def _publish(self, name: str, *, loaded: bool) -> None:
        if self._folder is None:
            return
        number = await asyncio.to_thread(self._write, name, loaded)
        deadline = asyncio.get_running_loop().time() + _FOLLOW_SECONDS
        while asyncio.get_running_loop().time() < deadline:
            if all(self._followed(process) >= number for process in range(self._processes)):
                return
            await asyncio.sleep(_POLL_SECONDS)
        raise UnavailableError(
            f"expected all {self._processes} processes to follow within {_FOLLOW_SECONDS:g} s, which some did "
            "not; see the server's log"
        )

    def _write(self, name: str, loaded: bool) -> int:
        with self._locked() as folder:
            state = self._read()
            number = int(state["change"]) + 1
            state["change"] = number
            state["models"][name] = {"change": number, "loaded": loaded, "process": self._process}
            _replace(folder / "models.json", state)
            return number

    def _read(self) -> dict[str, Any]:
        if self._folder is None or not (self._folder / "models.json").exists():
            return {"change": 0, "models": {}}
        state: dict[str, Any] = json.loads((self._folder / "models.json").read_text())
        return state

    def _followed(self, process: int) -> int:
        assert self._folder is not None
        file = self._folder / f"process-{process}.json"
        return int(json.loads(file.read_text())) if file.exists() else 0

    def _acknowledge(self) -> None:
        if self._folder is not None:
            _replace(self._folder / f"process-{self._process}.json", self._applied)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Path]:
        assert self._folder is not None
        with (self._folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield self._folder


def _replace(file: Path, value: object) -> None:
    """Readers see the old content or the new one."""
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps(value))
    temporary.replace(file)
