"""The models that a server has: loading, versions, replacing while requests go on."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmkan_deploy.errors import LmkanError, ModelError
from lmkan_deploy.model_name import check_model_name, is_model_name
from lmkan_deploy.runtime.runner import Runner, RuntimeName, load_runner
from lmkan_deploy.runtime.tensors import Arrays, random_rows, rows_are_free, rows_are_independent
from lmkan_deploy.serving.batching import Batcher, BatchingOptions
from lmkan_deploy.serving.errors import NotFoundError, UnavailableError
from lmkan_deploy.serving.health import Health
from lmkan_deploy.serving.metrics import Metrics, ModelMetrics

_log = logging.getLogger(__name__)

_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_SUFFIXES = (".onnx", ".engine")

Load = Callable[[Path], Runner]


@dataclass(frozen=True)
class ServedModel:
    """One version of a model, ready for requests."""

    name: str
    version: str
    file: Path
    runner: Runner
    batcher: Batcher
    health: Health
    metrics: ModelMetrics
    state: tuple[object, ...]
    """What the file looked like when it was read."""

    @property
    def platform(self) -> str:
        """Triton's name of what runs the model."""
        return "tensorrt_plan" if self.file.suffix == ".engine" else "onnxruntime_onnx"

    def submit(self, feeds: Mapping[str, NDArray[Any]]) -> asyncio.Future[Arrays]:
        """See `Batcher.submit`.

        Raises:
            UnavailableError: Also while the model fails on every input.
        """
        if self.health.problem is not None:
            raise UnavailableError(
                f"model {self.name} is not ready: it fails on every input: {self.health.problem}; try again "
                "later, or ask another server"
            )
        return self.batcher.submit(feeds)


def model_files(path: Path) -> dict[str, Path]:
    """Version -> model file, of a file (version 1) or of a folder with a folder for each version.

    Raises:
        ModelError: There is no model.
    """
    if path.is_file():
        return {"1": path}
    found = {}
    if path.is_dir():
        for folder in path.iterdir():
            files = [folder / f"model{suffix}" for suffix in _SUFFIXES]
            file = next((file for file in files if file.is_file()), None)
            if _VERSION.fullmatch(folder.name) and file is not None:
                found[folder.name] = file
    if not found:
        raise ModelError(
            "expected an .onnx or .engine file, or a folder with VERSION/model.onnx, such as 1/model.onnx, "
            f"found none at {path}"
        )
    return found


def find_models(folder: Path) -> dict[str, Path]:
    """Model name -> path for `model_files`: every model file and every folder of versions in a folder.

    Raises:
        ModelError: It is no folder.
    """
    if not folder.is_dir():
        raise ModelError(f"expected a folder of models, found no folder {folder}")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name = path.stem if path.suffix in _SUFFIXES and path.is_file() else path.name
        is_model = path.is_file() and path.suffix in _SUFFIXES
        if not is_model and path.is_dir():
            is_model = any(_VERSION.fullmatch(entry.name) for entry in path.iterdir())
        if is_model and is_model_name(name):
            found[name] = path
    return found


class ModelStore:
    """All models of a server process.

    Args:
        sources: Model name -> path for `model_files`.
        folder: Where `load` finds models that `sources` does not name.
        options: For every model's batcher.
        metrics: Where models count.
        runtime: What runs ONNX files.
        threads: Threads of one run; None leaves the choice to ONNX Runtime.
        device: Number of the GPU, for engines and for onnxruntime-cuda.
        plugin: TensorRT plugin library for engines; None takes the one for the installed TensorRT.
        cuda_graphs: Whether engines run with CUDA graphs.
        give_up: Called, with the reason, when a model can't run any more; see `Health`.

    Requests keep the model they began with: replacing or unloading one lets it finish its queue first.
    """

    def __init__(
        self,
        sources: dict[str, Path],
        *,
        folder: Path | None = None,
        options: BatchingOptions,
        metrics: Metrics,
        runtime: RuntimeName = "onnxruntime",
        threads: int | None = None,
        device: int = 0,
        plugin: Path | None = None,
        cuda_graphs: bool = False,
        give_up: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._sources = {check_model_name(name): path for name, path in sources.items()}
        self._folder, self._metrics = folder, metrics
        self.options = options
        self._runtime, self._threads, self._device = runtime, threads, device
        self._plugin, self._cuda_graphs = plugin, cuda_graphs
        self._give_up = give_up
        self._served: dict[str, dict[str, ServedModel]] = {}
        self._problems: dict[str, str] = {}
        self._lock = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()

    def get(self, name: str, version: str | None = None) -> ServedModel:
        """A model; without a version the newest.

        Raises:
            NotFoundError: There is no such model or version.
            UnavailableError: It is not loaded.
        """
        versions = self._served.get(name)
        if not versions:
            if name in self._sources:
                problem = self._problems.get(name, "it was unloaded")
                raise UnavailableError(f"model {name} is not ready: {problem}; load it, or try again later")
            known = ", ".join(sorted(self._served)) or "none"
            raise NotFoundError(f"expected a model of {known}, found {name[:150]!r}")
        if not version:
            newest = next(iter(versions)) if len(versions) == 1 else max(versions, key=int)
            return versions[newest]
        if version not in versions:
            have = ", ".join(sorted(versions, key=int))
            raise NotFoundError(f"expected a version of {have} of model {name}, found {version[:30]!r}")
        return versions[version]

    @property
    def names(self) -> list[str]:
        """All known models, loaded or not."""
        return sorted(self._sources)

    def versions(self, name: str) -> list[ServedModel]:
        """The loaded versions of a model, oldest first."""
        return sorted(self._served.get(name, {}).values(), key=lambda model: int(model.version))

    def loaded(self) -> list[ServedModel]:
        """Every loaded version of every model."""
        return [model for name in sorted(self._served) for model in self.versions(name)]

    def index(self) -> list[dict[str, str]]:
        """Every known model in the fields of the protocol's repository index."""
        entries = []
        for name in self.names:
            problem = self._problems.get(name, "")
            for model in self.versions(name):
                failure = model.health.problem
                state = "READY" if failure is None else "UNAVAILABLE"
                reason = problem if failure is None else failure
                entries.append({"name": name, "version": model.version, "state": state, "reason": reason})
            if not self._served.get(name):
                entries.append(
                    {"name": name, "version": "", "state": "UNAVAILABLE", "reason": problem or "unloaded"}
                )
        return entries

    def problem(self, name: str) -> str | None:
        """Why the last load of a model failed; None where it did not."""
        return self._problems.get(name)

    @property
    def ready(self) -> bool:
        """Whether every known model runs, or was unloaded by request."""
        if any(name in self._problems and not self._served.get(name) for name in self._sources):
            return False
        return all(model.health.problem is None for model in self.loaded())

    async def load(self, name: str) -> None:
        """Loads a model, or replaces it by what its files hold now. On failure the old one goes on.

        Raises:
            LmkanError: There is no such model, or it can't be loaded or run.
        """
        async with self._lock:
            path = self._source(check_model_name(name))
            old = self._served.get(name, {})
            try:
                new = {}
                for version, file in (await asyncio.to_thread(model_files, path)).items():
                    state = await asyncio.to_thread(_file_state, file)
                    kept = old.get(version)
                    same = kept is not None and (kept.file, kept.state) == (file, state)
                    if kept is not None and same and kept.health.problem is None:
                        new[version] = kept
                    else:
                        new[version] = await self._open(name, version, file, state)
            except (LmkanError, OSError) as error:
                self._problems[name] = str(error)
                self._metrics.loads.labels(name, "", "failed").inc()
                _log.warning("model %s: could not load: %s", name, error)
                if isinstance(error, OSError):
                    raise ModelError(f"expected to read {path}, found {error.strerror}") from error
                raise
            self._problems.pop(name, None)
            self._sources[name], self._served[name] = path, new
            self._metrics.loads.labels(name, "", "done").inc()
            _log.info("model %s: serving version %s", name, ", ".join(sorted(new, key=int)))
            self._retire(model for version, model in old.items() if new.get(version) is not model)

    async def unload(self, name: str) -> None:
        """Stops serving a model; requests that it has are answered.

        Raises:
            NotFoundError: There is no such model.
        """
        async with self._lock:
            if name not in self._sources:
                raise NotFoundError(f"expected a model of {', '.join(self.names)}, found {name[:150]!r}")
            old = self._served.pop(name, {})
            self._problems.pop(name, None)
            _log.info("model %s: unloaded", name)
            self._retire(old.values())

    async def changed(self) -> list[str]:
        """Loaded models whose files are others than those that were read, and still there."""
        return await asyncio.to_thread(
            lambda: [name for name in list(self._served) if self._served[name] and self._has_changed(name)]
        )

    async def close(self) -> None:
        """Returns when every request is answered."""
        async with self._lock:
            for versions in self._served.values():
                self._retire(versions.values())
            self._served.clear()
        await asyncio.gather(*self._closing)

    def _load(self, file: Path) -> Runner:
        if file.suffix == ".engine":
            # Requests join to batches of any size; each would need a graph of its own.
            graphs = self._cuda_graphs
            return load_runner(
                file, device=self._device, plugin=self._plugin, cuda_graphs=graphs, pad_batches=graphs
            )
        device = self._device if self._runtime == "onnxruntime-cuda" else 0
        return load_runner(file, self._runtime, threads=self._threads, device=device)

    def _source(self, name: str) -> Path:
        if name in self._sources:
            return self._sources[name]
        if self._folder is not None:
            found = find_models(self._folder)
            if name in found:
                return found[name]
        where = "" if self._folder is None else f", or one in {self._folder}"
        raise NotFoundError(f"expected a model of {', '.join(self.names) or 'none'}{where}, found {name!r}")

    async def _open(self, name: str, version: str, file: Path, state: tuple[object, ...]) -> ServedModel:
        runner, may_join = await asyncio.to_thread(_open_and_try, self._load, file, self.options)
        if not may_join:
            _log.warning("model %s: its rows depend on each other, so that every request runs alone", name)
        metrics = self._metrics.of_model(name, version)
        health = Health(name, runner, self._give_up)
        batcher = Batcher(runner, self.options, metrics, health.suspect, may_join=may_join)
        return ServedModel(name, version, file, runner, batcher, health, metrics, state)

    def _retire(self, models: Iterable[ServedModel]) -> None:
        for model in models:
            model.health.close()
            task = asyncio.get_running_loop().create_task(model.batcher.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _has_changed(self, name: str) -> bool:
        try:
            files = model_files(self._sources[name])
            served = self._served[name]
            if files.keys() != served.keys():
                return True
            return any(_file_state(file) != served[version].state for version, file in files.items())
        except (LmkanError, OSError):
            return False  # a file that is gone or half written replaces nothing


def _file_state(file: Path) -> tuple[object, ...]:
    """Changes whenever the model's file or its external data does."""
    result: list[object] = []
    for path in (file, *_companions(file)):
        status = path.stat()
        result += [path.name, status.st_ino, status.st_size, status.st_mtime_ns]
    return tuple(result)


def _companions(file: Path) -> list[Path]:
    """Files beside a model that belong to it: external data, an engine's manifest."""
    return sorted(path for path in (Path(f"{file}.data"), Path(f"{file}.json")) if path.is_file())


def _open_and_try(load: Load, file: Path, options: BatchingOptions) -> tuple[Runner, bool]:
    """Loads a model and runs it on one row, on a full batch, and on all sizes that an engine pads batches to, so
    that the first request waits for nothing, and a model that can't run is never served. Also tells whether
    requests may be joined.
    """
    companions = _companions(file)
    if companions and file.suffix == ".onnx":
        # ONNX Runtime maps external data into memory: cutting the file short would end the process.
        with tempfile.TemporaryDirectory(prefix="lmkan-serve-") as folder:
            for path in (file, *companions):
                shutil.copyfile(path, Path(folder) / path.name)
            runner = load(Path(folder) / file.name)
    else:
        runner = load(file)
    started = time.perf_counter()
    limits = getattr(runner, "limits", None)
    batches = {1}
    is_free = rows_are_free(runner.inputs, runner.outputs)
    if is_free:
        padded = getattr(runner, "batch_sizes", None) or ()
        batches |= {options.max_batch, *(rows for rows in padded if rows < options.max_batch)}
    for rows in sorted(batches):
        runner.run(random_rows(runner.inputs, rows, np.random.default_rng(0), limits))
    _log.debug("%s: first runs took %.3f s", file, time.perf_counter() - started)
    # Where shapes do not let requests be joined, there is nothing to try.
    may_join = not is_free or rows_are_independent(runner.run, runner.inputs, limits)
    if not may_join and getattr(runner, "batch_sizes", None) is not None:
        raise ModelError(
            f"expected rows that do not depend on each other in {file.name}, since CUDA graphs pad batches; "
            "serve it without --cuda-graphs"
        )
    return runner, may_join
