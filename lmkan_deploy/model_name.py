"""Names of models on servers: they become folders, and parts of URLs."""

from __future__ import annotations

import re

from lmkan_deploy.errors import InputError

_NAME = re.compile(r"(?!stats$)[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")  # /v2/models/stats is the protocol's own


def is_model_name(name: str) -> bool:
    """Whether a model may have this name."""
    return _NAME.fullmatch(name) is not None


def check_model_name(name: str) -> str:
    """The name, where it may be one.

    Raises:
        InputError: It is longer than 128, is `stats`, begins with neither letter nor digit, or holds something
            else than letters, digits, `_`, `-` and `.`.
    """
    if not is_model_name(name):
        raise InputError(
            "expected a model name of at most 128 letters, digits, _, - and ., beginning with a letter or digit "
            f"and other than stats, found {name[:150]!r}"
        )
    return name
