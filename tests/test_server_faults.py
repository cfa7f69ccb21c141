"""What a server survives: killed processes, signals, vanishing clients and files, and nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lmkan_deploy
from lmkan_deploy.serving.batching import BatchingOptions
from lmkan_deploy.serving.errors import ServingError
from lmkan_deploy.serving.json_codec import parse_request
from lmkan_deploy.serving.metrics import Metrics
from lmkan_deploy.serving.models import ModelStore
from networks import ExportedStack, make_stack
from served import Served, json_request

X = np.linspace(-1, 1, 10, dtype=np.float32)[None]


class Load:
    """Clients that send requests over kept connections, one after the other, and count the outcomes.

    A request that never reached the server (connection refused, or a kept connection that was closed before
    anything was sent) is sent again, as HTTP clients and load balancers do.
    """

    def __init__(self, server: Served | int, allowed: list[np.ndarray], clients: int = 8) -> None:
        self.right = self.wrong = self.lost = self.refused = 0
        self._port = server if isinstance(server, int) else server.http_port
        self._allowed = allowed
        self._body = json.dumps(json_request(X))
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._client) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.reach(100)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def reach(self, more: int) -> None:
        """Returns after as many right answers more."""
        goal, deadline = self.right + more, time.monotonic() + 30
        while self.right < goal:
            assert time.monotonic() < deadline, (self.right, self.wrong, self.lost, self.refused)
            time.sleep(0.005)

    def _client(self) -> None:
        connection = None
        while not self._stop.is_set():
            outcome = "lost"
            try:
                if connection is None:
                    connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=20)
                    try:
                        connection.connect()
                    except OSError:
                        outcome = "refused"
                        raise
                connection.request("POST", "/v2/models/net/infer", self._body)
                response = connection.getresponse()
                content = response.read()
                outcome = "wrong"
                if response.status == 200:
                    y = np.array(json.loads(content)["outputs"][0]["data"], np.float32)
                    if any(np.allclose(y, allowed, rtol=1e-4, atol=1e-4) for allowed in self._allowed):
                        outcome = "right"
                if response.will_close:
                    connection.close()
                    connection = None
            except (OSError, http.client.HTTPException):
                connection = None
                if outcome == "refused":
                    time.sleep(0.02)
            with self._lock:
                setattr(self, outcome, getattr(self, outcome) + 1)


@pytest.fixture(scope="module")
def answer(stack: ExportedStack) -> np.ndarray:
    return lmkan_deploy.run(stack.onnx, {"x": X})["y"][0]


def other_network(folder: Path) -> tuple[Path, np.ndarray]:
    """Another network with the same inputs and outputs, and its answer."""
    torch.save(make_stack(10, 24, 7, seed=1).state_dict(), folder / "other.pt")
    lmkan_deploy.export(folder / "other.pt", folder / "other.onnx")
    return folder / "other.onnx", lmkan_deploy.run(folder / "other.onnx", {"x": X})["y"][0]


# --- Processes and signals ---------------------------------------------------------------------------


def test_a_killed_worker_is_replaced_and_the_others_serve(stack: ExportedStack, answer: np.ndarray) -> None:
    with Served("--model", f"net={stack.onnx}", "--workers", 2, "--threads", 1) as server:
        assert len(server.workers()) == 2
        with Load(server, [answer]) as load:
            victim = server.workers()[0]
            os.kill(victim, signal.SIGKILL)
            load.reach(200)
            server.wait_for(lambda: len(server.workers()) == 2 and victim not in server.workers())
            server.wait_for(lambda: server.log.count("is ready") == 3)
            load.reach(200)
        assert load.wrong == 0
        assert load.lost <= 8  # at most what each client had in flight
        assert "(pid" in server.log
        assert "starting another" in server.log
        assert server.stop() == 0


def failing_server(stack: ExportedStack, flag: Path, *arguments: object) -> Served:
    """Its model can't run while the flag exists."""
    more = {"PYTHONPATH": str(Path(__file__).parent), "RUNS_FAIL": str(flag)}
    return Served(
        "--model", f"net={stack.onnx}", "--threads", 1, *arguments, program=("failing_cli",), **more
    )


def test_a_model_that_fails_for_a_while_is_not_ready(
    stack: ExportedStack, answer: np.ndarray, tmp_path: Path
) -> None:
    flag = tmp_path / "fails"
    with failing_server(stack, flag) as server:
        flag.touch()
        status, content, _ = server.request("/v2/models/net/infer", json_request(X))
        assert (status, content["error"]) == (
            400,
            "an illegal memory access was encountered",
        )
        server.wait_for(lambda: server.request("/v2/health/ready")[0] == 503)
        status, content, _ = server.request("/v2/models/net/infer", json_request(X))
        assert status == 503
        assert "model net is not ready: it fails on every input: an illegal memory" in content["error"]
        assert server.request("/v2/models/net/ready")[0] == 503
        assert server.request("/v2/health/live")[0] == 200
        (entry,) = server.request("/v2/repository/index", {})[1]
        assert entry["state"] == "UNAVAILABLE"
        assert "an illegal memory" in entry["reason"]
        (model,) = server.request("/status.json")[1]["models"]
        assert (model["state"], model["problem"]) == ("failing", "an illegal memory access was encountered")
        flag.unlink()
        server.wait_for(lambda: server.request("/v2/health/ready")[0] == 200)
        np.testing.assert_allclose(server.infer("net", X)[0], answer, rtol=1e-4, atol=1e-4)
        assert "model net: runs again" in server.log
        assert server.stop() == 0


def test_requests_of_networks_whose_rows_depend_on_each_other_run_alone(
    stack: ExportedStack, tmp_path: Path
) -> None:
    tensors = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", 3]) for n in "xy"]
    nodes = [
        onnx.helper.make_node("ReduceMean", ["x", "axes"], ["mean"]),
        onnx.helper.make_node("Sub", ["x", "mean"], ["y"]),
    ]
    axes = onnx.numpy_helper.from_array(np.array([0]), "axes")
    graph = onnx.helper.make_graph(nodes, "centred", tensors[:1], tensors[1:], [axes])
    opsets = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")

    async def test() -> None:
        sources = {"centred": tmp_path / "m.onnx", "net": stack.onnx}
        store = ModelStore(sources, options=BatchingOptions(max_batch=4), metrics=Metrics())
        for name in sources:
            await store.load(name)
        assert store.get("net").batcher.joins
        requests = [np.random.default_rng(i).standard_normal((6, 3)).astype(np.float32) for i in range(3)]
        futures = [store.get("centred").submit({"x": x}) for x in requests]
        for x, answer in zip(requests, await asyncio.gather(*futures), strict=True):
            np.testing.assert_allclose(answer["y"], x - x.mean(0), rtol=1e-5, atol=1e-6)
        await store.close()

    asyncio.run(test())


def test_a_worker_whose_model_fails_for_good_is_replaced(
    stack: ExportedStack, answer: np.ndarray, tmp_path: Path
) -> None:
    flag = tmp_path / "fails"
    with failing_server(stack, flag, "--workers", 2) as server:
        flag.touch()
        server.wait_for(lambda: server.request("/v2/models/net/infer", json_request(X))[0] == 503)
        server.wait_for(lambda: "failed for 10 seconds" in server.log)
        flag.unlink()
        server.wait_for(lambda: "ended with 3; starting another" in server.log)
        server.wait_for(lambda: server.log.count("is ready") >= 3)
        server.wait_for(lambda: server.request("/v2/health/ready")[0] == 200)
        with Load(server, [answer]) as load:
            load.reach(100)
        assert load.wrong == 0
        assert server.stop() == 0


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_loses_nothing(
    stack: ExportedStack, answer: np.ndarray, workers: int, signal_number: int
) -> None:
    with (
        Served("--model", f"net={stack.onnx}", "--workers", workers, "--threads", 1) as server,
        Load(server, [answer]) as load,
    ):
        started = time.monotonic()
        assert server.stop(signal_number) == 0
        assert time.monotonic() - started < 10
        time.sleep(0.1)
    assert (load.wrong, load.lost) == (0, 0)
    assert load.refused > 0  # the port is closed


def test_a_stopping_server_is_not_ready_and_says_that_connections_end(
    stack: ExportedStack, tmp_path: Path
) -> None:
    with Served("--model", f"net={stack.onnx}", "--no-grpc") as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=5)
        connection.request("GET", "/v2/health/ready")
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b'{"ready":true}')
        server.process.terminate()
        server.wait_for(lambda: "no new connections" in server.log)
        connection.request("GET", "/v2/health/ready")
        response = connection.getresponse()
        assert response.status == 503
        assert response.headers["connection"] == "close"
        response.read()
        assert server.process.wait(10) == 0


def test_two_servers_behind_haproxy(stack: ExportedStack, answer: np.ndarray, tmp_path: Path) -> None:
    """Nobody notices that one of them is killed."""
    if shutil.which("haproxy") is None:
        pytest.skip("haproxy is not installed (Debian's package): the load balancer can't be tried here")
    text = (Path(__file__).parent.parent / "examples" / "haproxy" / "haproxy.cfg").read_text()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--model", f"net={stack.onnx}", "--no-grpc", "--threads", 1)
    with Served(*options) as one, Served(*options) as two:
        ports = {"8080": port, "8000": one.http_port, "8001": two.http_port}
        for name, number in ports.items():
            text = text.replace(f"127.0.0.1:{name}", f"127.0.0.1:{number}")
        (tmp_path / "haproxy.cfg").write_text(text)
        balancer = subprocess.Popen(["haproxy", "-f", tmp_path / "haproxy.cfg"])
        try:
            one.wait_for(lambda: reachable(port))
            with Load(port, [answer]) as load:
                load.reach(300)
                one.process.kill()
                load.reach(1000)
        finally:
            balancer.terminate()
            balancer.wait(20)
    assert (load.wrong, load.lost, load.refused) == (0, 0, 0)


def reachable(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False


# --- Clients -----------------------------------------------------------------------------------------


def raw(server: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.http_port), timeout=20)


def test_clients_that_are_slow_or_leave(stack: ExportedStack, answer: np.ndarray) -> None:
    body = json.dumps(json_request(X)).encode()
    head = f"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with Served("--model", f"net={stack.onnx}", "--no-grpc", "--max-delay-us", 1_000_000) as server:
        for part in (head[:20], head, head + body[:30]):
            client = raw(server)
            client.sendall(part)
            client.close()
        slow = raw(server)
        for byte in head + body:
            slow.sendall(bytes([byte]))
        leaving = [raw(server) for _ in range(20)]
        for client in leaving:
            client.sendall(head + body)
        time.sleep(0.05)
        for client in leaving:
            client.close()
        assert slow.recv(100).startswith(b"HTTP/1.1 200")
        np.testing.assert_allclose(server.infer("net", X)[0], answer, rtol=1e-4, atol=1e-4)
        status = server.request("/status.json")[1]["models"][0]
        assert status["queue_rows"] == 0
        assert status["rows"] < 20  # those who left gave up their places
        assert status["requests"] == status["rows"]
        assert status["requests"] + status["failed"] == 22
        assert "Traceback" not in server.log


# --- Models ------------------------------------------------------------------------------------------


def test_models_are_replaced_while_they_serve(
    stack: ExportedStack, answer: np.ndarray, tmp_path: Path
) -> None:
    other, other_answer = other_network(tmp_path)
    folder = tmp_path / "models" / "net"
    (folder / "1").mkdir(parents=True)
    shutil.copy(stack.onnx, folder / "1" / "model.onnx")
    with (
        Served("--models", tmp_path / "models", "--workers", 2, "--threads", 1) as server,
        Load(server, [answer, other_answer], clients=4) as load,
    ):
        load_path = "/v2/repository/models/net/load"
        (folder / "2").mkdir()
        (folder / "2" / "model.onnx").write_bytes(other.read_bytes()[:5000])
        status, problem, _ = server.request(load_path, {})
        assert status == 500
        assert "damaged" in problem["error"]
        for _ in range(8):  # whichever process answers
            np.testing.assert_allclose(server.infer("net", X)[0], answer, rtol=1e-4, atol=1e-4)
        assert server.request("/v2/health/ready")[0] == 200

        shutil.copy(other, folder / "2" / "model.onnx")
        assert server.request(load_path, {})[0] == 200
        for _ in range(8):
            np.testing.assert_allclose(server.infer("net", X)[0], other_answer, rtol=1e-4, atol=1e-4)
            status, found, _ = server.request("/v2/models/net/versions/1/infer", json_request(X))
            np.testing.assert_allclose(found["outputs"][0]["data"], answer, rtol=1e-4, atol=1e-4)

        shutil.copy(stack.onnx, tmp_path / "models" / "later.onnx")
        assert server.request("/v2/models/later")[0] == 404
        assert server.request("/v2/repository/models/later/load", {})[0] == 200
        assert all(server.infer("later", X).shape == (1, 7) for _ in range(8))
        assert server.request("/v2/repository/models/later/unload", {})[0] == 200
        for _ in range(8):
            assert server.request("/v2/models/later/infer", json_request(X))[0] == 503
        states = {m["name"]: m["state"] for m in server.request("/v2/repository/index", {})[1]}
        assert states == {"net": "READY", "later": "UNAVAILABLE"}
    assert (load.wrong, load.lost) == (0, 0)


def test_watched_files(stack: ExportedStack, answer: np.ndarray, tmp_path: Path) -> None:
    other, other_answer = other_network(tmp_path)
    model = tmp_path / "net.onnx"
    shutil.copy(stack.onnx, model)
    with (
        Served(model, "--no-grpc", "--watch", 0.1) as server,
        Load(server, [answer, other_answer], 2) as load,
    ):
        model.write_bytes(model.read_bytes()[:3000])  # cut short
        server.wait_for(lambda: "could not load" in server.log)
        np.testing.assert_allclose(server.infer("net", X)[0], answer, rtol=1e-4, atol=1e-4)
        model.unlink()
        time.sleep(0.3)
        np.testing.assert_allclose(server.infer("net", X)[0], answer, rtol=1e-4, atol=1e-4)
        shutil.copy(other, tmp_path / "new")
        (tmp_path / "new").replace(model)
        server.wait_for(lambda: server.log.count("serving version") == 2)
        np.testing.assert_allclose(server.infer("net", X)[0], other_answer, rtol=1e-4, atol=1e-4)
    assert (load.wrong, load.lost) == (0, 0)


def test_external_data_may_vanish(stack: ExportedStack, answer: np.ndarray, tmp_path: Path) -> None:
    """ONNX Runtime would map the file into memory, and end with a bus error once it is cut short."""
    model = tmp_path / "net.onnx"
    lmkan_deploy.export(stack.checkpoint, model, external_data=True)
    data = tmp_path / "net.onnx.data"
    assert data.is_file()
    with Served(model, "--no-grpc") as server:
        with data.open("r+b") as file:
            file.truncate(0)
        data.unlink()
        for _ in range(20):
            np.testing.assert_allclose(server.infer("net", X)[0], answer, rtol=1e-4, atol=1e-4)


def test_a_full_queue(stack: ExportedStack) -> None:
    options = ("--no-grpc", "--max-batch", 4, "--max-queue", 4, "--max-delay-us", 1_000_000)
    with Served("--model", f"net={stack.onnx}", *options) as server:
        answers: list[int] = []

        def send(count: int) -> None:
            answers.append(server.request("/v2/models/net/infer", json_request(X.repeat(count, 0)))[0])

        threads = [threading.Thread(target=send, args=(count,)) for count in (3, 3, 3)]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        for thread in threads:
            thread.join()
        assert sorted(answers) == [200, 429, 429]
        status, problem, headers = server.request("/v2/models/net/infer", json_request(X.repeat(5, 0)))
        assert (status, headers["retry-after"]) == (429, "1")
        assert "at most 4 rows in the queue" in problem["error"]


def test_too_many_connections(stack: ExportedStack) -> None:
    with Served("--model", f"net={stack.onnx}", "--no-grpc", "--max-connections", 3) as server:
        idle = [raw(server) for _ in range(3)]
        time.sleep(0.1)
        assert server.request("/v2/health/ready")[0] == 503
        for client in idle:
            client.close()
        server.wait_for(lambda: server.request("/v2/health/ready")[0] == 200)


# --- Nonsense ----------------------------------------------------------------------------------------

VALID = json.dumps(json_request(X)).encode()


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(-10, 300)), st.integers(0, len(VALID)))
def test_random_bytes_are_refused_in_words(noise: bytes, length: int | None, place: int) -> None:
    for body in (noise, VALID[:place] + noise + VALID[place:]):
        with contextlib.suppress(ServingError):  # and nothing else
            parse_request(body, length)


@settings(deadline=None, max_examples=300)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "inputs",
                        "outputs",
                        "name",
                        "shape",
                        "datatype",
                        "data",
                        "parameters",
                        "binary_data_size",
                        "id",
                    ]
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=25,
    )
)
def test_random_json_is_refused_in_words(value: object) -> None:
    text = json.dumps(value, allow_nan=False, default=str) if _finite(value) else "{}"
    with contextlib.suppress(ServingError):
        parse_request(text.encode(), None)


def _finite(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def test_nonsense_on_both_ports(stack: ExportedStack, answer: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    with Served("--model", f"net={stack.onnx}") as server:
        for port in (server.http_port, server.grpc_port):
            for size in (1, 10, 1000, 100_000):
                with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                    client.sendall(rng.bytes(size))
        np.testing.assert_allclose(server.infer("net", X)[0], answer, rtol=1e-4, atol=1e-4)
        assert "Traceback" not in server.log


def test_the_description_holds(stack: ExportedStack) -> None:
    """schemathesis sends what the OpenAPI description allows, and more; answers must be as it says."""
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    from lmkan_deploy.serving.description import openapi

    with Served("--model", f"net={stack.onnx}", "--no-grpc") as server:
        schema = schemathesis.openapi.from_dict(openapi())
        count = 0

        for operation in schema.get_all_operations():
            endpoint = operation.ok()
            if endpoint.path.endswith("/unload"):
                continue

            @settings(max_examples=25, deadline=None, database=None)
            @given(case=endpoint.as_strategy())
            def check(case: schemathesis.Case) -> None:
                nonlocal count
                count += 1
                response = case.call(base_url=server.url)
                assert response.status_code < 500 or response.status_code in (501, 503), response.text
                # A schema can't say which inputs a model has, and 501 and 503 are answers too.
                case.validate_response(
                    response, excluded_checks=[not_a_server_error, positive_data_acceptance]
                )

            check()
        assert count > 100
        assert server.request("/v2/health/live")[0] == 200
        assert "Traceback" not in server.log
