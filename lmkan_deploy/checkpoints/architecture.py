"""The user's own code that builds a network: `module:factory` with arguments."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lmkan_deploy import upstream
from lmkan_deploy.errors import CheckpointError


@dataclass(frozen=True)
class Architecture:
    """Where a network's class or factory function is.

    Attributes:
        factory: `module:name`, for example `my_models:MethaneNet`; None where a file needs no factory.
        path: Folder to import from, before all others.
        arguments: Keyword arguments (a dict) or positional ones (a list) of the call.
    """

    factory: str | None = None
    path: str | Path | None = None
    arguments: dict[str, Any] | list[Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, factory: str | None, path: Path | None, arguments: str | None) -> Architecture:
        """From the command line's texts.

        Raises:
            CheckpointError: The arguments are not a JSON object or array, or the folder does not exist.
        """
        try:
            values = json.loads(arguments) if arguments else {}
        except json.JSONDecodeError as error:
            raise CheckpointError(
                f"expected --arch-args as JSON, such as '{{\"hidden\": 32}}', found {arguments!r}: {error}"
            ) from error
        if not isinstance(values, dict | list):
            raise CheckpointError(
                f"expected --arch-args as a JSON object or array, found {type(values).__name__}"
            )
        if path is not None and not path.is_dir():
            raise CheckpointError(f"expected --arch-path to be a folder, found {path}")
        return cls(factory, path, values)

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Lets imports inside the block find `path` and, where upstream is missing, its stand-in."""
        with upstream.stand_in():
            if self.path is None:
                yield
                return
            entry = str(Path(self.path).resolve())
            sys.path.insert(0, entry)
            try:
                yield
            finally:
                sys.path.remove(entry)

    def build(self) -> nn.Module:
        """Imports the factory and calls it.

        Raises:
            CheckpointError: It can't be imported or called, or returns no module.
        """
        assert self.factory is not None
        module_name, _, name = self.factory.partition(":")
        if not module_name or not name:
            raise CheckpointError(f"expected --arch as module:factory, found {self.factory!r}")
        with self.importable():
            factory = self._import(module_name, name)
            arguments = self.arguments
            try:
                module = factory(*arguments) if isinstance(arguments, list) else factory(**arguments)
            except Exception as error:  # the user's code may raise anything
                raise CheckpointError(
                    f"{self.factory} called with {json.dumps(arguments)} failed: "
                    f"{type(error).__name__}: {error}; pass its arguments with --arch-args"
                ) from error
        if not isinstance(module, nn.Module):
            raise CheckpointError(
                f"expected {self.factory} to return a torch.nn.Module, found {type(module).__name__}"
            )
        return module

    def _import(self, module_name: str, name: str) -> Any:
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # the user's code may raise anything
            hint = "" if self.path else "; if it is not installed, pass its folder with --arch-path"
            if "/" in module_name or module_name.endswith(".py"):
                file = Path(module_name)
                hint = f"; pass --arch {file.stem}:{name} --arch-path {file.parent}"
            raise CheckpointError(
                f"could not import {module_name!r}: {type(error).__name__}: {error}{hint}"
            ) from error
        factory: Any = module
        for part in name.split("."):
            factory = getattr(factory, part, None)
        if not callable(factory):
            raise CheckpointError(f"expected a class or function {name!r} in {module.__file__}, found none")
        return factory
