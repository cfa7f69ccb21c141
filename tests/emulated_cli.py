"""The command line on an emulated GPU: `python -m emulated_cli MODEL LARGEST serve ...`, for engines of MODEL.

Says at the end how often graphs were launched.
"""

from __future__ import annotations

import sys
from pathlib import Path

from emulated_gpu import emulated_gpu
from lmkan_deploy import cli
from lmkan_deploy.engines.profiles import ShapeRange

if __name__ == "__main__":
    model, largest = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
    profiles = [{"x": ShapeRange((1, 10), (8, 10), (largest, 10))}]
    with emulated_gpu("tensorrt", model, profiles) as (_, driver):
        try:
            cli.main()
        finally:
            print(f"graph launches: {driver.launches}", file=sys.stderr, flush=True)
