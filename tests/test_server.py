"""The server as real clients meet it.

Optional: LMKAN_KSERVE_VENV, a virtual environment with `kserve`, whose requirements contradict this package's.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.grpc.aio as grpc_aio_client
import tritonclient.http as http_client
import tritonclient.http.aio as http_aio_client
from onnx import TensorProto, helper, save
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

import lmkan_deploy
from lmkan_deploy.runtime.axis_limits import AxisLimits, note_limits
from networks import ExportedStack
from served import Served, json_request

RNG = np.random.default_rng(0)


def make_rows(count: int) -> np.ndarray:
    return RNG.standard_normal((count, 10), dtype=np.float32)


@pytest.fixture(scope="module")
def server(stack: ExportedStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    types = tmp_path_factory.mktemp("types") / "types.onnx"
    save_types_model(types)
    save_image_model(types.parent / "images.onnx")
    models = ("--model", f"net={stack.onnx}", types, types.parent / "images.onnx")
    with Served(*models, "--max-batch", 64, "--max-body-mb", 1) as served:
        yield served


def save_types_model(path: Path) -> None:
    """Passes tensors of every type through, and takes a matrix of any size beside the batch."""
    dtypes = {"FLOAT16", "FLOAT", "DOUBLE", "INT8", "INT16", "INT32", "INT64", "UINT8", "BOOL"}
    nodes, inputs, outputs = [], [], []
    for dtype in sorted(dtypes):
        value = getattr(TensorProto, dtype)
        nodes.append(helper.make_node("Identity", [f"in_{dtype}"], [f"out_{dtype}"]))
        inputs.append(helper.make_tensor_value_info(f"in_{dtype}", value, ["batch", "size"]))
        outputs.append(helper.make_tensor_value_info(f"out_{dtype}", value, ["batch", "size"]))
    graph = helper.make_graph(nodes, "types", inputs, outputs)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def save_image_model(path: Path) -> None:
    """Takes images of even sizes, as its metadata says."""
    nodes = [
        helper.make_node("SpaceToDepth", ["x"], ["patches"], blocksize=2),
        helper.make_node("GlobalAveragePool", ["patches"], ["means"]),
        helper.make_node("Flatten", ["means"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, "height", "width"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 12])
    graph = helper.make_graph(nodes, "images", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    even = AxisLimits(2, None, 2)
    metadata: dict[str, str] = {}
    note_limits(metadata, {"height": even, "width": even})
    helper.set_model_props(model, metadata)
    save(model, path)


@pytest.fixture(scope="module")
def expected(stack: ExportedStack):
    runner = lmkan_deploy.load_runner(stack.onnx)
    return lambda x: runner.run({"x": x})["y"]


# --- Clients -----------------------------------------------------------------------------------------


def test_kserve_client(server: Served, expected, tmp_path: Path) -> None:
    venv = os.environ.get("LMKAN_KSERVE_VENV")
    if not venv:
        pytest.skip("LMKAN_KSERVE_VENV is not set: no KServe client")
    x = make_rows(3)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", expected(x))
    script = Path(__file__).parent / "kserve_client.py"
    command = [
        Path(venv) / "bin/python",
        script,
        server.url,
        f"127.0.0.1:{server.grpc_port}",
        "net",
        "x.npy",
        "y.npy",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def make_inputs(client, x: np.ndarray, **options):
    tensor = client.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x, **options)
    return [tensor]


def test_images_of_the_sizes_that_a_model_takes(server: Served) -> None:
    with http_client.InferenceServerClient(f"127.0.0.1:{server.http_port}") as client:
        for batch, height, width in ((1, 2, 4), (5, 6, 2)):
            x = RNG.standard_normal((batch, 3, height, width), dtype=np.float32)
            y = client.infer("images", make_inputs(http_client, x)).as_numpy("y")
            np.testing.assert_allclose(y.reshape(batch, 4, 3).mean(1), x.mean((2, 3)), rtol=1e-5, atol=1e-6)
        with pytest.raises(InferenceServerException, match=r"with width in multiples of 2, found shape"):
            client.infer("images", make_inputs(http_client, np.zeros((1, 3, 4, 5), np.float32)))


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("count", [0, 1, 7, 200])
def test_triton_client_http(server: Served, expected, binary: bool, count: int) -> None:
    x = make_rows(count)
    with http_client.InferenceServerClient(f"127.0.0.1:{server.http_port}") as client:
        outputs = [http_client.InferRequestedOutput("y", binary_data=binary)]
        result = client.infer(
            "net",
            make_inputs(http_client, x, binary_data=binary),
            outputs=outputs,
            request_id="me",
        )
        np.testing.assert_allclose(result.as_numpy("y"), expected(x), rtol=1e-5, atol=1e-5)
        assert result.get_response()["id"] == "me"


@pytest.mark.parametrize("count", [0, 1, 7, 200])
def test_triton_client_grpc(server: Served, expected, count: int) -> None:
    x = make_rows(count)
    with grpc_client.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        result = client.infer("net", make_inputs(grpc_client, x), request_id="me", client_timeout=10)
        np.testing.assert_allclose(result.as_numpy("y"), expected(x), rtol=1e-5, atol=1e-5)
        assert result.get_response().id == "me"


def test_asynchronous_clients(server: Served, expected) -> None:
    xs = [make_rows(count) for count in (1, 5, 3)]

    async def test() -> None:
        async with (
            http_aio_client.InferenceServerClient(f"127.0.0.1:{server.http_port}") as http,
            grpc_aio_client.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as grpc,
        ):
            answers = await asyncio.gather(
                *[http.infer("net", make_inputs(http_client, x)) for x in xs],
                *[grpc.infer("net", make_inputs(grpc_client, x)) for x in xs],
            )
        for x, answer in zip(xs * 2, answers, strict=True):
            np.testing.assert_allclose(answer.as_numpy("y"), expected(x), rtol=1e-5, atol=1e-5)

    asyncio.run(test())


def test_stream_of_requests(server: Served, expected) -> None:
    found, done = [], threading.Event()

    def callback(result, error) -> None:
        found.append((result, error))
        if len(found) == 3:
            done.set()

    with grpc_client.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        client.start_stream(callback)
        x = make_rows(2)
        client.async_stream_infer("net", make_inputs(grpc_client, x))
        client.async_stream_infer("unknown", make_inputs(grpc_client, x))
        client.async_stream_infer("net", make_inputs(grpc_client, x))
        assert done.wait(10)
        client.stop_stream()
    np.testing.assert_allclose(found[0][0].as_numpy("y"), expected(x), rtol=1e-5, atol=1e-5)
    assert "unknown" in str(found[1][1])
    np.testing.assert_allclose(found[2][0].as_numpy("y"), expected(x), rtol=1e-5, atol=1e-5)


def test_every_type(server: Served) -> None:
    arrays = {
        "FLOAT16": np.array([[1.5, -2, np.inf]], np.float16),
        "FLOAT": np.array([[1.5, -2, np.nan]], np.float32),
        "DOUBLE": np.array([[1e300, -2, 0]], np.float64),
        "INT8": np.array([[-128, 127, 0]], np.int8),
        "INT16": np.array([[-32768, 32767, 0]], np.int16),
        "INT32": np.array([[-(2**31), 2**31 - 1, 0]], np.int32),
        "INT64": np.array([[-(2**63), 2**63 - 1, 0]], np.int64),
        "UINT8": np.array([[0, 255, 1]], np.uint8),
        "BOOL": np.array([[True, False, True]]),
    }
    names = {"FLOAT16": "FP16", "FLOAT": "FP32", "DOUBLE": "FP64"}
    for module, port in ((http_client, server.http_port), (grpc_client, server.grpc_port)):
        with module.InferenceServerClient(f"127.0.0.1:{port}") as client:
            inputs = []
            for dtype, array in arrays.items():
                inputs.append(module.InferInput(f"in_{dtype}", [1, 3], names.get(dtype, dtype)))
                inputs[-1].set_data_from_numpy(array)
            result = client.infer("types", inputs)
            for dtype, array in arrays.items():
                found = result.as_numpy(f"out_{dtype}")
                assert found.dtype == array.dtype
                np.testing.assert_array_equal(found, array)
    status, answer, _ = server.request(
        "/v2/models/types/infer",
        {
            "inputs": [
                {
                    "name": f"in_{dtype}",
                    "datatype": names.get(dtype, dtype),
                    "shape": [1, 3],
                    "data": [[0, 1, 1]] if dtype != "BOOL" else [False, True, True],
                }
                for dtype in arrays
            ],
            "outputs": [{"name": "out_INT64"}, {"name": "out_BOOL"}],
        },
    )
    assert status == 200
    assert [output["name"] for output in answer["outputs"]] == ["out_INT64", "out_BOOL"]
    assert [output["data"] for output in answer["outputs"]] == [[0, 1, 1], [False, True, True]]


def test_metadata(server: Served) -> None:
    with (
        http_client.InferenceServerClient(f"127.0.0.1:{server.http_port}") as http,
        grpc_client.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as grpc,
    ):
        for client in (http, grpc):
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.is_model_ready("net")
            assert client.is_model_ready("net", "1")
            assert not client.is_model_ready("nothing")
        metadata = http.get_model_metadata("net")
        assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 10]}]
        assert metadata["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 7]}]
        assert metadata["versions"] == ["1"]
        assert grpc.get_model_metadata("net", as_json=True)["inputs"][0]["shape"] == ["-1", "10"]
        assert http.get_server_metadata()["name"] == "lmkan-deploy"
        assert "binary_tensor_data" in http.get_server_metadata()["extensions"]
        config = http.get_model_config("net")
        assert config["max_batch_size"] == 64
        assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [10]}]
        assert grpc.get_model_config("net").config.output[0].dims == [7]
        names = {model["name"] for model in http.get_model_repository_index()}
        assert (
            names == {"net", "types", "images"} == {m.name for m in grpc.get_model_repository_index().models}
        )


def test_statistics_and_metrics_count(server: Served) -> None:
    def metrics() -> dict[tuple[str, str], float]:
        _, text, _ = server.request("/metrics")
        return {
            (sample.name, sample.labels.get("protocol", "")): sample.value
            for family in text_string_to_metric_families(text.decode())
            for sample in family.samples
            if sample.labels.get("model") == "net" and sample.labels.get("status") in (None, "200")
        }

    before = metrics()
    statistics = server.request("/v2/models/net/stats")[1]["model_stats"][0]
    for count in (1, 64, 65):  # the last one is split
        server.infer("net", make_rows(count))
    after = metrics()
    grown = {key: value - before.get(key, 0) for key, value in after.items()}
    assert grown["lmkan_rows_total", ""] == 130
    assert grown["lmkan_run_seconds_count", ""] == 4
    assert grown["lmkan_requests_total", "http"] == 3
    assert grown["lmkan_request_seconds_count", ""] == 3
    assert after["lmkan_queue_rows", ""] == 0
    now = server.request("/v2/models/net/stats")[1]["model_stats"][0]
    assert now["inference_count"] - statistics["inference_count"] == 130
    with grpc_client.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        (found,) = client.get_inference_statistics("net").model_stats
        assert found.inference_count == now["inference_count"]


def test_concurrent_requests_are_joined(server: Served, expected) -> None:
    before = server.request("/v2/models/net/stats")[1]["model_stats"][0]

    def send(index: int) -> bool:
        x = np.full((1, 10), index / 100, np.float32)
        return np.allclose(server.infer("net", x), expected(x), rtol=1e-4, atol=1e-4)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(send, range(400)))
    after = server.request("/v2/models/net/stats")[1]["model_stats"][0]
    runs = after["execution_count"] - before["execution_count"]
    assert after["inference_count"] - before["inference_count"] == 400
    assert runs < 400


# --- Mistakes ----------------------------------------------------------------------------------------

X = [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]


def one_input(**changes: object) -> dict[str, object]:
    tensor = {"name": "x", "shape": [1, 10], "datatype": "FP32", "data": [0.5] * 10}
    return {"inputs": [{**tensor, **changes}]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "JSON object"),
        (b"{", "JSON object"),
        (b"[1]", "found list"),
        (b'{"inputs": [{"name": "x", "shape": [1, 10], "datatype": "FP32", "data": [NaN]}]}', "bytes only"),
        ({}, "'inputs'"),
        ({"inputs": []}, "expected the inputs x, found none"),
        ({"inputs": [1]}, "list of objects"),
        (one_input(name=3), "text as the name"),
        (one_input(name="z"), "expected the inputs x, found z"),
        (one_input(datatype="FP64"), "float32"),
        (one_input(datatype="BYTES"), "datatype of FP16"),
        (one_input(datatype=None), "datatype of FP16"),
        (one_input(shape=[10]), "x float32"),
        (one_input(shape=[2, 10]), "expected 20 numbers"),
        (one_input(shape=[-1, 10]), "list of sizes"),
        (one_input(shape=[2**50, 10]), "list of sizes"),
        (one_input(shape="1x10"), "list of sizes"),
        (one_input(shape=[1] * 70, data=[1]), "shape that can be"),
        (one_input(shape=[0, 2**39, 2**39], data=[]), "shape that can be"),
        (one_input(data=["a"] * 10), "numbers of type float32"),
        (one_input(data=[[1], [2, 3]]), "numbers of type float32"),
        (one_input(data=[None] * 10), "numbers of type float32"),
        (one_input(data={"a": 1}), "numbers of type float32"),
        (one_input(data=[True] * 10), "numbers of type float32"),
        ({**one_input(), "outputs": [{"name": "z"}]}, "output of y, found 'z'"),
        ({**one_input(), "parameters": {"timeout": "1 s"}}, "microseconds"),
        ({**one_input(), "id": 3}, "id"),
        ({"inputs": one_input()["inputs"] * 2}, "twice"),  # type: ignore[operator]
        (one_input(parameters={"binary_data_size": 40}), "left of the body"),
    ],
)
def test_bad_json(server: Served, body: object, words: str) -> None:
    status, answer, headers = server.request("/v2/models/net/infer", body)
    assert status == 400, answer
    assert words in answer["error"], answer
    assert "\n" not in answer["error"]
    assert headers["x-request-id"]


@pytest.mark.parametrize(
    ("length", "rest", "words"),
    [
        ("-1", b"", "a number"),
        ("abc", b"", "a number"),
        ("1" * 30, b"", "a number"),
        ("999999", b"", "the body"),
        (None, b"\0" * 39, "left of the body"),
        (None, b"\0" * 41, "1 bytes more"),
        ("5", b"", "JSON object"),
    ],
)
def test_bad_binary(server: Served, length: str | None, rest: bytes, words: str) -> None:
    tensor = {
        "name": "x",
        "shape": [1, 10],
        "datatype": "FP32",
        "parameters": {"binary_data_size": 40},
    }
    header = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(header)) if length is None else length}
    status, answer, _ = server.request("/v2/models/net/infer", header + rest, headers=headers)
    assert status == 400, answer
    assert words in answer["error"], answer


def test_bytes_that_are_no_booleans(server: Served) -> None:
    with grpc_client.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        tensor = grpc_client.InferInput("x", [1, 10], "FP32")
        tensor.set_data_from_numpy(make_rows(1))
        tensor._raw_content = b"1234"
        with pytest.raises(InferenceServerException, match="expected 40 bytes for input x") as caught:
            client.infer("net", [tensor])
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("path", "method", "status", "words"),
    [
        ("/v2/models/nothing/infer", "POST", 404, "expected a model of images, net, types"),
        ("/v2/models/net/versions/2/infer", "POST", 404, "expected a version of 1"),
        ("/v2/models/..%2F..%2Fetc%2Fpasswd", "GET", 404, ""),
        ("/v2/models/net/infer", "GET", 405, "Method Not Allowed"),
        ("/v2/nothing", "GET", 404, "openapi.json"),
        ("/v2/repository/models/..%2Fx/load", "POST", 404, ""),
        ("/v2/repository/models/.x/load", "POST", 400, "model name"),
        ("/v2/repository/models/nothing/load", "POST", 404, "expected a model of images, net"),
        ("/v2/repository/models/nothing/unload", "POST", 404, "expected a model of images, net"),
    ],
)
def test_wrong_paths(server: Served, path: str, method: str, status: int, words: str) -> None:
    found, answer, _ = server.request(path, b"{}" if method == "POST" else None, method=method)
    assert found == status, answer
    assert words in answer["error"], answer


def test_unsupported_parts_of_the_protocol(server: Served) -> None:
    classes = {**one_input(), "outputs": [{"name": "y", "parameters": {"classification": 2}}]}
    shared = one_input(parameters={"shared_memory_region": "a"})
    for body, headers in ((classes, {}), (shared, {}), (one_input(), {"Content-Encoding": "gzip"})):
        status, answer, _ = server.request("/v2/models/net/infer", body, headers=headers)
        assert status == 501
        assert "not supported" in answer["error"]


def test_large_bodies(server: Served) -> None:
    status, answer, _ = server.request("/v2/models/net/infer", b" " * (100 << 20))
    assert status == 413
    assert "at most 1048576 bytes" in answer["error"]
    result = subprocess.run(
        ["curl", "--silent", "--data-binary", "@-", server.url + "/v2/models/net/infer"],
        input=b" " * (5 << 20),
        capture_output=True,
        check=True,
    )
    assert b"at most 1048576 bytes" in result.stdout
    with grpc_client.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        with pytest.raises(InferenceServerException) as caught:
            client.infer("net", make_inputs(grpc_client, make_rows(30_000)))
        assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    assert server.infer("net", make_rows(2)).shape == (2, 7)


def test_not_a_number(server: Served) -> None:
    """A row that is not finite spoils no other; JSON has null for it, bytes keep it."""
    x = make_rows(3)
    x[1, 4] = np.nan
    with http_client.InferenceServerClient(f"127.0.0.1:{server.http_port}") as client:
        for binary in (True, False):
            wanted = [http_client.InferRequestedOutput("y", binary_data=binary)]
            y = client.infer("net", make_inputs(http_client, x), outputs=wanted).as_numpy("y")
            assert np.isnan(y[1].astype(np.float32)).all()
            assert np.isfinite(y[[0, 2]].astype(np.float32)).all()


def test_timeouts(server: Served) -> None:
    status, answer, _ = server.request(
        "/v2/models/net/infer", json_request(make_rows(20_0), parameters={"timeout": 1})
    )
    assert status in (200, 504)  # one microsecond; a run that has begun is not waited for
    if status == 504:
        assert "within 1e-06 s" in answer["error"]


# --- Access ------------------------------------------------------------------------------------------


def test_token_and_tls(stack: ExportedStack, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("open-sesame\n")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate,
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    options = ("--token-file", token, "--tls-cert", certificate, "--tls-key", key, "--log-format", "json")
    with Served("--model", f"net={stack.onnx}", *options, "--log-requests", tls=True) as server:
        context = ssl.create_default_context(cafile=str(certificate))

        def status(path: str, header: str | None = None) -> int:
            request = urllib.request.Request(server.url + path)
            if header is not None:
                request.add_header("Authorization", header)
            try:
                return urllib.request.urlopen(request, context=context).status
            except urllib.error.HTTPError as error:
                return error.code if error.headers["www-authenticate"] == "Bearer" else -error.code

        assert status("/v2/health/ready") == 200
        assert status("/") == 200
        for path in ("/v2/models/net", "/metrics", "/status.json"):
            assert status(path) == 401
            assert status(path, "Bearer wrong") == 401
            assert status(path, "Bearer open-sesame") == 200
        credentials = grpc_client.service_pb2_grpc.grpc.ssl_channel_credentials(certificate.read_bytes())
        with grpc_client.InferenceServerClient(
            f"localhost:{server.grpc_port}", ssl=True, creds=credentials
        ) as client:
            assert client.is_server_live()
            with pytest.raises(InferenceServerException) as caught:
                client.get_model_metadata("net")
            assert caught.value.status() == "StatusCode.UNAUTHENTICATED"
            headers = {"authorization": "Bearer open-sesame"}
            x = make_rows(1)
            assert client.infer("net", make_inputs(grpc_client, x), headers=headers).as_numpy("y").shape == (
                1,
                7,
            )
        log = server.log
    assert "open-sesame" not in log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    requests = [line for line in lines if line["message"] == "request"]
    assert {"request_id", "method", "path", "status", "seconds"} <= requests[0].keys()
    assert {line["status"] for line in requests} == {200, 401}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "expected a model to serve, found none"),
        (("nothing.onnx",), "found none at"),
        (("--model", "net"), "expected NAME=PATH"),
        (("--model", "../net=x.onnx"), "model name"),
        (("--models", "nothing"), "found no folder nothing"),
        (("broken.onnx",), "damaged"),
        (("broken.onnx", "--model", "broken=broken.onnx"), "twice"),
        (("broken.onnx", "--max-batch", 10, "--max-queue", 5), "at least one batch"),
        (("broken.onnx", "--tls-cert", "broken.onnx"), "--tls-key"),
        (("broken.onnx", "--token-file", "nothing"), "expected a token"),
        (("broken.onnx", "--log-format", "xml"), "text or json"),
        (("broken.onnx", "--host", "256.1.1.1", "--http-port", 0), "expected to listen on"),
        (("broken.onnx", "--workers", 2, "--http-port", 0, "--grpc-port", 0), "damaged"),
    ],
)
def test_mistakes_at_the_start(tmp_path: Path, arguments: tuple[object, ...], words: str) -> None:
    from test_cli import cli

    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    result = cli("serve", *arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors
    assert words in errors[0]
    assert "Traceback" not in result.stderr


def test_a_port_that_is_taken(stack: ExportedStack, server: Served) -> None:
    from test_cli import cli

    for option, port in (("--http-port", server.http_port), ("--grpc-port", server.grpc_port)):
        other = "--grpc-port" if option == "--http-port" else "--http-port"
        result = cli("serve", stack.onnx, option, port, other, 0)
        assert result.returncode == 2
        assert f"port {port}" in result.stderr.splitlines()[-1]
