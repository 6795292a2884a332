"""PPO, GRPO and online DPO: one pipeline of rollouts beside the workers that learn from them.

prompts -> RolloutStage -> RenderStage -> a pool per judge -> shards of the Ray Train workers
^                                                          |
+----------------- published policy versions --------------+

The judges of `training.heldout` come last and hear held-out answers only.
"""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from speechalign.artifacts import manifest_facts
from speechalign.config.align import AlignConfig
from speechalign.config.online_training import OnlineTrainingConfig
from speechalign.errors import ConfigError
from speechalign.pipeline.sample import rollout_judging_stages, training_prompts
from speechalign.policy.ar import VOCABULARY
from speechalign.policy.prompt_format import answer_token_ids, prompt_token_ids
from speechalign.policy.versions import Probe
from speechalign.policy.vocabulary import Vocabulary
from speechalign.rewards.combine import rewards_of
from speechalign.rows import prompts_from_table
from speechalign.sampling.pipeline import rollout_stage, stream_blocks
from speechalign.sampling.rollouts import Sampler, plan_rollouts
from speechalign.seeds import derive_seed
from speechalign.training.launch import run_workers
from speechalign.training.online import (
    ALL_STEPS_DONE,
    ROLLOUTS,
    OnlineJob,
    OnlinePaths,
    finished_steps,
)
from speechalign.training.online_base import OnlineTask

if TYPE_CHECKING:
    from ray.data import Dataset

logger = logging.getLogger(__name__)

NUM_PROBES = 4


def train_online(config: AlignConfig, iteration: int, paths: OnlinePaths) -> None:
    """Train a policy on its own answers and commit its best version.

    Raises:
        ConfigError: too few prompts.
        Diverged: the loss stopped being finite before anything was better than the start.
        LogprobMismatch, StaleRollouts, BudgetExceeded: what a worker or a sampler found.
        RuntimeError: the workers died once too often.
    """
    training = config.training
    assert isinstance(training, OnlineTrainingConfig)  # noqa: S101 - the pipeline asked
    paths = OnlinePaths(
        policy=paths.policy.resolve(),
        reference=paths.reference.resolve(),
        output=paths.output.resolve(),
    )
    learned, heldout = _split(training_prompts(config, iteration), training)
    max_tokens = config.engine.max_model_len
    probes = probes_of(learned.slice(0, NUM_PROBES), paths.policy, max_tokens=max_tokens)
    job = OnlineJob(
        task=OnlineTask(
            config=training,
            temperature=config.sampling.temperatures[0],
            samples_per_prompt=config.sampling.samples_per_prompt,
        ),
        paths=paths,
        probes=probes,
        rewards=partial(rewards_of, config=config.reward),
        failure_budget=config.reward.failure_budget,
    )
    sampler = Sampler(
        versions=paths.versions,
        engine=config.engine,
        sampling=config.sampling,
        run_seed=config.seed,
        heldout_answers=training.heldout.answers_per_prompt,
        probes=probes,
        max_logprob_difference=training.max_logprob_difference,
        timeout_s=training.publication_timeout_s,
    )
    judging = rollout_judging_stages(config, paths.policy)
    stages = [
        rollout_stage(sampler, pool=config.pools.sample),
        # A stage that waits for fuller batches would wait for the next step, and that for this one.
        *(replace(stage, takes_whole_blocks=True) for stage in judging),
    ]

    def datasets() -> "dict[str, Dataset]":
        steps = range(finished_steps(paths), training.num_steps)
        return {ROLLOUTS: stream_blocks(plan_rollouts(learned, heldout, steps, training), stages)}

    run_workers(job, {}, training.workers, paths.work / "ray", datasets)
    say_why_it_ended(paths)


def say_why_it_ended(paths: OnlinePaths) -> None:
    """Log how a training ended: its workers know, and nobody sees their logs."""
    facts = manifest_facts(paths.output)
    logger.log(
        logging.INFO if facts["stop_reason"] == ALL_STEPS_DONE else logging.WARNING,
        "online training ended after %d steps: %s; the new policy is that of step %d",
        facts["num_steps"],
        facts["stop_reason"],
        facts["best_step"],
    )


def _split(prompts: pa.Table, training: OnlineTrainingConfig) -> tuple[pa.Table, pa.Table]:
    """Return the prompts to learn from, and those that are only looked at."""
    count = training.heldout.num_prompts
    if prompts.num_rows < count + training.prompts_per_step:
        raise ConfigError(
            f"{prompts.num_rows} prompts are fewer than the {count} of training.heldout and one "
            f"step of {training.prompts_per_step}; raise prompts.num_prompts"
        )
    rng = np.random.default_rng(derive_seed(training.seed, "heldout prompts"))
    order = rng.permutation(prompts.num_rows)
    return prompts.take(np.sort(order[count:])), prompts.take(np.sort(order[:count]))


def probes_of(prompts: pa.Table, policy: Path, *, max_tokens: int) -> tuple[Probe, ...]:
    """Return golden answers: nobody's training changes them.

    Args:
        prompts: rows.PROMPT; each leaves room for an answer.
        policy: knows their vocabulary.
        max_tokens: of prompt and answer that the engine takes, with one that it must generate.
    """
    vocabulary, facts = Vocabulary.load(policy / VOCABULARY), manifest_facts(policy)
    probes: list[Probe] = []
    for prompt in prompts_from_table(prompts):
        asked = prompt_token_ids(
            vocabulary,
            prompt.phonemes,
            prompt.speaker_codes_KT,
            prefix_frames=facts["prefix_frames"],
        )
        answer = answer_token_ids(vocabulary, prompt.golden_codes_KT)
        room = max_tokens - len(asked) - 1
        probes.append(Probe(prompt_token_ids=asked, answer_token_ids=answer[:room]))
    return tuple(probes)
