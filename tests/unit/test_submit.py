"""Submitting without a cluster: ids, attempts, what is tried again and what is not."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from speechalign.config.align import AlignConfig
from speechalign.config.load import config_hash, load_config
from speechalign.errors import ClusterUnreachable, ConfigError
from speechalign.pipeline.job_client import RayJobClient
from speechalign.pipeline.submit import JobRequest, JobState, Submission, claim, plan_job
from speechalign.training.stopping import STOPPED_WORDS

REQUEST = JobRequest(
    name="demo-align-0123456789ab", entrypoint="exec true", runtime_env={}, metadata={}
)
A1, A2, A3 = (REQUEST.submission_id(attempt) for attempt in (1, 2, 3))
DONE = JobState(status="SUCCEEDED", exit_code=0)
RUNNING = JobState(status="RUNNING")
STOPPED = JobState(status="STOPPED")
KILLED = JobState(status="FAILED", exit_code=-9, error_type="JOB_ENTRYPOINT_COMMAND_ERROR")
NODE_DIED = JobState(status="FAILED", error_type="JOB_SUPERVISOR_ACTOR_DIED")


def failed(code: int) -> JobState:
    return JobState(status="FAILED", exit_code=code, error_type="JOB_ENTRYPOINT_COMMAND_ERROR")


@dataclass
class FakeCluster:
    """Knows jobs; one that is submitted ends as the next of `ends`."""

    ends: list[JobState] = field(default_factory=list[JobState])
    jobs: dict[str, JobState] = field(default_factory=dict[str, JobState])
    text: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    submitted: list[str] = field(default_factory=list[str])
    raced_by: JobState | None = None

    def submit(self, request: JobRequest, submission_id: str) -> bool:
        if self.raced_by is not None:
            self.jobs[submission_id], self.raced_by = self.raced_by, None
            return False
        self.submitted.append(submission_id)
        self.jobs[submission_id] = self.ends.pop(0)
        return True

    def state(self, submission_id: str) -> JobState | None:
        return self.jobs.get(submission_id)

    def logs(self, submission_id: str) -> Iterator[str]:
        yield from self.text.get(submission_id, [])


@dataclass
class Run:
    """What a call of `submit` came to."""

    code: int
    shown: str
    waits: list[float]


def run(
    cluster: FakeCluster,
    *,
    request: JobRequest = REQUEST,
    connect: Callable[[], Any] | None = None,
    **options: Any,
) -> Run:
    shown: list[str] = []
    waits: list[float] = []
    submission = Submission(
        request=request,
        connect=connect or (lambda: cluster),
        show=shown.append,
        sleep=waits.append,
        **options,
    )
    return Run(code=submission.run(), shown="".join(shown), waits=waits)


def test_a_first_submission_is_attempt_1_and_its_log_is_shown_once():
    cluster = FakeCluster(ends=[DONE], text={A1: ["step 1\n", "step 2\n"]})
    assert run(cluster) == Run(code=0, shown="step 1\nstep 2\n", waits=[])
    assert cluster.submitted == [A1]


@pytest.mark.parametrize("state", [RUNNING, DONE, JobState(status="PENDING")])
def test_a_job_that_is_alive_or_done_is_attached_to(state: JobState):
    cluster = FakeCluster(jobs={A1: failed(1), A2: state})
    assert claim(cluster, REQUEST) == A2
    assert cluster.submitted == []


def test_a_stage_that_is_done_is_sent_again_for_the_next_iteration():
    cluster = FakeCluster(ends=[RUNNING], jobs={A1: DONE})
    stage = replace(REQUEST, is_repeated=True)
    assert claim(cluster, stage) == A2
    assert claim(cluster, stage) == A2  # which runs now
    assert cluster.submitted == [A2]


@pytest.mark.parametrize("state", [STOPPED, failed(1), failed(3), NODE_DIED])
def test_after_a_job_that_ended_otherwise_the_next_attempt_is_made(state: JobState):
    cluster = FakeCluster(ends=[DONE], jobs={A1: state})
    assert run(cluster).code == 0
    assert cluster.submitted == [A2]


def test_a_job_that_somebody_sends_at_the_same_moment_is_attached_to():
    cluster = FakeCluster(raced_by=DONE)
    assert claim(cluster, REQUEST) == A1
    assert cluster.submitted == []


@pytest.mark.parametrize(("code", "told"), [(2, 2), (3, 3), (4, 4), (1, 1), (7, 1)])
def test_what_the_recipe_or_the_data_broke_is_told_and_not_tried_again(code: int, told: int):
    cluster = FakeCluster(ends=[failed(code), DONE])
    assert run(cluster) == Run(code=told, shown="", waits=[])
    assert cluster.submitted == [A1]


@pytest.mark.parametrize("state", [KILLED, failed(137), failed(143), NODE_DIED])
def test_what_the_infrastructure_broke_is_tried_again(state: JobState):
    cluster = FakeCluster(ends=[state, DONE])
    assert run(cluster) == Run(code=0, shown="", waits=[65.0])
    assert cluster.submitted == [A1, A2]


def test_attempts_are_bounded_and_the_waits_grow():
    cluster = FakeCluster(ends=[KILLED] * 9)
    assert run(cluster, max_retries=2) == Run(code=1, shown="", waits=[65.0, 130.0])
    assert cluster.submitted == [A1, A2, A3]


def test_no_runtime_environment_and_no_resources_are_no_reason_to_try_again():
    for error in ("RUNTIME_ENV_SETUP_FAILURE", "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE"):
        cluster = FakeCluster(ends=[JobState(status="FAILED", error_type=error), DONE])
        assert run(cluster).code == 1


@pytest.mark.parametrize(
    ("last_words", "code"), [(f"speechalign: {STOPPED_WORDS}\n", 143), ("training\n", 137)]
)
def test_a_stopped_job_is_not_sent_again_and_says_whether_it_saved(last_words: str, code: int):
    cluster = FakeCluster(ends=[STOPPED, DONE], text={A1: [last_words]})
    assert run(cluster).code == code
    assert cluster.submitted == [A1]


class Flaky(FakeCluster):
    """Hangs up in the middle of the log, once for each number."""

    def logs(self, submission_id: str) -> Iterator[str]:
        yield "step 1\n"
        if self.text[submission_id].pop() == "hang up":
            raise ClusterUnreachable("gone")
        yield "step 2\n"


def test_a_broken_connection_is_made_again_and_no_line_is_shown_twice():
    cluster = Flaky(ends=[DONE], text={A1: ["", "", "hang up", "hang up"]})
    assert run(cluster, max_retries=2) == Run(code=0, shown="step 1\nstep 2\n", waits=[10.0, 20.0])
    assert cluster.submitted == [A1]


def test_a_stage_that_ended_while_the_connection_was_broken_is_not_sent_again():
    cluster = Flaky(ends=[DONE], text={A1: ["", "", "hang up"]})
    assert run(cluster, request=replace(REQUEST, is_repeated=True)).code == 0
    assert cluster.submitted == [A1]


def test_a_cluster_that_does_not_answer_is_given_up_after_the_retries():
    calls: list[int] = []

    def refuse() -> FakeCluster:
        calls.append(1)
        raise ClusterUnreachable("refused")

    with pytest.raises(ClusterUnreachable):
        run(FakeCluster(), connect=refuse, max_retries=2)
    assert len(calls) == 3


def test_a_job_that_a_new_head_has_forgotten_is_sent_again():
    class Forgetful(FakeCluster):
        def logs(self, submission_id: str) -> Iterator[str]:
            yield "step 1\n"
            if len(self.submitted) == 1:
                self.jobs.clear()

    cluster = Forgetful(ends=[RUNNING, DONE])
    assert run(cluster).code == 0
    assert cluster.submitted == [A1, A1]


def test_no_address_of_a_ray_is_unreachable():
    with pytest.raises(ClusterUnreachable, match=r"answers at http://127\.0\.0\.1:9"):
        RayJobClient("http://127.0.0.1:9")


class Refuses(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b"Unauthorized: Missing authentication token")

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_cluster_that_wants_a_token_says_what_to_set():
    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(ConfigError, match="set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"):
                RayJobClient(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    recipe = {
        "run_dir": "/shared/my run",
        "golden": "g.parquet",
        "policy": "ar",
        "nar": "nar",
        "judges": [],
        "pairing": {"kinds": ["golden"]},
    }
    (tmp_path / "align.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def test_the_request_says_everything_about_the_run(project: Path):
    override = "training.loss.beta=0.2"
    request = plan_job("align", Path("align.yaml"), [override])
    digest = config_hash(load_config(AlignConfig, project / "align.yaml", [override]))
    assert request.submission_id(1) == f"my_run-align-{digest}-a1"
    assert request.entrypoint == f"exec python -m speechalign.cli align align.yaml {override}"
    assert request.runtime_env == {
        "working_dir": ".",
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"},
    }
    assert request.metadata == {
        "run": "my run",
        "verb": "align",
        "config_hash": digest,
        "output": "/shared/my run",
    }
    assert yaml.safe_load(request.in_words())["submission_id"] == request.submission_id(1)


def test_another_config_or_another_verb_is_another_job(project: Path):
    plans = [
        plan_job("align", Path("align.yaml")),
        plan_job("align", Path("align.yaml"), ["seed=1"]),
        plan_job("train", Path("align.yaml")),
    ]
    assert len({plan.name for plan in plans}) == 3
    assert [plan.is_repeated for plan in plans] == [False, False, True]


def test_a_runtime_environment_keeps_what_it_says(project: Path):
    path = project / "env.yaml"
    path.write_text("working_dir: .\nexcludes: [data]\nenv_vars: {RAY_JOB_STOP_WAIT_TIME_S: '9'}")
    assert plan_job("align", Path("align.yaml"), runtime_env=path).runtime_env == {
        "working_dir": ".",
        "excludes": ["data"],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "9"},
    }


@pytest.mark.parametrize(
    ("overrides", "environment", "message"),
    [
        (["training.loss.bta=1"], "", "did you mean 'beta'"),
        (["run_dir=runs/demo"], "", "run_dir=runs/demo is a relative path"),
        ([], "working_dir: other", "outside of the working directory"),
        ([], "env_vars: {OMP_NUM_THREADS: 1}", "must be strings"),
        ([], "- pip", "must hold a mapping"),
        ([], "{", "cannot be read"),
    ],
)
def test_a_mistake_is_found_before_anything_is_sent(
    project: Path, overrides: list[str], environment: str, message: str
):
    path = project / "env.yaml"
    path.write_text(environment)
    with pytest.raises(ConfigError, match=message):
        plan_job("align", Path("align.yaml"), overrides, path)


@pytest.mark.parametrize(
    ("verb", "recipe", "key"),
    [
        ("align", "align-embedded-cpu", "run_dir"),
        ("compare", "compare-embedded-cpu", "run_dir"),
        ("sft", "sft-ar-embedded-cpu", "sft.output"),
        ("prepare", "prepare-librispeech", "output"),
        ("reward-model", "reward-model-embedded-cpu", "output"),
    ],
)
def test_a_relative_output_is_refused_with_the_key_that_names_it(verb: str, recipe: str, key: str):
    with pytest.raises(ConfigError) as caught:
        plan_job(verb, Path(f"jobs/{recipe}.yaml"), [f"{key}=runs/x"])
    assert str(caught.value) == (
        f"{key}=runs/x is a relative path, and the job's working folder is deleted afterwards; "
        f"use a path on shared storage, e.g. {key}=/shared/runs/x"
    )


def test_who_leaves_knows_the_id_of_the_job_that_goes_on():
    def leave(_: str) -> None:
        raise KeyboardInterrupt

    cluster = FakeCluster(ends=[RUNNING], text={A1: ["step 1\n"]})
    submission = Submission(request=REQUEST, connect=lambda: cluster, show=leave)
    assert submission.when_left("http://head:8265").startswith("no job is known to be sent;")
    with pytest.raises(KeyboardInterrupt):
        submission.run()
    assert f"`ray job stop --address http://head:8265 {A1}`" in submission.when_left(
        "http://head:8265"
    )


def test_a_verb_that_is_no_job_is_refused():
    with pytest.raises(ConfigError, match="--verb doctor: a job runs one of prepare, sft"):
        plan_job("doctor", Path("align.yaml"))
