"""A server in a process of its own, as a user starts it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Served:
    """`lmkan-deploy serve` on free ports; `program` is what follows `python -m`."""

    def __init__(
        self,
        *arguments: object,
        tls: bool = False,
        program: Sequence[object] = ("lmkan_deploy.cli",),
        **environment: str,
    ) -> None:
        ports = ["--http-port", "0", "--grpc-port", "0"]
        command = [sys.executable, "-m", *map(str, program), "serve", *ports]
        self.process = subprocess.Popen(
            [*command, *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.http_port = int(self._find(r"HTTP +https?://[^ ]+:(\d+)"))
        self.grpc_port = 0 if "--no-grpc" in arguments else int(self._find(r"gRPC +[^ ]+:(\d+)"))
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.http_port}"

    def __enter__(self) -> Served:
        try:
            self.wait_until_ready()
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def wait_until_ready(self, processes: int = 1) -> None:
        count = int(self._find(r"runs in +(\d+) process"))
        self.wait_for(lambda: len(re.findall(r"process \d+ is ready", self.log)) >= count, 60)

    def wait_for(self, condition: Any, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None or condition(), self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        self.process.send_signal(signal_number)
        return self.process.wait(60)

    def workers(self) -> list[int]:
        """Process numbers of the worker processes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def request(
        self, path: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON or text, headers."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                status, content, found = response.status, response.read(), response.headers
        except urllib.error.HTTPError as error:
            status, content, found = error.code, error.read(), error.headers
        is_json = found.get("content-type") == "application/json"
        return status, json.loads(content) if is_json else content, {k.lower(): v for k, v in found.items()}

    def infer(self, name: str, x: np.ndarray) -> np.ndarray:
        """The answer as JSON."""
        status, answer, _ = self.request(f"/v2/models/{name}/infer", json_request(x))
        assert status == 200, answer
        (output,) = answer["outputs"]
        return np.array(output["data"], np.float32).reshape(output["shape"])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def _find(self, pattern: str) -> str:
        deadline = time.monotonic() + 60
        while (match := re.search(pattern, self.log)) is None:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)
        return match.group(1)


def json_request(x: np.ndarray, **more: Any) -> dict[str, Any]:
    """A request with one input as numbers."""
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}
    return {"inputs": [tensor], **more}
