"""Folders for KServe, and the command that their image runs.

Optional: LMKAN_KSERVE_CRDS, a folder with KServe's CRDs, servingruntimes.yaml and inferenceservices.yaml.
"""

from __future__ import annotations

import json
import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import lmkan_deploy
from lmkan_deploy.packaging import package_model
from lmkan_deploy.packaging.kserve import kubernetes_name
from networks import ExportedStack, make_stack
from packaged import (
    free_port,
    infer_request,
    post,
    read_output,
    running,
    sample,
    wait_until_ready,
)


@pytest.fixture
def kserve(stack: ExportedStack, tmp_path: Path) -> Path:
    package_model(stack.onnx, tmp_path / "kserve", format="kserve", name="Net_v1.2", threads=2)
    return tmp_path / "kserve"


def manifests(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    runtime, service = (
        yaml.safe_load((folder / f"{name}.yaml").read_text())
        for name in ("servingruntime", "inferenceservice")
    )
    return runtime, service


def test_kserve_manifests_fit_together(kserve: Path) -> None:
    runtime, service = manifests(kserve)
    assert (runtime["apiVersion"], runtime["kind"]) == ("serving.kserve.io/v1alpha1", "ServingRuntime")
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert service["metadata"]["name"] == "net-v1-2"
    for manifest in (runtime, service):
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", manifest["metadata"]["name"])
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"] == ["v2", "grpc-v2"]
    [known] = runtime["spec"]["supportedModelFormats"]
    assert model["modelFormat"] == {key: known[key] for key in ("name", "version")}
    [container] = runtime["spec"]["containers"]
    assert (container["name"], container["image"]) == ("kserve-container", "net-v1-2:1")
    assert container["command"] == ["lmkan-deploy"]
    line = " ".join(container["args"])
    assert "serve --models /mnt/models --host 0.0.0.0 --http-port 8080 --grpc-port 8081" in line
    assert "--threads 2" in line
    [port] = container["ports"]
    for probe, path in (("startup", "ready"), ("readiness", "ready"), ("liveness", "live")):
        check = container[f"{probe}Probe"]["httpGet"]
        assert check == {"path": f"/v2/health/{path}", "port": port["containerPort"]}
    for kind in ("requests", "limits"):
        assert container["resources"][kind]["cpu"] == "2"
        assert re.fullmatch(r"\d+Mi", container["resources"][kind]["memory"])
    security = container["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["allowPrivilegeEscalation"] is False


def test_kserve_image(kserve: Path, stack: ExportedStack, tmp_path: Path) -> None:
    assert (kserve / "models" / "Net_v1.2" / "1" / "model.onnx").is_file()
    text = (kserve / "Dockerfile").read_text()
    for line in (
        "FROM python:3.12-slim",
        "COPY models/ /mnt/models/",
        "USER 1000",
        f'--find-links /wheels "lmkan-deploy[cpu,serve]=={lmkan_deploy.__version__}"',
    ):
        assert line in text
    for source in re.findall(r"^COPY (\S+) ", text, re.MULTILINE):
        assert (kserve / source).is_dir(), f"the build would miss {source}"
    # What an image's own command starts is what the runtime starts.
    [command] = re.findall(r"^CMD (.*)$", text, re.MULTILINE)
    [container] = manifests(kserve)[0]["spec"]["containers"]
    assert json.loads(command) == container["args"][: len(json.loads(command))]
    wheel = tmp_path / f"lmkan_deploy-{lmkan_deploy.__version__}-py3-none-linux_x86_64.whl"
    wheel.write_bytes(b"wheel")
    result = package_model(
        stack.onnx, tmp_path / "w", format="kserve", wheel=wheel, image="r.example:5000/a/b@sha256:0"
    )
    assert f"wheels/{wheel.name}" in result.files
    assert manifests(tmp_path / "w")[0]["spec"]["containers"][0]["image"] == "r.example:5000/a/b@sha256:0"


@pytest.mark.parametrize(
    ("name", "expected"), [("net", "net"), ("Net_2.x", "net-2-x"), ("9lives", "model-9lives"), ("a-", "a")]
)
def test_kubernetes_names(name: str, expected: str) -> None:
    assert kubernetes_name(name) == expected


def test_kserve_memory_grows_with_the_model(tmp_path: Path) -> None:
    torch.save(make_stack(64, 256, num_grids=12).state_dict(), tmp_path / "m.pt")  # 5.5 MB
    lmkan_deploy.export(tmp_path / "m.pt", tmp_path / "m.onnx", check=False)
    package_model(tmp_path / "m.onnx", tmp_path / "k", format="kserve", max_batch=20000)
    [container] = manifests(tmp_path / "k")[0]["spec"]["containers"]
    assert container["resources"]["requests"]["memory"] == "266Mi"
    # The server refuses a queue that holds less than a batch.
    assert container["args"][-2:] == ["--max-queue", "20000"]


def _strict(schema: Any) -> Any:
    """A CRD's schema as kubectl applies it: fields that it does not name are mistakes."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        result.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return result


def test_kserve_manifests_fit_the_schemas_of_kserve(kserve: Path) -> None:
    folder = os.environ.get("LMKAN_KSERVE_CRDS")
    if not folder:
        pytest.skip("LMKAN_KSERVE_CRDS is not set: no CRDs of KServe to check against")
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    for manifest, file in zip(manifests(kserve), ("servingruntimes", "inferenceservices"), strict=True):
        crd = yaml.load((Path(folder) / f"{file}.yaml").read_text(), yaml.CSafeLoader)
        release = manifest["apiVersion"].rpartition("/")[2]
        [version] = [v for v in crd["spec"]["versions"] if v["name"] == release]
        schema = _strict(version["schema"]["openAPIV3Schema"])
        # A CRD leaves these two to Kubernetes.
        schema["properties"]["metadata"] = {"type": "object"}
        validator = jsonschema_rs.Draft4Validator(schema)
        assert not [error.message for error in validator.iter_errors(manifest)]
        spec = manifest["spec"]
        container = spec["containers"][0] if "containers" in spec else spec["predictor"]["model"]
        container["prots"] = []
        assert not validator.is_valid(manifest), "a misspelt field passed"


def test_the_runtimes_command_serves_the_model(kserve: Path, stack: ExportedStack, tmp_path: Path) -> None:
    """What the container would run, with the folder and the ports of this machine."""
    for module in ("uvicorn", "starlette", "orjson", "prometheus_client", "httptools"):
        pytest.importorskip(module)
    [container] = manifests(kserve)[0]["spec"]["containers"]
    http, grpc = free_port(), free_port()
    here = {
        "/mnt/models": str(kserve / "models"),
        "0.0.0.0": "127.0.0.1",
        "8080": str(http),
        "8081": str(grpc),
    }
    arguments = [here.get(argument, argument) for argument in container["args"]]
    command = [sys.executable, "-m", "lmkan_deploy.cli", *arguments]
    log = tmp_path / "serve.log"
    with running(command, log) as process:
        address = f"http://127.0.0.1:{http}"
        wait_until_ready(address + container["readinessProbe"]["httpGet"]["path"], process, log)
        assert urllib.request.urlopen(address + container["livenessProbe"]["httpGet"]["path"]).status == 200
        runner = lmkan_deploy.load_runner(stack.onnx)
        x = sample(runner, 3)
        answer = post(f"{address}/v2/models/Net_v1.2/infer", infer_request(x))
        np.testing.assert_allclose(read_output(answer), runner.run(x)["y"], rtol=1e-5, atol=1e-5)
