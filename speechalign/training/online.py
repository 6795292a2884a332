"""PPO, GRPO and online DPO: rollouts in, one policy version after another out.

    block of rollouts -> look (held-out) -> learn -> publish the next version -> checkpoint

A Ray Train worker reads its shard of one streaming Ray Data pipeline; the samplers of that
pipeline wait for the versions that rank 0 publishes (policy.versions). The best version is the
one whose held-out answers had the highest reward; it becomes the new policy.

Killed, a training goes on from its last checkpoint and with the rollouts of the step after it.
"""

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import torch

from speechalign.artifacts import (
    is_committed,
    manifest_facts,
    recover_folder,
    verify_folder,
    write_json_atomically,
)
from speechalign.errors import (
    BudgetExceeded,
    Diverged,
    SpeechalignError,
    StaleRollouts,
    Stopped,
)
from speechalign.policy.answer_batch import collate_answers
from speechalign.policy.ar import load_ar, save_ar
from speechalign.policy.logprobs import answer_logprobs
from speechalign.policy.versions import PolicyVersions, Probe
from speechalign.seeds import derive_seed
from speechalign.training.checkpoint import checkpoint_folder, stop_is_asked
from speechalign.training.critic import Critic
from speechalign.training.engine import Engine, barrier, global_max, global_sum, world
from speechalign.training.metrics import MetricsWriter
from speechalign.training.online_base import Learner, NotFinite, OnlineTask, TrainedPolicy
from speechalign.training.online_dpo import OnlineDpo
from speechalign.training.online_looks import (
    JUDGED,
    Looks,
    idle_share,
    look_at,
    rewards_of_all,
    wer_of,
)
from speechalign.training.policy_gradient import PolicyGradient
from speechalign.training.rollouts import RewardOf, RolloutBlock, read_block
from speechalign.training.running_means import RunningMeans

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

ROLLOUTS = "rollouts"
"""The name of the dataset shard."""
STATE = "state.json"
ALL_STEPS_DONE = "all steps done"
"""The reason of a training that nothing stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlinePaths:
    """Where an online training reads and writes."""

    policy: Path
    reference: Path
    output: Path
    """Becomes the new policy; `<output>-work` holds versions, checkpoint and metrics."""

    @property
    def work(self) -> Path:
        """Where the state of an unfinished training is."""
        return self.output.with_name(f"{self.output.name}-work")

    @property
    def versions(self) -> Path:
        """Where the samplers look for weights."""
        return self.work / "versions"

    @property
    def checkpoint(self) -> Path:
        """The last one."""
        return self.work / "checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineJob:
    """Everything a worker is told; plain values and one function, so that it can be sent."""

    task: OnlineTask
    paths: OnlinePaths
    probes: tuple[Probe, ...]
    rewards: RewardOf
    failure_budget: float

    @property
    def __name__(self) -> str:  # what Ray Train calls the function
        return "online_worker"

    def __call__(self, settings: Mapping[str, Any]) -> None:
        """Train on this rank."""
        import ray.train

        del settings
        shard: Any = ray.train.get_dataset_shard(ROLLOUTS)  # typed as if it could be missing
        trainer = OnlineTrainer(self)
        # Ray would hold a block back until the next is there, and that one waits for this trainer.
        blocks = shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        trainer.run(blocks)
        if world()[0] == 0:
            trainer.commit()
        barrier()


@dataclass(slots=True, kw_only=True)
class Progress:
    """What a checkpoint keeps beside the weights."""

    step: int = 0
    looks: Looks = field(default_factory=Looks)
    num_answers: int = 0
    num_without_reward: int = 0
    largest_probe_difference: float = 0.0


def finished_steps(paths: OnlinePaths) -> int:
    """Return how many steps the last checkpoint has behind it."""
    recover_folder(paths.checkpoint)
    if not is_committed(paths.checkpoint):
        return 0
    return int(manifest_facts(paths.checkpoint)["step"])


class OnlineTrainer:
    """One rank of a training."""

    def __init__(self, job: OnlineJob) -> None:
        self._job, self._config, self._paths = job, job.task.config, job.paths
        torch.manual_seed(derive_seed(self._config.seed, "online"))
        loaded = load_ar(job.paths.policy, dtype="fp32")
        self._vocabulary, self._facts = loaded.vocabulary, dict(loaded.facts)
        num_micro = job.task.num_micro_batches
        engine_config = self._config.engine.model_copy(update={"num_accumulated": num_micro})
        num_updates = self._config.num_steps * self._config.updates_per_step
        self._engine = Engine(loaded.model, engine_config, num_updates)
        reference = load_ar(job.paths.reference, dtype="fp32").model
        moved: Any = reference  # to() is decorated beyond what a type checker follows
        moved.to(self._engine.device)
        self._policy = TrainedPolicy(self._engine, reference, job.task.temperature)
        self._critic: Critic | None = None
        if self._config.method == "ppo":
            self._critic = Critic(self._config, job.paths.policy, num_micro)
        self._learner: Learner = (
            OnlineDpo(job.task, self._policy)
            if self._config.method == "online_dpo"
            else PolicyGradient(job.task, self._policy, self._critic)
        )
        warmup = self._config.ppo.critic_warmup_steps
        self._progress = Progress(looks=Looks(num_warmup_steps=warmup))
        self._stop_reason = ALL_STEPS_DONE
        self._failure: type[SpeechalignError] | None = None
        """Of what the training ends with, unless something was better than the start."""
        self._busy: list[tuple[float, float]] = []
        self._idle_share = 0.0
        self._versions = PolicyVersions(job.paths.versions)
        self._resume()

    def run(self, blocks: Iterable[pa.Table]) -> None:
        """Learn from one block after another until the last, or until a guard says stop.

        Raises:
            Diverged: a loss was not finite before anything was better than the start.
            BudgetExceeded: too many answers had no reward before anything was.
        """
        config, started_s = self._config, time.time()
        first = self._progress.step
        writes = world()[0] == 0
        with MetricsWriter(self._paths.work, is_writer=writes, resumed_at=first) as metrics:
            waiting_since_s = time.time()
            for table in blocks:
                arrived_s = time.time()
                block = self._read(table)
                values = {"wait_s": arrived_s - waiting_since_s}
                reason = self._look(block, metrics)
                if block.step > first and block.step % config.checkpoint_every == 0:
                    self._save()
                self._stop_if_asked(reason)
                reason = self._count(block) or reason
                if reason is None and block.step < config.num_steps:
                    reason = self._learn(block, values, metrics)
                    self._stop_if_asked(reason)
                waiting_since_s = time.time()
                self._busy += [block.sampled_s, (arrived_s, waiting_since_s)]
                if reason is not None:
                    self._stop_reason = reason
                    break
            if writes:
                self._versions.stop(self._stop_reason)
            self._idle_share = idle_share(self._busy, started_s, time.time())
            last = {"both_idle_share": self._idle_share, "stopped": self._stop_reason}
            metrics.write(self._progress.step, last)
        logger.info(
            "online training stopped at step %d: %s", self._progress.step, self._stop_reason
        )
        if self._failure is not None and not self._progress.looks.best_step:
            raise self._failure(f"{self._stop_reason}; nothing before was better than the start")

    def commit(self) -> None:
        """Make the best version the new policy."""
        progress, looks = self._progress, self._progress.looks
        kept = load_ar(self._versions.path(looks.best_step))
        own = {
            "stop_reason": self._stop_reason,
            "num_steps": progress.step,
            "best_step": looks.best_step,
            "best_heldout_reward": looks.best_reward,
            "num_answers": progress.num_answers,
            "num_without_reward": progress.num_without_reward,
            "largest_probe_difference": progress.largest_probe_difference,
            "both_idle_share": self._idle_share,
            "policy_version": kept.facts["policy_version"],
        }
        save_ar(self._paths.output, kept.model, kept.vocabulary, self._facts | own)

    def _resume(self) -> None:
        """Go on from the checkpoint, or start; then publish the version that comes first."""
        checkpoint = self._paths.checkpoint
        if is_committed(checkpoint):
            verify_folder(checkpoint)
            self._engine.load(checkpoint / "policy")
            if self._critic is not None:
                self._critic.engine.load(checkpoint / "critic")
            state = json.loads((checkpoint / STATE).read_text())
            self._learner.restore(state["learner"])
            looks = Looks(**state["progress"].pop("looks"))
            self._progress = Progress(looks=looks, **state["progress"])
            logger.info("resumed after step %d", self._progress.step)
        step = self._progress.step
        if world()[0] == 0:
            self._versions.restart(step)
        barrier()
        self._publish(step)

    def _read(self, table: pa.Table) -> RolloutBlock:
        start_version = int(self._facts["policy_version"])
        block = read_block(table, self._job.rewards, start_version)
        if block.step != self._progress.step:
            raise StaleRollouts(
                f"rollouts of step {block.step} came when those of {self._progress.step} were due"
            )
        return block

    def _count(self, block: RolloutBlock) -> str | None:
        """Count the answers; return why to stop if too many of them have no reward."""
        progress = self._progress
        answers = [*block.learned, *block.heldout]
        missing = sum(rollout.reward is None for rollout in answers)
        counts = torch.tensor([float(len(answers)), float(missing)], device=self._engine.device)
        num_answers, num_missing = global_sum(counts).tolist()
        progress.num_answers += int(num_answers)
        progress.num_without_reward += int(num_missing)
        probe = global_max(torch.tensor(block.probe_difference, device=self._engine.device))
        largest = max(progress.largest_probe_difference, float(probe))
        progress.largest_probe_difference = largest
        if progress.num_without_reward <= self._job.failure_budget * progress.num_answers:
            return None
        self._failure = BudgetExceeded
        return (
            f"{progress.num_without_reward} of {progress.num_answers} answers have no reward "
            f"after step {block.step}; {self._job.failure_budget:.0%} may lack one"
        )

    def _look(self, block: RolloutBlock, metrics: MetricsWriter) -> str | None:
        """Measure the held-out answers, if the block has some; return why to stop."""
        looks = self._progress.looks
        version = block.step if block.step == self._config.num_steps else self._version_of(block)
        if not block.heldout or version <= looks.last_step:  # seen before the checkpoint
            return None
        judged = self._judged(block.heldout_measures)
        look = look_at(block.heldout, self._policy, self._config.answers_per_forward)
        look |= wer_of(judged)
        shown = look | judged
        metrics.write(version, {f"heldout_{key}": value for key, value in shown.items()})
        rewards = rewards_of_all(block.heldout, self._engine.device)
        return looks.see(version, look, rewards, self._config.guards)

    def _version_of(self, block: RolloutBlock) -> int:
        return max(0, block.step - self._config.max_staleness)

    def _learn(
        self, block: RolloutBlock, values: dict[str, float], metrics: MetricsWriter
    ) -> str | None:
        began_s = time.time()
        try:
            values |= self._learner.learn(block.learned, block.step)
        except NotFinite as error:
            self._failure = Diverged
            return f"step {block.step}: {error}; lower training.engine.learning_rate"
        learned_s = time.time()
        self._progress.step = block.step + 1
        values |= self._described(block)
        self._publish(self._progress.step)
        published_s = time.time()
        values |= {
            "learn_s": learned_s - began_s,
            "publish_s": published_s - learned_s,
            "sample_s": block.sampled_s[1] - block.sampled_s[0],
            "probe_difference": block.probe_difference,
            "grad_norm": self._engine.grad_norm,
            "learning_rate": self._engine.learning_rate,
        }
        metrics.write(self._progress.step, values)
        return self._progress.looks.guard_step(values, block.step, self._config.guards)

    def _described(self, block: RolloutBlock) -> dict[str, float]:
        """Return what the answers were like, over all ranks."""
        means = RunningMeans(["reward", "length", "stop_share", "rewarded_share"])
        rewards = [r.reward for r in block.learned if r.reward is not None]
        means.add("reward", torch.tensor(rewards))
        means.add("rewarded_share", torch.tensor([r.reward is not None for r in block.learned]))
        means.add("length", torch.tensor([len(r.token_ids) for r in block.learned]))
        means.add("stop_share", torch.tensor([not r.is_truncated for r in block.learned]))
        return means.over_ranks(self._engine.device) | self._judged(block.measures)

    def _judged(self, measures: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Return the means of what judges measured, over all ranks."""
        names = {name: JUDGED + name for name in sorted(measures)}
        means = RunningMeans(list(names.values()))
        for name, shown in names.items():
            means.add(shown, torch.tensor(measures[name]))
        return means.over_ranks(self._engine.device)

    def _publish(self, step: int) -> None:
        probe_logprobs = self._probe_logprobs()
        with self._engine.whole_weights() as model:
            if world()[0] == 0 and not is_committed(self._versions.path(step)):
                policy = cast("PreTrainedModel", model)  # load_ar made it
                self._versions.publish(step, policy, self._vocabulary, self._facts, probe_logprobs)
        barrier()

    @torch.no_grad()
    def _probe_logprobs(self) -> Sequence[Sequence[float]]:
        rows = [(probe.prompt_token_ids, probe.answer_token_ids) for probe in self._job.probes]
        batch = collate_answers(rows).to(self._engine.device)
        with self._engine.autocast():
            logits_BSV = self._engine.module(
                input_ids=batch.input_ids_BS,
                attention_mask=batch.attention_mask_BS,
                use_cache=False,
            ).logits
        logprobs_BS = answer_logprobs(logits_BSV, batch.input_ids_BS, batch.answer_mask_BS)
        return [
            logprobs_S[mask_S].tolist()
            for logprobs_S, mask_S in zip(logprobs_BS, batch.answer_mask_BS, strict=True)
        ]

    def _stop_if_asked(self, reason: str | None) -> None:
        """Save and end if the driver was asked to, unless a guard ends the training anyway."""
        if reason is not None or not stop_is_asked(self._paths.work, self._engine.device):
            return
        self._save()
        if world()[0] == 0:
            self._versions.stop("it was asked to")
        logger.info("saved after step %d, and stopped", self._progress.step)
        raise Stopped

    def _save(self) -> None:
        """Commit a checkpoint; then the versions that only an older one needs can go."""
        step, is_first = self._progress.step, world()[0] == 0
        with checkpoint_folder(self._paths.checkpoint, {"step": step}) as partial:
            self._engine.save(partial / "policy")
            if self._critic is not None:
                self._critic.engine.save(partial / "critic")
            if is_first:
                state = {"progress": asdict(self._progress), "learner": self._learner.state()}
                write_json_atomically(partial / STATE, state)
        if is_first:
            best = self._progress.looks.best_step
            self._versions.forget_before(step - self._config.max_staleness, but=best)
        barrier()
