"""KServe: a ServingRuntime that runs `lmkan-deploy serve`, an InferenceService, and an image with the model."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lmkan_deploy.packaging.source import (
    PackageError,
    Settings,
    Source,
    copy_model,
    put_wheel,
    require_onnx,
    tensor_table,
    write_template,
)
from lmkan_deploy.version import __version__

HTTP_PORT = 8080
GRPC_PORT = 8081

_MAX_NAME = 40
"""KServe appends `-predictor` and more, and a name in Kubernetes has 63 characters."""

_DEFAULT_QUEUE = 16384
"""Of `lmkan-deploy serve`."""

# What no registry takes would be found out only by the cluster.
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}")


def write(source: Source, settings: Settings, folder: Path) -> list[str]:
    """Writes the manifests and what the image is built from; returns the commands that deploy them."""
    require_onnx(source, "kserve")
    name = kubernetes_name(settings.name)
    image = settings.image or f"{name}:1"
    if not _IMAGE.fullmatch(image):
        raise PackageError(
            f"expected the name of an image, such as registry.example/{name}:1, found {image!r}; pass --image"
        )
    copy_model(source, folder / "models" / settings.name / "1")
    put_wheel(settings, folder / "wheels")
    megabytes = sum(file.stat().st_size for file in (folder / "models").rglob("*") if file.is_file()) >> 20
    cores = settings.threads or 1
    arguments = [
        "--models", "/mnt/models",
        "--host", "0.0.0.0",
        "--http-port", str(HTTP_PORT),
        "--grpc-port", str(GRPC_PORT),
        "--max-batch", str(settings.max_batch),
        "--max-delay-us", str(settings.max_delay_us),
        "--threads", str(cores),
        "--grace", "20",  # within the 30 s that Kubernetes grants
        "--log-format", "json",
    ]  # fmt: skip
    if settings.max_batch > _DEFAULT_QUEUE:
        arguments += ["--max-queue", str(settings.max_batch)]
    write_template(
        "servingruntime.yaml.in",
        folder / "servingruntime.yaml",
        name=name,
        image=json.dumps(image),
        arguments="\n".join(f"        - {json.dumps(argument)}" for argument in ("serve", *arguments)),
        http_port=HTTP_PORT,
        cores=cores,
        # A session holds a table and its repacked copy; a reload holds the old and the new model.
        request=f"{256 + 2 * megabytes}Mi",
        limit=f"{512 + 4 * megabytes}Mi",
    )
    write_template("inferenceservice.yaml.in", folder / "inferenceservice.yaml", name=name)
    write_template("Dockerfile.in", folder / "Dockerfile", version=__version__)
    start = [
        f"docker build -t {image} .",
        f"docker push {image}",
        "kubectl apply -f servingruntime.yaml -f inferenceservice.yaml",
    ]
    write_template(
        "kserve_readme.md.in",
        folder / "README.md",
        name=settings.name,
        service=name,
        commands="\n".join(start),
        grpc_port=GRPC_PORT,
        tensors=tensor_table(source),
    )
    return start


def kubernetes_name(name: str) -> str:
    """A model's name as Kubernetes takes names: lower case, with - instead of _ and .

    Raises:
        PackageError: It is too long.
    """
    result = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not result[:1].isalpha():
        result = f"model-{result}"
    if len(result) > _MAX_NAME:
        raise PackageError(
            f"expected a name of at most {_MAX_NAME} characters for kserve, found {result} with {len(result)}; "
            "pass a shorter --name"
        )
    return result
