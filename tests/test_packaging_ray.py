"""Ray Serve applications, with a stand-in for Ray and with a real cluster where there is one.

Optional: LMKAN_RAY_VENV, a virtual environment with this package and Ray Serve.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import types
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from starlette.requests import Request

import lmkan_deploy
from lmkan_deploy.packaging import package_model
from networks import ExportedStack
from packaged import (
    free_port,
    import_file,
    infer_request,
    no_batch,
    post,
    read_output,
    running,
    sample,
    wait_until_ready,
)

TESTS = Path(__file__).parent


def test_ray_files(stack: ExportedStack, tmp_path: Path) -> None:
    package_model(
        stack.onnx, tmp_path / "r", format="ray", name="1.0", max_batch=64, max_delay_us=300, threads=2
    )
    config = yaml.safe_load((tmp_path / "r" / "serve_config.yaml").read_text())
    [application] = config["applications"]
    assert (application["name"], application["import_path"]) == ("1.0", "app:build")
    assert application["args"] == {"name": "1.0", "max_batch": 64, "max_delay_us": 300, "threads": 2}
    [deployment] = application["deployments"]
    assert deployment["name"] == "Model"
    assert deployment["ray_actor_options"] == {"num_cpus": 2}
    requirements = (tmp_path / "r" / "requirements.txt").read_text().splitlines()
    assert {"ray[serve]", "protobuf<7", "grpcio-reflection<1.82"} <= set(requirements)
    assert f"lmkan-deploy[cpu]=={lmkan_deploy.__version__}" in requirements
    readme = (tmp_path / "r" / "README.md").read_text()
    assert "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING=0" in readme
    assert "PYTHONPATH=$PWD" in readme


def _ray_stand_in() -> ModuleType:
    """Ray's decorators without Ray: a batch is what `infer.many` is called with, or one request."""

    class Batched:
        def __init__(self, function: Callable[..., Any]) -> None:
            self.function = function
            self.options: dict[str, float] = {}

        def __get__(self, owner: Any, _: type) -> Any:
            async def infer(request: Any) -> Any:
                [answer] = await self.function(owner, [request])
                return answer

            infer.many = types.MethodType(self.function, owner)  # type: ignore[attr-defined]
            for name in ("max_batch_size", "batch_wait_timeout_s"):
                setattr(infer, f"set_{name}", lambda value, name=name: self.options.update({name: value}))
            return infer

    class Deployment:
        def __init__(self, function: type) -> None:
            self.bind = function

    ray = ModuleType("ray")
    ray.serve = types.SimpleNamespace(  # type: ignore[attr-defined]
        deployment=lambda **_: Deployment, batch=lambda **_: Batched
    )
    return ray


@pytest.fixture
def ray_app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    pytest.importorskip("starlette")
    monkeypatch.setitem(sys.modules, "ray", _ray_stand_in())

    def start(model: Path, **args: Any) -> Any:
        package_model(model, tmp_path / "app", format="ray", name="net")
        return import_file(tmp_path / "app" / "app.py", "packaged_app").build({"name": "net", **args})

    return start


def call(app: Any, method: str, path: str, content: Any = None, root: str = "") -> tuple[int, Any]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {"type": "http", "method": method, "path": path, "root_path": root, "query_string": b"",
             "headers": [], "server": ("localhost", 80), "scheme": "http"}  # fmt: skip
    response = asyncio.run(app(Request(scope, receive)))
    return response.status_code, json.loads(response.body)


INFER = "/v2/models/net/infer"


def test_ray_app_lets_onnxruntime_send_nothing(
    stack: ExportedStack, ray_app: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "")  # and what it was comes back
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    ray_app(stack.onnx)
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


def test_ray_app_answers(stack: ExportedStack, ray_app: Callable[..., Any]) -> None:
    app = ray_app(stack.onnx)
    runner = lmkan_deploy.load_runner(stack.onnx)
    x = sample(runner, 3)
    status, answer = call(app, "POST", INFER, {"id": "a", **infer_request(x)})
    assert (status, answer["id"], answer["model_name"]) == (200, "a", "net")
    np.testing.assert_array_equal(read_output(answer), runner.run(x)["y"])
    nested = infer_request(x, data=x["x"].tolist())
    nested["outputs"] = [{"name": "y"}]
    status, answer = call(app, "POST", "/app/v2/models/net/versions/1/infer", nested, root="/app")
    np.testing.assert_array_equal(read_output(answer), runner.run(x)["y"])
    status, metadata = call(app, "GET", "/v2/models/net")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 10]}]
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/net/ready"):
        assert call(app, "GET", path)[0] == 200
    for method, path in (
        ("GET", "/"),
        ("GET", INFER),
        ("POST", "/v2/models/nets/infer"),
        ("GET", "/v2/models/n"),
    ):
        status, answer = call(app, method, path)
        assert status == 404
        assert "expected GET /v2/models/net" in answer["error"]


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"{", "expected a JSON object"),
        (b"[" * 100_000, "expected a JSON object"),
        (b'{"inputs": [NaN]}', "NaN is no JSON"),
        ([], "expected a JSON object with a list of inputs"),
        ({"inputs": {}}, "expected a JSON object with a list of inputs"),
        ({"inputs": []}, "expected the inputs x, found none"),
        ({"inputs": ["x"]}, "expected the inputs x"),
        ({"datatype": "FP64"}, "expected datatype FP32 of input x, found 'FP64'"),
        ({"name": "z"}, "expected the inputs x"),
        ({"name": []}, "expected the inputs x"),
        ({"data": [1.0]}, "cannot reshape"),
        ({"data": [1e300] * 20}, "out of range"),
        ({"data": ["1"] * 20}, "found <U1 values"),
        ({"data": [[1.0], [1.0, 2.0]]}, "could not read them"),
        ({"shape": [20]}, "found shape [20]"),
        ({"shape": "a"}, "could not read them"),
        ({"shape": None}, "found shape None"),
        ({"shape": [-1, 10]}, "found shape [-1, 10]"),
        ({"data": [True] * 20}, "found bool values"),
        ({"outputs": [{"name": "z"}]}, "expected outputs of y, found 'z'"),
        ({"outputs": ["y"]}, "expected a list of objects as outputs"),
    ],
)
def test_ray_app_refuses_bad_requests(
    content: Any, fragment: str, stack: ExportedStack, ray_app: Callable[..., Any]
) -> None:
    app = ray_app(stack.onnx)
    x = {"x": np.ones((2, 10), np.float32)}
    if isinstance(content, dict) and "inputs" not in content:
        outputs = {"outputs": content["outputs"]} if "outputs" in content else {}
        content = {**infer_request(x, **({} if outputs else content)), **outputs}
    status, answer = call(app, "POST", INFER, content)
    assert status == 400
    assert fragment in answer["error"]
    assert "\n" not in answer["error"]


def test_ray_app_joins_requests(stack: ExportedStack, ray_app: Callable[..., Any]) -> None:
    app = ray_app(stack.onnx, max_batch=8)
    runner = lmkan_deploy.load_runner(stack.onnx)
    feeds = [sample(runner, rows, seed) for seed, rows in enumerate((3, 4, 2, 20, 1, 0))]
    runs: list[int] = []
    run = app.runner.run

    def counted(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        runs.append(len(inputs["x"]))
        return run(inputs)

    app.runner.run = counted
    answers = asyncio.run(app.infer.many(feeds))
    assert sorted(runs) == [1, 2, 7, 20]
    for x, (outputs, problem) in zip(feeds, answers, strict=True):
        assert problem is None
        np.testing.assert_allclose(outputs["y"], runner.run(x)["y"], rtol=1e-6, atol=1e-6)
    wrong = {"x": np.ones((2, 10), np.float64)}
    (_, first), (outputs, second) = asyncio.run(app.infer.many([wrong, feeds[0]]))
    assert "float64" in first
    assert second is None
    assert len(outputs["y"]) == 3


def test_ray_app_without_a_batch_axis(tmp_path: Path, ray_app: Callable[..., Any]) -> None:
    app = ray_app(no_batch(tmp_path / "sum.onnx"))
    answers = asyncio.run(app.infer.many([{"x": np.ones((rows, 3))} for rows in (1, 4)]))
    assert [outputs["total"].item() for outputs, _ in answers] == [3.0, 12.0]


@pytest.fixture
def ray_environment() -> dict[str, str]:
    venv = os.environ.get("LMKAN_RAY_VENV")
    if not venv:
        pytest.skip("LMKAN_RAY_VENV is not set: no Ray to start")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {
        **environment,
        "PATH": f"{venv}/bin:{os.environ['PATH']}",
        "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def test_a_real_ray_runs_the_configuration(
    stack: ExportedStack, tmp_path: Path, ray_environment: dict[str, str]
) -> None:
    package_model(stack.onnx, tmp_path / "app", format="ray", name="net")
    port = free_port()
    config = tmp_path / "app" / "serve_config.yaml"
    config.write_text(config.read_text().replace("0.0.0.0", "127.0.0.1").replace("8000", str(port)))
    log = tmp_path / "ray.log"
    command = ["serve", "run", "serve_config.yaml"]
    # Found by the shell: a process is looked for in this process's PATH.
    command[0] = shutil.which("serve", path=ray_environment["PATH"]) or "serve"
    with running(command, log, cwd=config.parent, env=ray_environment) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{url}/v2/models/net/ready", process, log)
        runner = lmkan_deploy.load_runner(stack.onnx)
        for rows in (1, 100):
            x = sample(runner, rows, rows)
            answer = post(url + INFER, infer_request(x))
            np.testing.assert_allclose(read_output(answer), runner.run(x)["y"], rtol=1e-5, atol=1e-5)
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(url + INFER, infer_request({"x": np.ones((1, 4), np.float32)}))
        assert caught.value.code == 400
        assert "found shape [1, 4]" in json.loads(caught.value.read())["error"]


def test_a_real_ray_survives_the_loss_of_a_node(
    stack: ExportedStack, tmp_path: Path, ray_environment: dict[str, str]
) -> None:
    package_model(stack.onnx, tmp_path / "app", format="ray", name="net")
    python = shutil.which("python", path=ray_environment["PATH"])
    result = subprocess.run(
        [str(python), str(TESTS / "ray_cluster.py"), str(tmp_path / "app"), str(free_port())],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        cwd=tmp_path,
        env={**ray_environment, "PYTHONPATH": str(tmp_path / "app")},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout.splitlines()[-1])
    print(report)
    assert report["both_nodes_used"]
    assert report["failed_before"] == 0
    assert report["answered_before"] > 0
    assert report["answered_after"] > 0
    assert (report["wrong"], report["lost"]) == (0, 0)
