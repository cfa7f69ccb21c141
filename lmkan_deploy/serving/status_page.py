"""The page that shows people what the server does."""

from __future__ import annotations

import functools
from importlib import resources


@functools.cache
def status_page() -> str:
    """The HTML of the page; its script reads `/status.json`."""
    return resources.files("lmkan_deploy.serving").joinpath("status.html").read_text(encoding="utf-8")
