"""Samplers on sampler nodes, trainers on trainer nodes; nodes come and go as they are needed."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PORT, HEAD = 6379, "ray.head.default"
"""Written into Ray's fake provider."""
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "DS_ACCELERATOR": "cpu"}

ON_LABELLED_NODES = """
import json, sys
from pathlib import Path
import pyarrow as pa
import ray
from ray.cluster_utils import Cluster
from speechalign.config.sampling import PoolConfig
from speechalign.config.training import WorkersConfig
from speechalign.sampling.pipeline import Stage, stream
from speechalign.training.launch import run_workers
from tests.placement import WhereAmI, say_where

POOL = "speechalign-pool"
folder = Path(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = {pool: cluster.add_node(num_cpus=2, labels={POOL: pool}).node_id
         for pool in ("sample", "train")}
ray.init(address=cluster.address, log_to_driver=False)
pool = PoolConfig(num_actors=2, num_cpus=0.5, batch_size=1, label_selector={POOL: "sample"})
stages = [Stage(name="where", stage=WhereAmI, arguments={}, pool=pool)]
rows = stream(pa.table({"x": [1, 2, 3, 4]}), stages).take_all()
workers = WorkersConfig(num_workers=2, cpus_per_worker=0.5, label_selector={POOL: "train"})
run_workers(say_where, {"folder": str(folder)}, workers, folder / "train")
trained = sorted({path.read_text() for path in folder.glob("rank*")})
sampled = sorted({row["node"] for row in rows})
print(json.dumps({"nodes": nodes, "sampled": sampled, "trained": trained}))
ray.shutdown()
cluster.shutdown()
"""

GROWS_AND_SHRINKS = """
import json, sys, time
import ray

ray.init(address=sys.argv[1], log_to_driver=False)


@ray.remote(num_cpus=1, num_gpus=1)
class Sampler:
    def node(self):
        return ray.get_runtime_context().get_node_id()


before = len(ray.nodes())
sampler = Sampler.remote()
node = ray.get(sampler.node.remote(), timeout=120)
(came,) = [one for one in ray.nodes() if one["NodeID"] == node]
del sampler
deadline = time.monotonic() + 90
while any(one["NodeID"] == node and one["Alive"] for one in ray.nodes()):
    assert time.monotonic() < deadline, "the idle node stayed"
    time.sleep(0.5)
kinds = [name for name in came["Resources"] if name in ("sampler", "trainer")]
print(json.dumps({"before": before, "kinds": kinds}))
"""


def output_of(script: str, *arguments: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(Path.cwd()), **environment},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_samplers_and_trainers_live_on_the_nodes_that_their_labels_name(tmp_path: Path):
    found = output_of(ON_LABELLED_NODES, str(tmp_path))
    assert found["sampled"] == [found["nodes"]["sample"]]
    assert found["trained"] == [found["nodes"]["train"]]


def node_type(**resources: int) -> dict[str, Any]:
    return {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": 1}


@pytest.fixture
def growing_cluster(tmp_path: Path) -> Iterator[str]:
    """A head with Ray's fake provider: its nodes are processes, its autoscaler is the real v1."""
    unused = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands",
              "setup_commands", "head_setup_commands", "worker_setup_commands",
              "head_start_ray_commands", "worker_start_ray_commands")  # fmt: skip
    empty: dict[str, Any] = {name: [] for name in unused}
    values = {
        "cluster_name": "fake", "max_workers": 2, "upscaling_speed": 10.0,
        "idle_timeout_minutes": 0.1, "docker": {}, "auth": {"ssh_user": "nobody"},
        "provider": {"type": "fake_multinode", "use_node_id_as_ip": True,
                     "disable_node_updaters": True, "disable_launch_config_check": True},
        "available_node_types": {
            HEAD: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "trainer": node_type(CPU=2, trainer=1),
            "sampler": node_type(CPU=2, GPU=1, sampler=1),
        },
        "head_node_type": HEAD, "file_mounts": {}, "file_mounts_sync_continuously": False,
        **empty,
    }  # fmt: skip
    (tmp_path / "fake.yaml").write_text(yaml.safe_dump(values))
    with socket.socket() as one:
        if one.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.skip(f"another Ray holds port {PORT}, which the fake provider cannot change")
    environment = {
        **os.environ, **ENVIRONMENT, "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "0",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "HOME": str(tmp_path),
    }  # fmt: skip
    temp = f"/tmp/sa{os.getpid()}"  # sockets must have short names
    head = subprocess.Popen(
        [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block",
         f"--port={PORT}", f"--temp-dir={temp}", f"--autoscaling-config={tmp_path}/fake.yaml",
         "--num-cpus=1", "--num-gpus=0", "--include-dashboard=false",
         "--object-store-memory=100000000"],
        env=environment, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_port(PORT)
    yield f"127.0.0.1:{PORT}"
    for process in [*psutil.Process(head.pid).children(recursive=True), head]:
        process.kill()  # asked to end, it takes half a minute
    head.wait(60)


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                time.sleep(3)
                return
        time.sleep(0.5)
    raise AssertionError("Ray did not start")


def test_a_waiting_sampler_brings_a_node_of_its_type_and_the_idle_node_goes(growing_cluster: str):
    found = output_of(GROWS_AND_SHRINKS, growing_cluster)
    assert found == {"before": 1, "kinds": ["sampler"]}
