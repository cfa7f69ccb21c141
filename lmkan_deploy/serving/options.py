"""What a server is told to do."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from lmkan_deploy.errors import InputError
from lmkan_deploy.model_name import check_model_name
from lmkan_deploy.runtime.runner import RuntimeName
from lmkan_deploy.serving.batching import BatchingOptions
from lmkan_deploy.serving.models import find_models, model_files


@dataclass(frozen=True)
class ServerOptions:
    """Everything that a server process needs to start; goes to worker processes by pickle.

    Attributes:
        models: Name -> model file, or folder of versions.
        folder: Folder with more models; None for none.
        host: Address to listen on.
        http_port: Port for HTTP; 0 for any free one.
        grpc_port: Port for gRPC; 0 for any free one, None for no gRPC.
        processes: Worker processes, each with its own copy of the models.
        threads: Threads of one run of a model.
        runtime: What runs ONNX files.
        device: Number of the GPU, for engines and for onnxruntime-cuda.
        plugin: TensorRT plugin library for engines; None takes the one for the installed TensorRT.
        cuda_graphs: Whether engines run with CUDA graphs.
        batching: How requests are joined.
        timeout: Seconds that a request may take unless it says less; None for any.
        max_body: Most bytes of a request's body.
        body_timeout: Seconds within which a body must arrive.
        max_connections: Most HTTP connections, and gRPC calls, at a time in a process; None for any number.
        grace: Seconds for what is in flight when the server stops.
        watch: Seconds between two looks at the model files; None for never.
        token: What clients must present; None for no check.
        tls_certificate: PEM file of the certificate chain; None for no TLS.
        tls_key: PEM file of the key.
        json_logs: Whether log lines are JSON.
        log_requests: Whether every request is logged.
    """

    models: dict[str, Path]
    folder: Path | None = None
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int | None = 8001
    processes: int = 1
    threads: int = 1
    runtime: RuntimeName = "onnxruntime"
    device: int = 0
    plugin: Path | None = None
    cuda_graphs: bool = False
    batching: BatchingOptions = field(default_factory=BatchingOptions)
    timeout: float | None = 30.0
    max_body: int = 64 << 20
    body_timeout: float = 30.0
    max_connections: int | None = 1000
    grace: float = 30.0
    watch: float | None = None
    token: str | None = field(default=None, repr=False)
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    json_logs: bool = False
    log_requests: bool = False

    def check(self) -> None:
        """Checks what can be checked before anything starts.

        Raises:
            InputError: Options contradict each other.
            ModelError: A model or the folder is missing.
        """
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise InputError("expected --tls-cert and --tls-key together, found one; pass both")
        for file in (self.tls_certificate, self.tls_key):
            if file is not None and not file.is_file():
                raise InputError(f"expected a PEM file, found no file {file}")
        if self.batching.max_queue < self.batching.max_batch:
            raise InputError(
                f"expected a queue of at least one batch of {self.batching.max_batch} rows, found "
                f"{self.batching.max_queue}; pass a larger --max-queue or a smaller --max-batch"
            )
        for name, path in self.models.items():
            check_model_name(name)
            model_files(path)
        if not self.all_models():
            where = "" if self.folder is None else f" in {self.folder}"
            raise InputError(
                f"expected a model to serve, found none{where}; pass a model file, --model NAME=PATH or "
                "--models DIR"
            )

    def all_models(self) -> dict[str, Path]:
        """Those that were named, and those in the folder."""
        found = {} if self.folder is None else find_models(self.folder)
        return found | self.models


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))
