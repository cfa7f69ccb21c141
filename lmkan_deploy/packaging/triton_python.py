"""Model repositories for Triton's Python backend, which needs numpy and onnxruntime beside it."""

from __future__ import annotations

from pathlib import Path

from lmkan_deploy.packaging.source import (
    PackageError,
    Settings,
    Source,
    copy_library,
    copy_model,
    require_onnx,
    tensor_table,
    write_template,
)
from lmkan_deploy.packaging.triton_config import triton_config


def write(source: Source, settings: Settings, folder: Path) -> list[str]:
    """Writes a repository; returns the commands that start it."""
    require_onnx(source, "triton-python")
    narrow = [spec.name for spec in (*source.inputs, *source.outputs) if spec.dtype == "bfloat16"]
    if narrow:
        raise PackageError(
            f"expected types that NumPy has for the format triton-python, found bfloat16 in {', '.join(narrow)}; "
            "use --format triton, or export a model with inputs and outputs in float32"
        )
    model = folder / settings.name
    copy_model(source, model / "1")
    copy_library(model / "1")
    write_template("triton_model.py", model / "1" / "model.py")
    config = triton_config(
        source,
        settings,
        'backend: "python"',
        max_batch=settings.max_batch if source.joins else 0,
        parameters=[] if settings.threads is None else [("threads", str(settings.threads))],
    )
    (model / "config.pbtxt").write_text(config, encoding="utf-8")
    start = ["tritonserver --model-repository=."]
    write_template(
        "triton_python_readme.md.in",
        folder / "README.md",
        name=settings.name,
        command=start[0],
        tensors=tensor_table(source),
    )
    return start
