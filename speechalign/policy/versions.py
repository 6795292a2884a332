"""The versions of a policy in training: how the trainer's weights reach the samplers.

    FOLDER/v000000  v000001  ...      each a committed AR policy, whole or absent
    FOLDER/stopped                    the trainer will publish no more, and why

A version is published by a rename, after its files were hashed; whoever waits for it polls, so
that all it takes is a file system that trainer and samplers share. Each carries the trainer's
log-probs of a few fixed answers (`Probe`), for the sampler to compare with its own.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speechalign.artifacts import is_committed, manifest_facts
from speechalign.errors import Diverged
from speechalign.policy.ar import save_ar
from speechalign.policy.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POLL_S = 0.02
STOPPED = "stopped"
PROBE = "probe_logprobs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A prompt and an answer that no training changes."""

    prompt_token_ids: tuple[int, ...]
    answer_token_ids: tuple[int, ...]


class PolicyVersions:
    """The folder of the versions, seen from either side."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, step: int) -> Path:
        """Return the folder of the policy after `step` steps."""
        return self._folder / f"v{step:06d}"

    def publish(
        self,
        step: int,
        model: "PreTrainedModel",
        vocabulary: Vocabulary,
        facts: Mapping[str, Any],
        probe_logprobs: Sequence[Sequence[float]],
    ) -> None:
        """Commit a version.

        Args:
            step: how many steps the weights have behind them.
            model: whole, on one rank.
            vocabulary: of the policy.
            facts: of the policy at the start; its version is raised by `step`.
            probe_logprobs: the trainer's, of each probe's answer.
        """
        own = {
            "policy_version": int(facts["policy_version"]) + step,
            PROBE: [list(logprobs) for logprobs in probe_logprobs],
        }
        save_ar(self.path(step), model, vocabulary, dict(facts) | own)

    def wait_for(self, step: int, timeout_s: float) -> Path:
        """Return the folder of a version as soon as it is there.

        Raises:
            Diverged: the trainer stopped, or nothing came in time.
        """
        deadline_s = time.monotonic() + timeout_s
        while not is_committed(self.path(step)):
            if (self._folder / STOPPED).exists():
                raise Diverged(
                    f"the trainer stopped before version {step}: "
                    f"{(self._folder / STOPPED).read_text()}"
                )
            if time.monotonic() > deadline_s:
                raise Diverged(
                    f"{self.path(step)} was not published within {timeout_s:g} s; is the folder "
                    "shared by all nodes? raise training.publication_timeout_s for larger steps"
                )
            time.sleep(POLL_S)
        return self.path(step)

    def stop(self, reason: str) -> None:
        """Tell those who wait that nothing more will come."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / STOPPED).write_text(reason)

    def restart(self, step: int) -> None:
        """Forget what a former life published after `step`, and that it stopped."""
        (self._folder / STOPPED).unlink(missing_ok=True)
        self._remove(lambda number: number > step)

    def forget_before(self, step: int, *, but: int) -> None:
        """Remove the versions that no sampler will ask for again, but one."""
        self._remove(lambda number: number < step and number != but)

    def _remove(self, is_gone: Callable[[int], bool]) -> None:
        for folder in self._folder.glob("v*"):
            if is_gone(int(folder.name.removeprefix("v"))):
                shutil.rmtree(folder)


def probe_logprobs_of(folder: Path) -> list[list[float]]:
    """Return the trainer's log-probs of the probes, as published with a version."""
    return manifest_facts(folder)[PROBE]
