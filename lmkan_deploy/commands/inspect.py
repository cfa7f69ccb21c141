"""`lmkan-deploy inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmkan_deploy.commands.options import AsJson
from lmkan_deploy.commands.terminal import print_json


def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX file.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Show a model's lookup layers, sizes, cost and origin.

    Example:

        lmkan-deploy inspect model.onnx
    """
    from lmkan_deploy import api

    info = api.inspect(model)
    if as_json:
        print_json(info.to_json())
        return
    from lmkan_deploy import report

    report.print_model(info)
