"""Imports from a folder that the user names, whatever else the process has imported under the same names."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from lmkan_deploy.upstream import PACKAGE


class _Loaded(NamedTuple):
    module: ModuleType
    folder: str
    version: tuple[int, int] | None


_loaded: dict[str, _Loaded] = {}
"""What was imported here last, by name; not in use where sys.modules has another module."""

_KEPT = {PACKAGE, "lmkan_deploy", "__main__", *sys.stdlib_module_names}


@contextmanager
def imports_from(folder: str | None) -> Iterator[None]:
    """Imports inside the block find a folder's modules first, in their present version.

    Modules of other folders that go by the same names are set aside. The process's own are back after the block;
    of those that were imported here, the last stay, so that classes of the last network can be pickled.

    Args:
        folder: An absolute path without links; None leaves out what earlier blocks imported, and no more.
    """
    importlib.invalidate_caches()
    ours = {name for name, found in _loaded.items() if sys.modules.get(name) is found.module}
    here = _modules_of(folder)
    aside = {name for name in ours if _loaded[name].folder != folder} | _hidden(folder, ours)
    stale: set[str] = set()
    if any(_is_edited(name) for name in here):
        # The others hold what they imported from the edited one.
        stale = here & ours
        aside |= here
    before = {name: sys.modules.pop(name) for name in aside}
    own = here - aside - ours
    writes_bytecode = sys.dont_write_bytecode
    if folder is not None:
        sys.path.insert(0, folder)
        # Bytecode knows its source by whole seconds, too few for a file that is edited and imported again.
        sys.dont_write_bytecode = True
    try:
        yield
    finally:
        if folder is not None:
            sys.path.remove(folder)
        sys.dont_write_bytecode = writes_bytecode
        new = _modules_of(folder) - own
        for name in new:
            _loaded[name] = _Loaded(sys.modules[name], folder or "", _version(sys.modules[name]))
        back = {name for name in before if name not in ours}
        for name in new:
            if _top(name) in _tops(back):
                del sys.modules[name]
        taken = _tops(sys.modules)
        for name, module in before.items():
            if name in back or (name not in stale and _top(name) not in taken):
                sys.modules[name] = module


def lies_in(module: ModuleType, folder: str) -> bool:
    """Whether a module was imported from a folder or below it."""
    file = getattr(module, "__file__", None)
    if file is not None:
        place = os.path.dirname(file)
    else:  # a namespace package
        place = next(iter(getattr(module, "__path__", ())), "")
    return bool(place) and Path(os.path.realpath(place)).is_relative_to(folder)


def provides(folder: str, name: str) -> bool:
    """Whether a folder has a module or a package with an `__init__.py` of this name."""
    spec = PathFinder.find_spec(_top(name), [folder])
    return spec is not None and spec.has_location


def _top(name: str) -> str:
    return name.partition(".")[0]


def _tops(names: Iterable[str]) -> set[str]:
    return {_top(name) for name in names}


def _modules_of(folder: str | None) -> set[str]:
    """Names of imported modules that lie in a folder and are found there."""
    if folder is None:
        return set()
    names = {top for top in _tops(sys.modules) - _KEPT if PathFinder.find_spec(top, [folder]) is not None}
    return {
        name
        for name, module in list(sys.modules.items())
        if _top(name) in names and lies_in(module, folder) and not _is_installed(module)
    }


def _hidden(folder: str | None, ours: set[str]) -> set[str]:
    """Names of imported modules of other places that would keep a folder's from being found."""
    if folder is None:
        return set()
    hidden: set[str] = set()
    for top in _tops(sys.modules) - _KEPT:
        spec = PathFinder.find_spec(top, [folder])
        if spec is None or top in ours or top not in sys.modules or lies_in(sys.modules[top], folder):
            continue
        # A folder without __init__.py comes after every module of its name.
        if not spec.has_location and getattr(sys.modules[top], "__file__", None) is not None:
            continue
        names = {name for name in sys.modules if _top(name) == top}
        if not any(_is_installed(sys.modules[name]) for name in names):
            hidden |= names
    return hidden


def _is_installed(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    if file is None:
        return not hasattr(module, "__path__")  # built in, or made by a program
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def _is_edited(name: str) -> bool:
    """Whether a module's file may be another one than at its import."""
    module, version = sys.modules[name], _version(sys.modules[name])
    known = _loaded.get(name)
    if known is not None and known.module is module:
        return version != known.version
    # The process imported it at some time.
    return version is not None and version[0] >= _process_start() * 1e9


def _version(module: ModuleType) -> tuple[int, int] | None:
    """Time and size of a module's file; None for a namespace package, or where the file is gone."""
    try:
        found = os.stat(getattr(module, "__file__", None) or "")
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _process_start() -> float:
    """In seconds since 1970; 0 where that is not known."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
