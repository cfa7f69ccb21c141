"""The command line, as `python -m failing_cli`, whose models can't run while the file `RUNS_FAIL` exists."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmkan_deploy import cli
from lmkan_deploy.errors import InputError
from lmkan_deploy.runtime.onnxruntime import OnnxRuntimeRunner

_run = OnnxRuntimeRunner.run


def _run_or_fail(self: OnnxRuntimeRunner, feeds: Mapping[str, Any]) -> Any:
    if Path(os.environ["RUNS_FAIL"]).exists():
        raise InputError("an illegal memory access was encountered")
    return _run(self, feeds)


# Worker processes import this module too.
OnnxRuntimeRunner.run = _run_or_fail  # type: ignore[method-assign]

if __name__ == "__main__":
    cli.main()
