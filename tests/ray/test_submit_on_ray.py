"""A real cluster, a real job: sent, followed, stopped in the middle of training, sent again."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests
import yaml

from speechalign.artifacts import manifest_facts, verify_folder
from speechalign.config.align import AlignConfig
from speechalign.config.load import dump_yaml
from speechalign.config.preference_training import PreferenceTrainingConfig
from speechalign.training.metrics import read_metrics
from speechalign.training.stopping import STOPPED_WORDS
from tests.tiny_stack import build_tiny_stack, tiny_recipe

pytestmark = pytest.mark.ray

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
TOKEN = "a-token-that-only-this-test-knows-0123456789"


HEADERS = {"Authorization": f"Bearer {TOKEN}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A head and a worker node."""

    address: str
    environment: dict[str, str]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def cluster(clusters: ExitStack) -> Iterator[Cluster]:
    """Start one whose workers are forked by the server of `clusters`."""
    home = Path(tempfile.mkdtemp(prefix="sa-"))  # a socket's path may have 107 characters
    gcs, dashboard, *others = free_ports(8)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_")
    } | {
        "HOME": str(home),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(home),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "DS_ACCELERATOR": "cpu",
    }
    common = ["--num-gpus=0", "--object-store-memory=150000000", "--disable-usage-stats", "--block"]
    head = [
        "--head",
        f"--port={gcs}",
        f"--dashboard-port={dashboard}",
        f"--temp-dir={home}",
        "--num-cpus=1",
        f"--dashboard-agent-listen-port={others[0]}",
        f"--ray-client-server-port={others[1]}",
    ]
    worker = [
        f"--address=127.0.0.1:{gcs}",
        # In a folder that two nodes share, the second one unpacks the job's files anew, and who
        # works there has lost its directory.
        f"--temp-dir={home}/worker",
        "--num-cpus=2",
        f"--dashboard-agent-listen-port={others[2]}",
    ]
    address = f"http://127.0.0.1:{dashboard}"
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        with (home / "nodes.log").open("wb") as log:
            for count, arguments in enumerate((head, worker), start=1):
                command = [sys.executable, "-m", "tests.ray.warm_workers.command", "ray", "start"]
                command += [*arguments, *common]
                nodes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
                wait_for_nodes(address, count, nodes[-1], home / "nodes.log")
        yield Cluster(address=address, environment=environment)
    finally:
        end(nodes)
        shutil.rmtree(home, ignore_errors=True)


def wait_for_nodes(address: str, count: int, node: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 180
    while True:
        assert node.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        try:
            answer = requests.get(f"{address}/nodes?view=summary", headers=HEADERS, timeout=5)
            if answer.ok and len(answer.json()["data"]["summary"]) == count:
                return
        except requests.RequestException:
            pass
        time.sleep(0.5)


def end(nodes: "list[subprocess.Popen[bytes]]") -> None:
    """Kill what these nodes started, and nothing else of the machine."""
    alive = [psutil.Process(node.pid) for node in nodes if node.poll() is None]
    children = [process for node in alive for process in node.children(recursive=True)]
    for process in (*reversed(alive), *children):
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    for node in nodes:
        node.wait()
    psutil.wait_procs(children, timeout=20)


def a_long_training(folder: Path) -> AlignConfig:
    """Return a run of some hundred updates, and not one checkpoint but those that are asked for."""
    config = tiny_recipe(build_tiny_stack(folder / "stack"), folder / "run")
    assert isinstance(config.training, PreferenceTrainingConfig)
    early_stop = config.training.early_stop.model_copy(
        update={"every": 50, "patience": 100, "max_chosen_drop": 1000.0}
    )
    changes = {"num_epochs": 60, "checkpoint_every": 1000, "early_stop": early_stop}
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """A recipe, the cluster it goes to, and the logs of the commands."""

    cluster: Cluster
    folder: Path
    config: AlignConfig

    def submit(self, name: str, *flags: str, **environment: str) -> "subprocess.Popen[bytes]":
        command = [str(BIN / "speechalign"), "submit", "align.yaml", "--verb", "train", *flags]
        with self.log(name).open("wb") as file:
            return subprocess.Popen(
                [*command, "--address", self.cluster.address],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=self.cluster.environment | environment,
            )

    def log(self, name: str) -> Path:
        return self.folder.with_name(f"{name}.log")

    def said(self, name: str) -> str:
        return self.log(name).read_text()

    def wait(self, name: str, process: "subprocess.Popen[bytes]", code: int) -> str:
        assert process.wait(timeout=400) == code, self.said(name)[-3000:]
        return self.said(name)

    def wait_until(
        self, name: str, process: "subprocess.Popen[bytes]", is_so: Callable[[], bool]
    ) -> None:
        deadline = time.monotonic() + 300
        while not is_so():
            assert process.poll() is None, self.said(name)[-3000:]
            assert time.monotonic() < deadline, self.said(name)[-3000:]
            time.sleep(0.1)

    @property
    def work(self) -> Path:
        return self.config.run_dir / "iteration-1" / "policy-work"

    def updates(self) -> list[int]:
        rows = read_metrics(self.work / "metrics.jsonl")
        return [int(row["step"]) for row in rows if "grad_norm" in row]


@pytest.fixture
def project(cluster: Cluster, tmp_path: Path) -> Project:
    folder = tmp_path / "project"
    folder.mkdir()
    config = a_long_training(tmp_path)
    (folder / "align.yaml").write_text(dump_yaml(config))
    return Project(cluster=cluster, folder=folder, config=config)


@pytest.mark.timeout(900)
def test_a_job_that_is_stopped_while_it_trains_goes_on_when_it_is_sent_again(project: Project):
    refused = project.submit("refused", RAY_AUTH_MODE="disabled")
    assert "set RAY_AUTH_MODE=token" in project.wait("refused", refused, 2)
    planned = project.wait("plan", project.submit("plan", "--dry-run"), 0)
    job = yaml.safe_load(planned)["submission_id"].removesuffix("1")

    stopped_at = stop_while_it_trains(project, job)
    assert not (project.config.run_dir / "lock").exists()
    assert 0 < stopped_at == manifest_facts(project.work / "checkpoint")["step"]
    verify_folder(project.work / "checkpoint")

    second = project.wait("second", project.submit("second"), 0)
    assert f"submitted {job}2" in second
    assert "iteration-1/pairs: finished earlier" in second
    updates = project.updates()
    assert updates == list(range(1, updates[-1] + 1))
    assert updates[-1] > stopped_at
    policy = verify_folder(project.config.run_dir / "iteration-1" / "policy")
    assert policy["num_updates"] == updates[-1]
    again = project.wait("again", project.submit("again"), 0)
    assert f"submitted {job}3" in again  # the next iteration's turn, if there were one
    assert "iteration-1/policy: finished earlier" in again


def stop_while_it_trains(project: Project, job: str) -> int:
    """Send a run, stop its job after the first updates, and return how many there were."""
    first = project.submit("first")
    project.wait_until("first", first, lambda: f"submitted {job}1" in project.said("first"))
    attached = project.submit("attached")
    project.wait_until("attached", attached, lambda: "attached to" in project.said("attached"))
    project.wait_until("first", first, lambda: len(project.updates()) > 1)
    url = f"{project.cluster.address}/api/jobs/{job}1/stop"
    assert requests.post(url, headers=HEADERS, timeout=30).ok
    log = project.wait("first", first, 143)
    assert "iteration-1/pairs: finished" in log
    assert "asked to stop: the training saves" in log
    assert STOPPED_WORDS in log
    assert "the same command resumes: speechalign train align.yaml" in log
    project.wait("attached", attached, 143)
    return project.updates()[-1]
