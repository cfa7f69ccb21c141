"""The user's own code that builds a network: `module:factory` with arguments."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lmkan_deploy import upstream
from lmkan_deploy.checkpoints.state_dict import one_line
from lmkan_deploy.checkpoints.user_modules import imports_from, lies_in, provides
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
            raise CheckpointError(f"expected --arch-path to be a folder, found {path}; check the path")
        return cls(factory, path, values)

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Lets imports inside the block find `path` first and, where upstream is missing, its stand-in."""
        with upstream.stand_in(), imports_from(self._folder()):
            yield

    def _folder(self) -> str | None:
        return None if self.path is None else str(Path(self.path).resolve())

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
            except SystemExit as error:
                raise ended(f"{self.factory} called with {json.dumps(arguments)}", error) from error
            except Exception as error:  # the user's code may raise anything
                raise CheckpointError(
                    f"{self.factory} called with {json.dumps(arguments)} failed: "
                    f"{type(error).__name__}: {one_line(error)}; {_what_to_do(error)}"
                ) from error
        if not isinstance(module, nn.Module):
            raise CheckpointError(
                f"expected {self.factory} to return a torch.nn.Module, found {type(module).__name__}; name a "
                "class, or a function that builds the network"
            )
        return module

    def _import(self, module_name: str, name: str) -> Any:
        folder = self._folder()
        try:
            module = importlib.import_module(module_name)
        except SystemExit as error:
            raise ended(f"the import of {module_name!r}", error) from error
        except Exception as error:  # the user's code may raise anything
            raise CheckpointError(
                f"could not import {module_name!r}: {type(error).__name__}: {one_line(error)}; "
                f"{self._what_to_install(module_name, name, error)}"
            ) from error
        if folder is not None and provides(folder, module_name) and not lies_in(module, folder):
            found = getattr(module, "__file__", "a built-in one")
            raise CheckpointError(
                f"expected {module_name!r} of {self.path}, found {found}, which has the same name and is in use; "
                "rename yours"
            )
        factory: Any = module
        for part in name.split("."):
            factory = getattr(factory, part, None)
        if not callable(factory):
            raise CheckpointError(
                f"expected a class or function {name!r} in {getattr(module, '__file__', module_name)}, found "
                "none; check --arch"
            )
        return factory

    def _what_to_install(self, module_name: str, name: str, error: Exception) -> str:
        """What helps where an import failed."""
        if "/" in module_name or module_name.endswith(".py"):
            file = Path(module_name)
            return f"pass --arch {file.stem}:{name} --arch-path {file.parent}"
        missing = error.name if isinstance(error, ImportError) else None
        if missing is not None and missing.split(".")[0] == upstream.PACKAGE and not upstream.is_installed():
            return (
                "the stand-in for upstream's package has LMKAN2DLayer and its helpers alone: leave out that "
                "import, or install upstream's package"
            )
        if missing is None or not isinstance(error, ModuleNotFoundError):
            return "correct that code, which runs at the import"
        if self.path is None:
            return "if it is not installed, pass its folder with --arch-path"
        if missing.split(".")[0] == module_name.split(".")[0]:
            return f"check --arch, or pass the folder that has it with --arch-path; {self.path} has none"
        return f"install {missing!r}, or pass the folder that has both with --arch-path"


_SIGNALS = (129, 143)
"""Exit codes of the command line when it is told to end (SIGHUP, SIGTERM), also while the user's code runs."""


def ended(what: str, error: SystemExit) -> CheckpointError:
    """The error for the user's code that ends the process.

    Raises:
        SystemExit: The end was asked for from outside.
    """
    if error.code in _SIGNALS:
        raise error
    return CheckpointError(
        f"expected {what} to return, found that it ends the process with sys.exit({error.code!r}); guard the "
        "script with if __name__ == '__main__'"
    )


def _what_to_do(error: Exception) -> str:
    """What helps where a factory failed."""
    return "pass its arguments with --arch-args" if isinstance(error, TypeError) else "correct that code"
