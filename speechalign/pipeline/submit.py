"""`speechalign submit`: one recipe as a Ray job that can be lost, stopped and sent again.

The id of a job is made of what it does, <run>-<verb>-<config hash>-a<attempt>: the same command
finds the job of the last time. One that runs is attached to, and so is one that has succeeded, but
for a single stage: that is done for one iteration, and the next attempt does it for the next. After
a job that was stopped or failed the next attempt resumes the run from its folder. What the
infrastructure broke is tried again here; what the recipe, the data or the training broke is not.
"""

import logging
import re
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, cast

import yaml

from speechalign.config.align import AlignConfig
from speechalign.config.base import Config
from speechalign.config.compare import CompareConfig
from speechalign.config.load import config_hash, load_config
from speechalign.config.prepare import PrepareConfig
from speechalign.config.training import RewardModelConfig, SftJob
from speechalign.errors import ClusterUnreachable, ConfigError
from speechalign.locks import STALE_AFTER_S
from speechalign.training.stopping import STOP_WAIT, STOPPED_CODE, STOPPED_WORDS

logger = logging.getLogger(__name__)

VERBS: dict[str, type[Config]] = {
    "prepare": PrepareConfig,
    "sft": SftJob,
    "reward-model": RewardModelConfig,
    "sample": AlignConfig,
    "judge": AlignConfig,
    "pair": AlignConfig,
    "train": AlignConfig,
    "evaluate": AlignConfig,
    "align": AlignConfig,
    "compare": CompareConfig,
}
STAGES = ("sample", "judge", "pair", "train", "evaluate")
"""Verbs that do one stage of the next unfinished iteration."""
RUNTIME_ENV = Path("jobs/runtime_env.yaml")
"""Used where no other file is named and this one exists."""
DEFAULT_STOP_WAIT_S = "120"
"""Ray's own 3 s are too few to write a checkpoint."""

PASSED_ON = (2, 3, 4, STOPPED_CODE)
"""Exit codes of `speechalign` that mean something to a job system."""
KILLED_CODE, OTHER_CODE = 137, 1
BROKEN_BY_RAY = (
    "JOB_SUPERVISOR_ACTOR_START_TIMEOUT",
    "JOB_SUPERVISOR_ACTOR_START_FAILURE",
    "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE",
    "JOB_SUPERVISOR_ACTOR_DIED",
)
"""Error types of a job whose node or supervisor went away; the driver is not to blame."""
WAIT_AFTER_DEATH_S = STALE_AFTER_S + 5.0
"""So long the lock of a driver that died on another host looks alive."""
WAIT_UNREACHABLE_S = 10.0
KEPT_CHARACTERS = 4000
"""Of the end of the log."""

Status: TypeAlias = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """What the cluster says of a job."""

    status: Status
    exit_code: int | None = None
    """Of the driver; Ray keeps none of a job that was stopped."""
    error_type: str | None = None
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """Everything that is sent, but for the number of the attempt."""

    name: str
    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    is_repeated: bool = False
    """Whether there is more to do after a success."""

    def submission_id(self, attempt: int) -> str:
        """Return the id of an attempt."""
        return f"{self.name}-a{attempt}"

    def in_words(self) -> str:
        """Return the request as YAML, for a dry run."""
        values = {
            "submission_id": self.submission_id(1),
            "entrypoint": self.entrypoint,
            "runtime_env": self.runtime_env,
            "metadata": self.metadata,
        }
        return yaml.safe_dump(values, sort_keys=False)


class JobClient(Protocol):
    """The part of Ray's jobs API that is used; every call may raise ClusterUnreachable."""

    def submit(self, request: JobRequest, submission_id: str) -> bool:
        """Send a job; return False if there is one of this id."""
        ...

    def state(self, submission_id: str) -> JobState | None:
        """Return what has become of a job, or nothing if the cluster knows none of this id."""
        ...

    def logs(self, submission_id: str) -> Iterable[str]:
        """Yield the log from its beginning, until the job is over."""
        ...


def plan_job(
    verb: str, recipe: Path, overrides: Sequence[str] = (), runtime_env: Path | None = None
) -> JobRequest:
    """Check a recipe as the job will, and return what to send.

    Raises:
        ConfigError: the recipe is wrong, would not reach the cluster, or writes where nobody
            finds it again.
    """
    if verb not in VERBS:
        raise ConfigError(f"--verb {verb}: a job runs one of {', '.join(VERBS)}")
    config = load_config(VERBS[verb], recipe, overrides)
    key, output = output_of(config)
    if not output.is_absolute():
        raise ConfigError(
            f"{key}={output} is a relative path, and the job's working folder is deleted "
            f"afterwards; use a path on shared storage, e.g. {key}=/shared/runs/{output.name}"
        )
    environment = _read_runtime_env(runtime_env)
    command = ["python", "-m", "speechalign.cli", verb]
    command += [_within(recipe, Path(environment["working_dir"])), *overrides]
    run, digest = re.sub(r"[^A-Za-z0-9_.-]", "_", output.name), config_hash(config)
    return JobRequest(
        name=f"{run}-{verb}-{digest}",
        # exec: the exit code and the signals are then the driver's, not those of a shell.
        entrypoint="exec " + shlex.join(command),
        runtime_env=environment,
        metadata={"run": output.name, "verb": verb, "config_hash": digest, "output": str(output)},
        is_repeated=verb in STAGES,
    )


def output_of(config: Config) -> tuple[str, Path]:
    """Return the key and the folder that a job writes, by which a person knows it."""
    match config:
        case AlignConfig() | CompareConfig():
            return "run_dir", config.run_dir
        case SftJob():
            return "sft.output", config.sft.output
        case PrepareConfig() | RewardModelConfig():
            return "output", config.output
        case _:
            raise TypeError(f"{type(config).__name__} is no job")


@dataclass(slots=True, kw_only=True)
class Submission:
    """One call of `speechalign submit`.

    Args:
        request: what to send.
        connect: makes a client; called again after the cluster was out of reach.
        show: gets every piece of the log, once.
        max_retries: new starts after failures of the infrastructure.
        sleep: waits some seconds.
    """

    request: JobRequest
    connect: Callable[[], JobClient]
    show: Callable[[str], None]
    max_retries: int = 2
    sleep: Callable[[float], None] = time.sleep
    _shown: dict[str, int] = field(default_factory=dict[str, int])
    _end_of_log: str = ""
    job: str = ""
    """The id of the one that is followed; empty until it was sent or found."""
    _failures: int = 0
    """To reach the cluster, in a row."""

    def send(self) -> str:
        """Submit or attach, and return the id without waiting for the job.

        Raises:
            ConfigError: the cluster wants a token, or refuses the request.
            ClusterUnreachable: nobody answers, after all retries.
        """
        return self._retried(lambda: claim(self.connect(), self.request))

    def run(self) -> int:
        """Submit or attach, follow to the end, and return the exit code.

        0: done; 2, 3, 4: a mistake in the config, bad data, diverged; 143: stopped, and what was
        done is saved; 137: killed before it could save; 1: anything else.

        Raises:
            ConfigError: the cluster wants a token, or refuses the request.
            ClusterUnreachable: nobody answers, after all retries.
        """
        num_lost = 0
        while True:
            job, state = self._retried(self._follow)
            if not is_infrastructure(state):
                return self._conclude(job, state)
            logger.warning("%s was lost: %s", job, state.message or state.error_type)
            if num_lost == self.max_retries:
                logger.error("%d attempts were lost; the same command makes another", num_lost + 1)
                return OTHER_CODE
            self._wait(WAIT_AFTER_DEATH_S, num_lost)
            num_lost += 1

    def when_left(self, address: str) -> str:
        """Return what a person should know who does not wait for the end."""
        if not self.job:
            return "no job is known to be sent; the same command attaches to one that was"
        return f"the job goes on, `ray job stop --address {address} {self.job}` ends it"

    def _follow(self) -> tuple[str, JobState]:
        client = self.connect()
        self.job = job = claim(client, self.request, followed=self.job)
        while True:
            self._show_new(client, job)
            state = client.state(job)
            if state is None:
                raise ClusterUnreachable(f"the cluster has forgotten {job}; was its head replaced?")
            self._failures = 0
            if state.status in ("STOPPED", "SUCCEEDED", "FAILED"):
                self._show_new(client, job)  # what it said between the two questions
                return job, state
            self.sleep(1.0)

    def _show_new(self, client: JobClient, job: str) -> None:
        position = 0
        for text in client.logs(job):
            new = text[max(0, self._shown.get(job, 0) - position) :]
            position += len(text)
            if new:
                self.show(new)
                self._shown[job] = position
                self._end_of_log = (self._end_of_log + new)[-KEPT_CHARACTERS:]

    def _conclude(self, job: str, state: JobState) -> int:
        code = exit_code_of(state, self._end_of_log)
        logger.info("%s: %s, exit code %d", job, state.status.lower(), code)
        if code in (STOPPED_CODE, KILLED_CODE):
            logger.info("the same `speechalign submit` resumes it")
        return code

    def _retried(self, call: Callable[[], Any]) -> Any:
        while True:
            try:
                return call()
            except ClusterUnreachable as error:
                if self._failures == self.max_retries:
                    raise
                logger.warning("%s", error)
            self._wait(WAIT_UNREACHABLE_S, self._failures)
            self._failures += 1

    def _wait(self, first_s: float, retry: int) -> None:
        seconds = first_s * 2**retry
        logger.warning("trying again in %.0f s (%d of %d)", seconds, retry + 1, self.max_retries)
        self.sleep(seconds)


def claim(client: JobClient, request: JobRequest, *, followed: str = "") -> str:
    """Return the id of the attempt that is to be followed, submitting one if none will do.

    Args:
        client: of the cluster.
        request: what to send.
        followed: the attempt that this call has followed until the cluster was out of reach; its
            success is the one that was waited for.
    """
    attempt = 1
    while True:
        job = request.submission_id(attempt)
        state = client.state(job)
        if state is None:
            if client.submit(request, job):
                logger.info("submitted %s", job)
                return job
            continue  # somebody else sent it at this moment: look again
        is_done = state.status == "SUCCEEDED" and (job == followed or not request.is_repeated)
        if is_done or state.status in ("PENDING", "RUNNING"):
            logger.info("attached to %s, which is %s", job, state.status.lower())
            return job
        attempt += 1


def is_infrastructure(state: JobState) -> bool:
    """Whether a job was lost through no fault of its own: its driver or its node was killed."""
    if state.status != "FAILED":
        return False
    if state.exit_code is None:
        return state.error_type in BROKEN_BY_RAY
    return state.exit_code < 0 or state.exit_code in (KILLED_CODE, STOPPED_CODE)


def exit_code_of(state: JobState, end_of_log: str) -> int:
    """Return what a job's end means; one that was stopped says in its log whether it saved."""
    if state.status == "SUCCEEDED":
        return 0
    if state.status == "STOPPED":
        return STOPPED_CODE if STOPPED_WORDS in end_of_log else KILLED_CODE
    return state.exit_code if state.exit_code in PASSED_ON else OTHER_CODE


def _read_runtime_env(path: Path | None) -> dict[str, Any]:
    values: Any = {}
    found = path or (RUNTIME_ENV if RUNTIME_ENV.exists() else None)
    if found is not None:
        try:
            values = yaml.safe_load(found.read_text()) or {}
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"runtime environment {found} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"runtime environment {found} must hold a mapping, e.g. env_vars")
    environment: dict[str, Any] = {"working_dir": "."} | cast("dict[str, Any]", values)
    variables: dict[str, Any] = {STOP_WAIT: DEFAULT_STOP_WAIT_S}
    variables |= cast("dict[str, Any]", environment.get("env_vars") or {})
    wrong = sorted(name for name, value in variables.items() if not isinstance(value, str))
    if wrong:
        raise ConfigError(f"{found}: env_vars {wrong} must be strings; put quotes around them")
    return environment | {"env_vars": variables}


def _within(recipe: Path, working_dir: Path) -> str:
    """Return the recipe's path inside what is uploaded."""
    try:
        return str(recipe.resolve().relative_to(working_dir.resolve()))
    except ValueError:
        raise ConfigError(
            f"{recipe} is outside of the working directory {working_dir.resolve()}, which is all "
            "that reaches the cluster; copy it there, or name another working_dir in --runtime-env"
        ) from None
