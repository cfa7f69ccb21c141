"""Runs the command line in processes that have PyTorch and its exporter imported.

`cli` starts one process, which imports them and forks for each call: a call is a process of its own, without the
five seconds of imports. Not ONNX Runtime, whose own threads would be missing in a fork.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

TIMEOUT_SECONDS = 300


def cli(
    *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `lmkan-deploy` with some arguments, in a folder and an environment.

    What the interpreter itself does with the environment and with its streams is that of the first call.
    """
    command = list(map(str, arguments))
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        call = {"arguments": command, "cwd": str(cwd or Path.cwd()), "env": dict(env or os.environ)}
        server = _server()
        socket.send_fds(server, [json.dumps(call).encode()], [stdout.fileno(), stderr.fileno()])
        returncode = json.loads(server.recv(100))
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(command, returncode, stdout.read(), stderr.read())


def fresh_cli(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """The same in a new interpreter; options are those of `subprocess.run`."""
    command = [sys.executable, "-m", "lmkan_deploy.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False, **options
    )


@functools.cache
def _server() -> socket.socket:
    """The forking process, which ends with this one."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with there:
        subprocess.Popen([sys.executable, __file__, str(there.fileno())], pass_fds=[there.fileno()])
    return here


def _serve(connection: socket.socket) -> None:
    """Forks for each call that arrives, until the other side ends; returns in the forked processes alone."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 2)
        if not message:
            sys.exit()
        child = os.fork()
        if child == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)
        _, status = os.waitpid(child, 0)
        connection.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())
    connection.close()
    call = json.loads(message)
    signal.alarm(TIMEOUT_SECONDS)
    for target, descriptor in zip((1, 2), descriptors, strict=True):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(call["cwd"])
    os.environ.clear()
    os.environ.update(call["env"])
    sys.argv[1:] = call["arguments"]


if __name__ == "__main__":
    import onnx_ir  # noqa: F401
    import torch._dynamo
    import torch.export._trace
    import torch.onnx._internal.exporter._fx_passes  # noqa: F401

    from exporter_functions import remember

    remember(now=True)
    gc.freeze()  # collections of a fork would copy all of it
    _serve(socket.socket(fileno=int(sys.argv[1])))

    from lmkan_deploy.cli import main

    main()
