"""Runs a packaged Ray Serve application on two nodes, and kills one of them under load.

    python ray_cluster.py FOLDER PORT

Runs in an environment that has Ray, in a process of its own; prints what happened as JSON. Both nodes are on this
machine; each has room for one replica.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.cluster_utils import Cluster

CLIENTS = 4
SECONDS_BEFORE, SECONDS_AFTER = 4.0, 8.0
PATIENCE = 30.0


class Load:
    """Clients that ask until they are told to stop, and check every answer."""

    def __init__(self, url: str, runner: Any) -> None:
        self.url, self.runner = url, runner
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.answered = self.failed = self.wrong = self.lost = 0
        self.longest = 0.0

    def client(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        spec = self.runner.inputs[0]
        while not self.stop.is_set():
            x = rng.standard_normal((int(rng.integers(1, 9)), *spec.shape[1:]), dtype=np.float32)
            tensor = {"name": spec.name, "datatype": "FP32", "shape": x.shape, "data": x.ravel().tolist()}
            self.ask(x, json.dumps({"inputs": [tensor]}).encode())

    def ask(self, x: np.ndarray, body: bytes) -> None:
        """Sends a request again until it is answered."""
        begin = time.monotonic()
        while time.monotonic() - begin < PATIENCE:
            try:
                request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
                with urllib.request.urlopen(request, timeout=10) as answer:
                    output = json.loads(answer.read())["outputs"][0]
                break
            except (OSError, ValueError):
                with self.lock:
                    self.failed += 1
                time.sleep(0.1)
        else:
            with self.lock:
                self.lost += 1
            return
        [expected] = self.runner.run({self.runner.inputs[0].name: x}).values()
        y = np.array(output["data"], np.float32).reshape(output["shape"])
        good = y.shape == expected.shape and np.allclose(y, expected, rtol=1e-5, atol=1e-5)
        with self.lock:
            self.answered += 1
            self.wrong += not good
            self.longest = max(self.longest, time.monotonic() - begin)


def wait_until_used() -> bool:
    """Whether both nodes run a replica: each has one CPU, and a replica takes one."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if ray.available_resources().get("CPU", 0) == 0:
            return True
        time.sleep(0.2)
    return False


def main() -> None:
    """Starts the cluster, loads it, kills a node, and reports."""
    folder, port = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    sys.path.insert(0, str(folder))
    import app

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    worker = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        app.Model = app.Model.options(autoscaling_config=None, num_replicas=2)
        serve.run(app.build({"name": "net", "max_delay_us": 500}), name="net", route_prefix="/")
        spread = wait_until_used()
        load = Load(
            f"http://127.0.0.1:{port}/v2/models/net/infer", app.lmkan_deploy.load_runner(app.MODEL, threads=1)
        )
        threads = [threading.Thread(target=load.client, args=(seed,)) for seed in range(CLIENTS)]
        for thread in threads:
            thread.start()
        time.sleep(SECONDS_BEFORE)
        before, failed_before = load.answered, load.failed
        cluster.remove_node(worker, allow_graceful=False)
        time.sleep(SECONDS_AFTER)
        load.stop.set()
        for thread in threads:
            thread.join()
        report = {
            "both_nodes_used": spread,
            "answered_before": before,
            "failed_before": failed_before,
            "answered_after": load.answered - before,
            "failed_after": load.failed - failed_before,
            "lost": load.lost,
            "wrong": load.wrong,
            "longest_s": round(load.longest, 3),
        }
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
