"""What the shell completes values of options with."""

from __future__ import annotations

from typing import get_args


def table_dtypes() -> list[str]:
    """For --table-dtype."""
    from lmkan_deploy.spec import TABLE_DTYPES

    return list(TABLE_DTYPES)


def runtimes() -> list[str]:
    """For --runtime of what runs models."""
    from lmkan_deploy.runtime.runner import RuntimeName

    return list(get_args(RuntimeName))


def engine_runtimes() -> list[str]:
    """For --runtime of `build`."""
    from lmkan_deploy.engines.tensorrt_api import EngineRuntime

    return list(get_args(EngineRuntime))


def passes() -> list[tuple[str, str]]:
    """For --passes."""
    from lmkan_deploy.converters.passes import PASSES

    return [(item.name, item.summary) for item in PASSES]


def optional_passes() -> list[tuple[str, str]]:
    """For --no-passes."""
    from lmkan_deploy.converters.passes import PASSES, select_passes

    needed = select_passes(without=["all"])
    found = [(item.name, item.summary) for item in PASSES if item not in needed]
    return [*found, ("all", "all that can be left out")]


def package_formats() -> list[str]:
    """For --format."""
    from lmkan_deploy.packaging.package import FormatName

    return list(get_args(FormatName))


def libraries() -> list[str]:
    """For `plugins path`."""
    from lmkan_deploy.runtime.libraries import LibraryName

    return list(get_args(LibraryName))


def log_formats() -> list[str]:
    """For --log-format."""
    return ["text", "json"]
