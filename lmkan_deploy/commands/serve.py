"""`lmkan-deploy serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from lmkan_deploy.commands.completion import log_formats, runtimes
from lmkan_deploy.commands.options import Device, Plugin
from lmkan_deploy.errors import InputError

TOKEN_VARIABLE = "LMKAN_DEPLOY_TOKEN"


def serve(
    model_files: Annotated[
        Optional[list[Path]],  # noqa: UP045  typer evaluates annotations on Python 3.10
        typer.Argument(
            metavar="[MODEL]...",
            help="ONNX files, engines, or folders of versions; each is served under its file's name.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--model", metavar="NAME=PATH", help="A model under a name of its own. May be repeated."
        ),
    ] = None,
    models: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--models",
            metavar="DIR",
            help="Serve everything in a folder: NAME.onnx, NAME.engine, or NAME/VERSION/model.onnx. Models that "
            "are put there later can be loaded through the API.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 for all.")
    ] = "127.0.0.1",
    http_port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="PORT", help="Port for HTTP; 0 for any free one.")
    ] = 8000,
    grpc_port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="PORT", help="Port for gRPC; 0 for any free one.")
    ] = 8001,
    grpc: Annotated[bool, typer.Option("--grpc/--no-grpc", help="Whether to serve gRPC.")] = True,
    max_batch: Annotated[
        int,
        typer.Option(
            min=1, max=2**24, metavar="ROWS", help="Most rows of one run; larger requests are split."
        ),
    ] = 1024,
    max_delay_us: Annotated[
        int,
        typer.Option(
            min=0,
            max=10**7,
            metavar="MICROSECONDS",
            help="How long a request waits for others while the model is idle. At 0 only those are joined that "
            "arrive together, or while the model runs.",
        ),
    ] = 0,
    max_queue: Annotated[
        int,
        typer.Option(
            min=1,
            max=2**30,
            metavar="ROWS",
            help="Most rows that wait; requests beyond are refused with 429.",
        ),
    ] = 16384,
    timeout: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="SECONDS",
            help="Longest time for a request, unless it asks for less; 0 for no limit.",
        ),
    ] = 30.0,
    max_body_mb: Annotated[
        int, typer.Option(min=1, max=2047, metavar="MEGABYTES", help="Largest body of a request.")
    ] = 64,
    max_connections: Annotated[
        int, typer.Option(min=1, metavar="NUMBER", help="Most connections at a time, in a process.")
    ] = 1000,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            max=256,
            metavar="NUMBER",
            help="Processes, each with its own copy of the models. One joins requests best; several help where "
            "many small requests keep Python busy.",
        ),
    ] = 1,
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=1, max=1024, metavar="NUMBER", help="Threads of one run of a model. Default: cores / workers."
        ),
    ] = None,
    runtime: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What runs ONNX files: onnxruntime, onnxruntime-cuda, ... as in run.",
            autocompletion=runtimes,
        ),
    ] = "onnxruntime",
    device: Device = 0,
    plugin: Plugin = None,
    cuda_graphs: Annotated[
        bool,
        typer.Option(
            "--cuda-graphs",
            help="Run engines with CUDA graphs, which saves the launches of many small kernels. Batches are "
            "padded with rows of zeros to the next of few sizes (1, 2, 3, 4, 6, 8, 12, ...), whose graphs are "
            "captured while the model is loaded. Refuses networks whose rows depend on each other.",
        ),
    ] = False,
    watch: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            min=0.1,
            metavar="SECONDS",
            help="Look at the model files this often, and load those again that have changed. Default: never.",
        ),
    ] = None,
    grace: Annotated[
        float,
        typer.Option(
            min=0.0, metavar="SECONDS", help="Time for what is in flight when the server is stopped."
        ),
    ] = 30.0,
    token_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--token-file",
            metavar="FILE",
            help=f"Ask clients for the bearer token in this file, or in the variable {TOKEN_VARIABLE}.",
        ),
    ] = None,
    tls_cert: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--tls-cert", metavar="FILE", help="Certificate chain (PEM) for TLS."),
    ] = None,
    tls_key: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--tls-key", metavar="FILE", help="Key (PEM) for TLS."),
    ] = None,
    log_format: Annotated[
        str,
        typer.Option(metavar="FORMAT", help="text, or json: a line each.", autocompletion=log_formats),
    ] = "text",
    log_requests: Annotated[bool, typer.Option("--log-requests", help="Log every request.")] = False,
) -> None:
    """Serve models over HTTP and gRPC.

    Speaks the Open Inference Protocol (KServe V2), with JSON, binary tensors and gRPC, joins requests into
    batches, and shows what it does at / and /metrics. SIGTERM lets it finish what is in flight.

    Examples:

    One model, on this machine:

        lmkan-deploy serve model.onnx

    A folder of models for a load balancer:

        lmkan-deploy serve --models /srv/models --host 0.0.0.0 --watch 5

    Many small requests:

        lmkan-deploy serve model.onnx --workers 4 --max-delay-us 200
    """
    from lmkan_deploy.serving.server import require_packages

    require_packages()
    from lmkan_deploy.serving.batching import BatchingOptions
    from lmkan_deploy.serving.options import ServerOptions, available_cores
    from lmkan_deploy.serving.server import serve as run_server

    if log_format not in ("text", "json"):
        raise InputError(f"expected a --log-format of text or json, found {log_format!r}")
    options = ServerOptions(
        models=_named_models(model_files or [], model or []),
        folder=models,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port if grpc else None,
        processes=workers,
        threads=threads or max(1, available_cores() // workers),
        runtime=runtime,  # type: ignore[arg-type]
        device=device,
        plugin=plugin,
        cuda_graphs=cuda_graphs,
        batching=BatchingOptions(max_batch, max_delay_us * 1e-6, max_queue),
        timeout=timeout or None,
        max_body=max_body_mb << 20,
        max_connections=max_connections,
        grace=grace,
        watch=watch,
        token=_token(token_file),
        tls_certificate=tls_cert,
        tls_key=tls_key,
        json_logs=log_format == "json",
        log_requests=log_requests,
    )
    code = run_server(options, announce=lambda line: typer.echo(line, err=True))
    if code:
        raise typer.Exit(code)


def _named_models(files: list[Path], named: list[str]) -> dict[str, Path]:
    pairs = [(file.name if file.is_dir() else file.stem, file) for file in files]
    for text in named:
        name, equals, place = text.partition("=")
        if not (name and equals and place):
            raise InputError(f"expected NAME=PATH with --model, found {text!r}")
        pairs.append((name, Path(place)))
    found: dict[str, Path] = {}
    for name, file in pairs:
        if name in found:
            raise InputError(f"expected a name for each model, found {name} twice; pass --model NAME=PATH")
        found[name] = file.resolve()
    return found


def _token(file: Path | None) -> str | None:
    """The token, never from the command line, which other users of the machine can read."""
    if file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"expected a token in {file}, could not read it: {error}") from error
    if not token or not token.isascii() or any(character.isspace() for character in token):
        raise InputError(
            f"expected one word of ASCII characters as the token in {file}, found something else"
        )
    return token
