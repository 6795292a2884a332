"""Forked workers: that they are, and that they get what Ray wanted them to have."""

import os
from pathlib import Path

import pytest
import ray
from ray.exceptions import WorkerCrashedError

from tests.ray.warm_workers.launcher import folder_of

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("cluster"),
]


def test_a_worker_is_forked_with_the_environment_that_ray_gives_it():
    @ray.remote(runtime_env={"env_vars": {"GREETING": "hello"}})
    def look() -> tuple[str, str, str]:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_text()
        return parent, os.environ["GREETING"], os.environ["RAY_JOB_ID"]

    parent, greeting, job = ray.get(look.remote())
    assert "warm_workers/server.py" in parent
    assert (greeting, job) == ("hello", ray.get_runtime_context().get_job_id())


def test_only_a_working_directory_may_come_before_a_forked_worker():
    assert folder_of({}) == str(Path.cwd())
    assert folder_of({"command_prefix": ["cd", "'/a b'", "&&"]}) == "/a b"
    assert folder_of({"command_prefix": [". venv/bin/activate", "&&"]}) is None
    assert folder_of({"override_worker_entrypoint": "/x.py"}) is None


def test_a_worker_that_fails_is_seen_by_ray():
    @ray.remote(max_retries=0)
    def end() -> None:
        os._exit(7)

    with pytest.raises(WorkerCrashedError):
        ray.get(end.remote())
