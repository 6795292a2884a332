"""Ray's jobs API: its many exceptions become ours."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from speechalign.errors import ClusterUnreachable, ConfigError
from speechalign.pipeline.submit import JobRequest, JobState

logger = logging.getLogger(__name__)

TOKEN_HINT = (
    "the cluster at {address} wants a token, and an explicit address never sends one by itself: "
    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH (`ray get-auth-token` on "
    "the head prints the cluster's)"
)


class RayJobClient:
    """A `JobClient` of a real cluster.

    Raises:
        ConfigError: the address is none, or the token is missing or wrong.
        ClusterUnreachable: nobody answers there.
    """

    def __init__(self, address: str) -> None:
        from ray.job_submission import JobSubmissionClient

        self._address = address
        with self._translated():
            self._client = JobSubmissionClient(address)

    def submit(self, request: JobRequest, submission_id: str) -> bool:
        """Upload the working directory and send a job; False if there is one of this id."""
        with self._translated():
            try:
                self._client.submit_job(
                    entrypoint=request.entrypoint,
                    submission_id=submission_id,
                    runtime_env=request.runtime_env,
                    metadata=dict(request.metadata),
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    return False
                raise
        return True

    def state(self, submission_id: str) -> JobState | None:
        """Return what has become of a job."""
        with self._translated():
            try:
                details = self._client.get_job_info(submission_id)
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise
        return JobState(
            status=details.status.value,
            exit_code=details.driver_exit_code,
            error_type=details.error_type,
            message=(details.message or "").splitlines()[0] if details.message else "",
        )

    def logs(self, submission_id: str) -> Iterator[str]:
        """Yield the log from its beginning, until the job is over."""
        pieces: AsyncIterator[str] = self._client.tail_job_logs(submission_id)
        with asyncio.Runner() as runner, self._translated():
            try:
                while True:
                    yield runner.run(_next(pieces))
            except StopAsyncIteration:
                return

    @contextmanager
    def _translated(self) -> Iterator[None]:
        import aiohttp
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise ConfigError(TOKEN_HINT.format(address=self._address)) from None
        except (OSError, requests.RequestException, aiohttp.ClientError) as error:
            raise ClusterUnreachable(
                f"no Ray cluster answers at {self._address} ({_first_line(error)})"
            ) from None
        except RuntimeError as error:  # what the server answered, and a log that broke off
            if "status code 4" in str(error):
                raise ConfigError(
                    f"the cluster refuses the request: {_first_line(error)}"
                ) from None
            raise ClusterUnreachable(f"the cluster failed: {_first_line(error)}") from None
        except ValueError as error:
            raise ConfigError(f"the request cannot be sent: {error}") from None


async def _next(pieces: AsyncIterator[str]) -> str:
    return await anext(pieces)


def _first_line(error: Any) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
