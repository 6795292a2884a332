"""Answers of a policy that is being trained: prompts in, samples of the version they ask for out.

Every block of prompts belongs to one training step and says how many steps the policy that
answers it must have behind it. The actor keeps its engine for the whole run, waits until that
version is published, loads it in place, and compares its log-probs of the probe with the trainer's.

The version to wait for is in the data, so the sampler runs ahead of the trainer by
`max_staleness` steps, never further, and in every run the same.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from speechalign.config.online_training import OnlineTrainingConfig
from speechalign.config.sampling import GenerationEngineConfig, SamplingConfig
from speechalign.errors import ConfigError, LogprobMismatch
from speechalign.generation.build import build_generation_engine
from speechalign.policy.versions import PolicyVersions, Probe, probe_logprobs_of
from speechalign.sampling.stages import SAMPLE_SECONDS, Speaker, with_seconds
from speechalign.seeds import derive_seed

STEP = pa.field("step", pa.int64(), nullable=False)
"""The training step that the rows are for."""
VERSION_STEP = pa.field("version_step", pa.int64(), nullable=False)
"""How many steps the answering policy must have behind it."""
IS_HELDOUT = pa.field("is_heldout", pa.bool_(), nullable=False)
"""Judged, never learned from."""
SAMPLED_FROM = pa.field("sampled_from_s", pa.float64(), nullable=False)
SAMPLED_UNTIL = pa.field("sampled_until_s", pa.float64(), nullable=False)
"""When the sampler worked on the block, on the wall clock; waiting for weights is not work."""
PROBE_DIFFERENCE = pa.field("probe_difference", pa.float32(), nullable=False)
"""Nats: the largest difference to the trainer on a token of the probe, at the last load."""


def plan_rollouts(
    prompts: pa.Table, heldout: pa.Table, steps: range, config: OnlineTrainingConfig
) -> list[pa.Table]:
    """Return the blocks of prompts of a training, one a step and worker, equal within a step.

    Args:
        prompts: rows.PROMPT to learn from; an epoch asks each at most once.
        heldout: rows.PROMPT that are asked at every look.
        steps: those to plan; a resumed run plans the rest.
        config: how they are dealt out.

    Returns:
        The blocks of a step for worker 0, 1, ..., then those of the next. After the last step
        comes one with held-out prompts only, for the final policy.

    Raises:
        ConfigError: the prompts do not fill a step.
    """
    blocks: list[pa.Table] = []
    for step in [*steps, steps.stop]:
        is_final = step == steps.stop
        version = step if is_final else max(0, step - config.max_staleness)
        looks = is_final or step % config.heldout.every == 0
        asked = heldout if looks else heldout.slice(0, 0)
        rows = [] if is_final else _rows_of_step(step, prompts.num_rows, config)
        learned = _taken(prompts, rows)
        for worker in range(config.workers.num_workers):
            every = slice(worker, None, config.workers.num_workers)
            parts = [
                _marked(_taken(table, range(table.num_rows)[every]), step, version, is_heldout)
                for table, is_heldout in ((learned, False), (asked, True))
            ]
            blocks.append(pa.concat_tables(parts))
    return blocks


def _taken(table: pa.Table, rows: Sequence[int]) -> pa.Table:
    return table.take(pa.array(rows, pa.int64()))


def _rows_of_step(step: int, num_prompts: int, config: OnlineTrainingConfig) -> list[int]:
    size = config.prompts_per_step
    if num_prompts < size:
        raise ConfigError(
            f"{num_prompts} prompts to learn from do not fill a step of {size}; lower "
            "training.prompts_per_step, or raise prompts.num_prompts"
        )
    epoch, index = divmod(step, num_prompts // size)
    rng = np.random.default_rng(derive_seed(config.seed, "rollouts", epoch))
    return rng.permutation(num_prompts)[index * size : (index + 1) * size].tolist()


def _marked(table: pa.Table, step: int, version: int, is_heldout: bool) -> pa.Table:
    marks: list[tuple[Any, Any]] = [
        (STEP, step),
        (VERSION_STEP, version),
        (IS_HELDOUT, is_heldout),
    ]
    return _with_constants(table, marks)


def _with_constants(table: pa.Table, values: Sequence[tuple[Any, Any]]) -> pa.Table:
    for field, value in values:
        column = pa.array([value] * table.num_rows, field.type)
        table = table.append_column(field, column)
    return table


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """What a sampler is told: it has no weights before the first version is published."""

    versions: Path
    engine: GenerationEngineConfig
    sampling: SamplingConfig
    run_seed: int
    heldout_answers: int
    """Answers to a held-out prompt; the others get `sampling.samples_per_prompt`."""
    probes: tuple[Probe, ...]
    max_logprob_difference: float
    timeout_s: float


class RolloutStage:
    """Blocks of `plan_rollouts` in; rows.SAMPLE with step, version, mark and times out."""

    def __init__(self, sampler: Sampler) -> None:
        self._told = sampler
        self._versions = PolicyVersions(sampler.versions)
        self._probes = [(p.prompt_token_ids, p.answer_token_ids) for p in sampler.probes]
        self._speaker: Speaker | None = None
        self._version = -1
        self._difference = 0.0

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Answer one block, as soon as its policy version is there.

        Raises:
            Diverged: the version never came.
            LogprobMismatch: sampler and trainer disagree about the probe.
        """
        first = batch.slice(0, 1).to_pylist()[0]  # a block is of one step and one version
        version, step = int(first["version_step"]), int(first["step"])
        folder = self._versions.wait_for(version, self._told.timeout_s)
        started_s = time.time()
        speaker = self._load(folder, version)
        seed, learned = self._told.run_seed, self._told.sampling.samples_per_prompt
        asked: list[tuple[bool, int, tuple[str | int, ...]]] = [
            (False, learned, (seed, "rollout", step)),
            (
                True,
                self._told.heldout_answers,
                (seed, "heldout rollout"),
            ),  # the same luck each time
        ]
        parts: list[pa.Table] = []
        for is_heldout, count, seed_parts in asked:
            mark = pa.scalar(is_heldout)
            prompts = batch.filter(pc.equal(batch["is_heldout"], mark))
            if prompts.num_rows:
                samples = speaker.answer(prompts, count, seed_parts)
                parts.append(_marked(samples, step, version, is_heldout))
        finished_s = time.time()
        times = [
            (SAMPLED_FROM, started_s),
            (SAMPLED_UNTIL, finished_s),
            (PROBE_DIFFERENCE, self._difference),
        ]
        table = _with_constants(pa.concat_tables(parts), times)
        return with_seconds(table, SAMPLE_SECONDS, finished_s - started_s)

    def _load(self, folder: Path, version: int) -> Speaker:
        """Return the speaker with the weights of a version, checked against the trainer."""
        if self._speaker is None:
            engine = build_generation_engine(folder, self._told.engine)
            self._speaker = Speaker(folder, engine, self._told.sampling)
        elif version == self._version:
            return self._speaker
        else:
            self._speaker.engine.load_policy(folder)
        self._version = version
        self._difference = self._probe(folder)
        return self._speaker

    def _probe(self, folder: Path) -> float:
        assert self._speaker is not None  # noqa: S101 - `_load` made it
        ours = self._speaker.engine.score(self._probes)
        theirs = probe_logprobs_of(folder)
        pairs = zip(ours, theirs, strict=True)
        # NumPy's: Python's own passes over what is not a number.
        difference = float(
            np.max([np.abs(np.subtract(mine, other)).max() for mine, other in pairs])
        )
        if not difference <= self._told.max_logprob_difference:  # also if it is not a number
            raise LogprobMismatch(
                f"sampler and trainer differ by {difference:.2e} nats on a token of the probe, "
                f"after the sampler loaded {folder}; more than "
                f"{self._told.max_logprob_difference:.0e}. Compare engine.dtype with "
                "training.engine.precision"
            )
        return difference
