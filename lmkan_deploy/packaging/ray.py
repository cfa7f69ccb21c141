"""Ray Serve: an application, its configuration and its requirements."""

from __future__ import annotations

import json
from pathlib import Path

from lmkan_deploy.packaging.source import (
    Settings,
    Source,
    copy_model,
    put_wheel,
    require_onnx,
    tensor_table,
    write_template,
)
from lmkan_deploy.version import __version__


def write(source: Source, settings: Settings, folder: Path) -> list[str]:
    """Writes the application; returns the commands that start it on one machine."""
    require_onnx(source, "ray")
    copy_model(source, folder)
    put_wheel(settings, folder / "wheels")
    write_template("ray_app.py", folder / "app.py")
    write_template(
        "serve_config.yaml.in",
        folder / "serve_config.yaml",
        name=json.dumps(settings.name),
        max_batch=settings.max_batch,
        max_delay_us=settings.max_delay_us,
        threads=settings.threads or 1,
    )
    write_template("ray_requirements.txt.in", folder / "requirements.txt", version=__version__)
    start = [
        "pip install -r requirements.txt",
        "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING=0 serve run serve_config.yaml",
    ]
    write_template(
        "ray_readme.md.in",
        folder / "README.md",
        name=settings.name,
        commands="\n".join(start),
        tensors=tensor_table(source),
    )
    return start
