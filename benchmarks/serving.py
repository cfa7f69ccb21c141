"""Requests a second and latency of the server, against a bare uvicorn echo of the same payload.

Usage: serving.py OUTPUT.md [SECONDS]

Needs wrk (Debian's package). Server, echo and wrk share this machine's cores; echo and server take turns.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import lmkan_deploy
from lmkan_deploy.nn import LMKAN2DLayer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from served import Served

ECHO = """
async def app(scope, receive, send):
    message = await receive()
    body = message["body"]
    while message.get("more_body"):
        message = await receive()
        body += message["body"]
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
"""
ECHO_PORT = 18080
TURNS = 5
NETWORKS = {"128→64→10": (128, 64, 10), "128→256→256→1": (128, 256, 256, 1)}
NUM_GRIDS = 12


@dataclass
class Result:
    """What wrk says."""

    requests_a_second: float
    p50: float  # seconds
    p99: float


def export_network(widths: Sequence[int], folder: Path) -> Path:
    """A network with random tables."""
    torch.manual_seed(0)
    layers = []
    for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
        layers.append(LMKAN2DLayer(NUM_GRIDS, n_in, n_out))
        torch.nn.init.normal_(layers[-1].func_parameter, std=n_in**-0.5)
    torch.save(torch.nn.Sequential(*layers).state_dict(), folder / "net.pt")
    return lmkan_deploy.export(folder / "net.pt", folder / "net.onnx").path


def write_request(path: Path, rows: int, binary: bool) -> None:
    """A script that makes wrk send `rows` rows of random floats."""
    x = np.random.default_rng(0).standard_normal((rows, 128), dtype=np.float32)
    tensor: dict[str, object] = {"name": "x", "shape": [rows, 128], "datatype": "FP32"}
    headers = {"Content-Type": "application/json"}
    if binary:
        tensor["parameters"] = {"binary_data_size": x.nbytes}
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(head)),
        }
        body = head + x.tobytes()
    else:
        body = json.dumps({"inputs": [tensor | {"data": [round(float(v), 6) for v in x.ravel()]}]}).encode()
    lines = ['wrk.method = "POST"', 'wrk.body = "' + "".join(f"\\{byte:03d}" for byte in body) + '"']
    lines += [f'wrk.headers["{name}"] = "{value}"' for name, value in headers.items()]
    path.write_text("\n".join(lines))


def wrk(url: str, script: Path, connections: int, seconds: float) -> Result:
    """One run; fails where an answer is an error."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", "-s", str(script), url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Non-2xx" not in text, text
    units = {"us": 1e-6, "ms": 1e-3, "s": 1.0}

    def latency(percent: str) -> float:
        value, unit = re.search(rf"{percent}%\s+([\d.]+)(us|ms|s)", text).groups()  # type: ignore[union-attr]
        return float(value) * units[unit]

    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", text).group(1))  # type: ignore[union-attr]
    return Result(rate, latency("50"), latency("99"))


def median(results: Sequence[Result]) -> Result:
    """Of each figure."""
    columns = zip(*[(r.requests_a_second, r.p50, r.p99) for r in results], strict=True)
    return Result(*[statistics.median(column) for column in columns])


def session_seconds(model: Path, rows: int) -> float:
    """Median time of the same session in a loop, on all cores."""
    runner = lmkan_deploy.load_runner(model)
    x = np.random.default_rng(0).standard_normal((rows, 128), dtype=np.float32)
    times = []
    for _ in range(300):
        started = time.perf_counter()
        runner.run({"x": x})
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def resident_megabytes(server: Served) -> float:
    """Memory of the server's process."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1000  # type: ignore[union-attr]


def compare(model: Path, folder: Path, seconds: float, arguments: Sequence[object]) -> list[str]:
    """Rows of the table for one network and one way to start the server."""
    rows = []
    name = " ".join(map(str, arguments)) or "1 process"
    with Served("--model", f"net={model}", "--no-grpc", *arguments) as server:
        url = f"{server.url}/v2/models/net/infer"
        for kind in ("json", "binary"):
            script = folder / f"{kind}-1.lua"
            pairs = [
                (wrk(f"http://127.0.0.1:{ECHO_PORT}/", script, 32, seconds), wrk(url, script, 32, seconds))
                for _ in range(TURNS)
            ]
            echo, served = median([a for a, _ in pairs]), median([b for _, b in pairs])
            ratios = sorted(b.requests_a_second / a.requests_a_second for a, b in pairs)
            rows.append(
                f"| {name} | {kind}, 32 clients | {served.requests_a_second:.0f} | {echo.requests_a_second:.0f} "
                f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) "
                f"| {served.p50 * 1e3:.2f} | {served.p99 * 1e3:.2f} | {served.p99 / served.p50:.1f} |"
            )
    return rows


def batches(model: Path, folder: Path, seconds: float) -> list[str]:
    """64 rows a request against the session alone, and what a lone request waits for."""
    loop, one = session_seconds(model, 64), session_seconds(model, 1)
    with Served("--model", f"net={model}", "--no-grpc") as server:
        url = f"{server.url}/v2/models/net/infer"
        many = median([wrk(url, folder / "binary-64.lua", 8, seconds) for _ in range(TURNS)])
        lone = median([wrk(url, folder / "binary-1.lua", 1, seconds) for _ in range(TURNS)])
    rate = many.requests_a_second * 64
    return [
        f"- 64 rows a request, binary, 8 clients: {rate:,.0f} rows/s, {rate * loop / 64:.2f} of the session in a "
        f"loop ({64 / loop:,.0f} rows/s).",
        f"- one client, one row, binary: p50 {lone.p50 * 1e3:.3f} ms; the session: {one * 1e3:.3f} ms.",
    ]


def memory(model: Path, folder: Path, requests: int) -> str:
    """Resident memory over many requests."""
    with Served("--model", f"net={model}", "--no-grpc") as server:
        url = f"{server.url}/v2/models/net/infer"
        script = folder / "binary-1.lua"
        wrk(url, script, 32, 5)
        found, sent = [resident_megabytes(server)], 0.0
        while sent < requests:
            sent += wrk(url, script, 32, 10).requests_a_second * 10
            found.append(resident_megabytes(server))
    return (
        f"- memory over {sent:,.0f} requests: {found[0]:.1f} MB after the first 5 s, then {min(found):.1f} to "
        f"{max(found):.1f} MB."
    )


def main() -> None:
    """Command line."""
    output, seconds = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 3.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "echo.py").write_text(ECHO)
        for rows, binary in ((1, False), (1, True), (64, True)):
            write_request(folder / f"{'binary' if binary else 'json'}-{rows}.lua", rows, binary)
        echo = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "echo:app", "--port", str(ECHO_PORT), "--no-access-log",
             "--log-level", "warning"], cwd=folder,
        )  # fmt: skip
        time.sleep(2)
        parts = []
        try:
            for label, widths in NETWORKS.items():
                model = export_network(widths, folder)
                parts += [
                    f"## {label}, G = {NUM_GRIDS}",
                    "| server | payload | requests/s | echo | server / echo | p50, ms | p99, ms | p99 / p50 |\n"
                    "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
                    + "\n".join(
                        [
                            *compare(model, folder, seconds, ["--threads", 1]),
                            *compare(model, folder, seconds, ["--workers", 2]),
                        ]
                    ),
                    "\n".join(batches(model, folder, seconds)),
                ]
            parts.append(memory(model, folder, 1_000_000))
        finally:
            echo.terminate()
    text = "\n\n".join(parts) + "\n"
    output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
