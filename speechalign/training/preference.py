"""Training on pairs: DPO, fine-tuning on the chosen, chain of hindsight.

Ray Train workers, each with a DeepSpeed engine:

    pairs -> held-out split by prompt -> updates -> looks at the held-out pairs -> best policy

The reference's log-probs come from a cache, so a worker holds one model. At step 0 policy and
reference are one, and DPO's loss must be ln 2: the run stops if it is not.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import PreTrainedModel

from speechalign.artifacts import is_committed, manifest_facts, verify_folder
from speechalign.config.preference_training import PreferenceTrainingConfig
from speechalign.errors import ConfigError, Diverged, LogprobMismatch
from speechalign.policy.ar import LoadedPolicy, load_ar, save_ar
from speechalign.rows import pairs_from_table
from speechalign.seeds import derive_seed
from speechalign.training.batches import BatchPlan, rows_of_rank
from speechalign.training.early_stop import EarlyStop, Look
from speechalign.training.engine import Engine, barrier, global_mean, global_sum, world
from speechalign.training.launch import run_workers
from speechalign.training.losses import (
    PairLogprobs,
    PairLoss,
    loss_of_an_unmoved_policy,
    pair_loss,
    reference_point,
)
from speechalign.training.metrics import MetricsWriter
from speechalign.training.reference import (
    answer_sums,
    cached_reference_logprobs,
    mismatched,
    pair_logprobs,
)
from speechalign.types import PreferencePair

logger = logging.getLogger(__name__)

PAIRS = "pairs.parquet"
STEP0_TOLERANCE = 1e-3
MAX_BAD_UPDATES = 3

ReferenceLogprobs = Mapping[str, tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPaths:
    """Where a training reads and writes."""

    policy: Path
    """The policy to start from; also the reference, unless `reference` says otherwise."""
    reference: Path
    pairs: Path
    """A committed folder with `pairs.parquet`."""
    output: Path
    """Becomes the new policy; `<output>-work` holds metrics, the cache and the best weights."""

    @property
    def work(self) -> Path:
        """Where the state of an unfinished training is."""
        return self.output.with_name(f"{self.output.name}-work")


def train_on_pairs(config: PreferenceTrainingConfig, paths: TrainingPaths) -> None:
    """Train on pairs and commit the best policy, its version one higher.

    Raises:
        ConfigError: too few pairs for the workers.
        Diverged: the loss stopped being finite.
        LogprobMismatch: the loss at step 0 is not that of an unmoved policy.
    """
    pairs = read_pairs(paths.pairs)
    train, _ = split_pairs(pairs, config.heldout_share, config.seed)
    if len(train) < max(config.pairs_per_step, config.workers.num_workers):
        raise ConfigError(
            f"{len(train)} training pairs do not fill one step of {config.pairs_per_step} pairs "
            f"on {config.workers.num_workers} workers; make more pairs or lower pairs_per_step"
        )
    if config.pairs_per_step < config.workers.num_workers:
        raise ConfigError("pairs_per_step is lower than the number of workers; raise it")
    cached_reference_logprobs(
        paths.reference, pairs, paths.work / "reference", config.engine.precision
    )
    settings = {
        "config": config.model_dump(mode="json"),
        "paths": {
            name: str(getattr(paths, name).resolve())
            for name in ("policy", "reference", "pairs", "output")
        },
    }
    run_workers(preference_worker, settings, config.workers, paths.work / "ray")


def read_pairs(folder: Path) -> list[PreferencePair]:
    """Return the pairs of a committed folder."""
    verify_folder(folder)
    return pairs_from_table(pq.read_table(folder / PAIRS))


def split_pairs(
    pairs: Sequence[PreferencePair], heldout_share: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Return (training, held-out) pairs; the pairs of one prompt stay together."""
    limit = round(heldout_share * 10_000)
    train: list[PreferencePair] = []
    heldout: list[PreferencePair] = []
    for pair in pairs:
        is_heldout = derive_seed(seed, "heldout", pair.prompt_id) % 10_000 < limit
        (heldout if is_heldout else train).append(pair)
    if not heldout:  # a handful of pairs, by chance all on one side
        heldout = [pair for pair in train if pair.prompt_id == train[-1].prompt_id]
        train = [pair for pair in train if pair.prompt_id != train[-1].prompt_id]
    return train, heldout


def preference_worker(settings: dict[str, Any]) -> None:
    """Train on this rank; rank 0 writes metrics and the policy."""
    config = PreferenceTrainingConfig.model_validate(settings["config"])
    paths = TrainingPaths(**{name: Path(value) for name, value in settings["paths"].items()})
    torch.manual_seed(derive_seed(config.seed, "pairs"))
    trainer = _PreferenceTrainer(config, paths)
    if world()[0] == 0:  # a killed training starts over: its metrics are not this one's
        (paths.work / "metrics.jsonl").unlink(missing_ok=True)
        shutil.rmtree(paths.work / "tensorboard", ignore_errors=True)
    with MetricsWriter(paths.work, is_writer=world()[0] == 0) as metrics:
        trainer.run(metrics)
    if world()[0] == 0:
        trainer.commit()
    barrier()


class _PreferenceTrainer:
    """One training: its model, its pairs, its looks."""

    def __init__(self, config: PreferenceTrainingConfig, paths: TrainingPaths) -> None:
        self._config, self._paths = config, paths
        self._policy: LoadedPolicy = load_ar(paths.policy, dtype="fp32")
        pairs = read_pairs(paths.pairs)
        self._reference = cached_reference_logprobs(
            paths.reference, pairs, paths.work / "reference", config.engine.precision
        )
        self._mismatched: dict[str, PreferencePair] = {}
        self._mismatched_reference: ReferenceLogprobs = {}
        if config.loss.variant == "kto":
            self._mismatched = {pair.pair_id: pair for pair in mismatched(pairs)}
            self._mismatched_reference = cached_reference_logprobs(
                paths.reference,
                list(self._mismatched.values()),
                paths.work / "reference-mismatched",
                config.engine.precision,
            )
        self._train, self._heldout = split_pairs(pairs, config.heldout_share, config.seed)
        lengths = [len(p.chosen_token_ids) + len(p.rejected_token_ids) for p in self._train]
        self._plan = BatchPlan(lengths, config.pairs_per_step, config.seed)
        num_micro = config.num_epochs * self._plan.batches_per_epoch
        self._num_updates = max(1, num_micro // config.engine.num_accumulated)
        self._engine = Engine(self._policy.model, config.engine, self._num_updates)
        self._early_stop = EarlyStop(config.early_stop)
        self._stop_reason = "all epochs done"
        self._bad_updates = 0
        self._drop_at_start = 0.0

    def run(self, metrics: MetricsWriter) -> None:
        """Update until the epochs are done or the held-out pairs say stop."""
        start = self._look(metrics)
        if self._config.method == "dpo" and self._paths.policy == self._paths.reference:
            self._check_step0(start)
        self._early_stop.see(start)  # a policy worse than the start is never the best
        self._keep_if_best()
        for micro in range(self._num_updates * self._config.engine.num_accumulated):
            values = self._update(self._plan.batch(micro))
            step = self._engine.step_index
            if (micro + 1) % self._config.engine.num_accumulated:
                continue
            metrics.write(step, values)
            is_last = micro + 1 == self._num_updates * self._config.engine.num_accumulated
            if step % self._config.early_stop.every == 0 or is_last:
                reason = self._early_stop.see(self._look(metrics))
                self._keep_if_best()
                if reason is not None:
                    self._stop_reason = reason
                    break
        metrics.write(self._engine.step_index, {"stopped": self._stop_reason})

    def commit(self) -> None:
        """Make the best weights the new policy."""
        best = self._early_stop.best
        kept = self._paths.work / "best"
        if best is None or not is_committed(kept):
            raise Diverged(f"the start itself was not worth keeping ({self._stop_reason})")
        if best.step == 0:
            self._stop_reason = f"nothing was better than the start: {self._stop_reason}"
            logger.warning("%s; the new policy has the old weights", self._stop_reason)
        facts = manifest_facts(kept) | {
            "stop_reason": self._stop_reason,
            "num_updates": self._engine.step_index,
            "num_train_pairs": len(self._train),
            "num_heldout_pairs": len(self._heldout),
        }
        loaded = load_ar(kept)
        save_ar(self._paths.output, loaded.model, loaded.vocabulary, facts)
        shutil.rmtree(kept)

    def _check_step0(self, start: Look) -> None:
        expected = loss_of_an_unmoved_policy(self._config.loss)
        if expected is not None and abs(start.loss - expected) > STEP0_TOLERANCE:
            raise LogprobMismatch(
                f"at step 0 the loss is {start.loss:.5f}, that of an unmoved policy is "
                f"{expected:.5f}; the cached reference is of another model or other pairs"
            )

    def _update(self, indices: list[int]) -> dict[str, float]:
        rank, num_ranks = world()
        pairs = [self._train[index] for index in rows_of_rank(indices, rank, num_ranks)]
        policy = self._policy_logprobs(pairs)
        reference = self._reference_of(pairs, policy)
        output = pair_loss(policy, reference, self._config, self._reference_point(pairs))
        total, count = output.loss_B.sum(), torch.tensor(float(len(pairs)))
        if torch.isfinite(global_sum(total)):
            self._bad_updates = 0
            self._engine.update(global_mean(total, count.to(total.device)))
        else:
            self._count_bad_update()
        values = _means(output, policy, reference)
        return values | {
            "grad_norm": self._engine.grad_norm,
            "learning_rate": self._engine.learning_rate,
        }

    def _count_bad_update(self) -> None:
        self._bad_updates += 1
        self._engine.discard_gradients()
        if self._bad_updates >= MAX_BAD_UPDATES:
            raise Diverged(
                f"the loss was not finite {MAX_BAD_UPDATES} times in a row, at update "
                f"{self._engine.step_index}; lower training.engine.learning_rate"
            )

    @torch.no_grad()
    def _look(self, metrics: MetricsWriter) -> Look:
        self._engine.unwrapped.eval()
        rank, num_ranks = world()
        sums: Tensor | None = None
        names: list[str] = []
        size = self._config.pairs_per_step
        for first in range(0, len(self._heldout), size):
            pairs = self._heldout[first : first + size]
            mine = rows_of_rank(pairs, rank, num_ranks) or pairs[:1]
            weight = len(rows_of_rank(pairs, rank, num_ranks))  # 0: only keeps the ranks in step
            policy = self._policy_logprobs(mine)
            reference = self._reference_of(mine, policy)
            kl = self._reference_point(mine[:weight])
            output = pair_loss(policy, reference, self._config, kl)
            values = _local_means(output, policy, reference)
            names = list(values)
            row = torch.tensor([*values.values(), 1.0], device=self._engine.device) * weight
            sums = row if sums is None else sums + row
        self._engine.unwrapped.train()
        assert sums is not None  # noqa: S101 - the split never leaves the held-out side empty
        totals = global_sum(sums)
        means = {name: float(totals[i] / totals[-1]) for i, name in enumerate(names)}
        metrics.write(
            self._engine.step_index, {f"heldout_{name}": value for name, value in means.items()}
        )
        if self._engine.step_index == 0:
            # Not 0 where the reference is older than the policy, or was never told feedback (coh):
            # the limit is on what this training loses, or a third iteration could never start.
            self._drop_at_start = means["chosen_drop"]
        return Look(
            step=self._engine.step_index,
            loss=means["loss"] - self._config.loss.sft_weight * means["anchor"],
            accuracy=means["accuracy"],
            chosen_drop=means["chosen_drop"] - self._drop_at_start,
        )

    def _policy_logprobs(self, pairs: Sequence[PreferencePair]) -> PairLogprobs:
        tells_feedback = self._config.method == "coh"
        with self._engine.autocast():
            return pair_logprobs(
                self._engine.module, pairs, tells_feedback=tells_feedback, with_entropy=True
            )

    @torch.no_grad()
    def _reference_point(self, pairs: Sequence[PreferencePair]) -> float:
        """Return KTO's z0 of the pairs of all ranks; every rank must call it."""
        if not self._mismatched:
            return 0.0
        others = [self._mismatched[pair.pair_id] for pair in pairs]
        rows = [(pair.prompt_token_ids, pair.chosen_token_ids) for pair in others]
        device = self._engine.device
        sums = torch.zeros(2, device=device)
        if rows:
            with self._engine.autocast():
                policy_B = answer_sums(self._engine.module, rows)
            reference = [self._mismatched_reference[pair.pair_id][0] for pair in others]
            differences_B = policy_B - torch.tensor(reference, device=device)
            sums = torch.stack([differences_B.sum(), differences_B.new_tensor(float(len(rows)))])
        total, count = global_sum(sums)
        return reference_point(total, count)

    def _keep_if_best(self) -> None:
        best = self._early_stop.best
        if best is None or best.step != self._engine.step_index:
            return
        facts = dict(self._policy.facts)
        facts |= {
            "policy_version": int(facts["policy_version"]) + 1,
            "best_step": best.step,
            "heldout_loss": best.loss,
            "heldout_accuracy": best.accuracy,
        }
        if self._config.method == "coh":
            facts["knows_feedback"] = True
        with self._engine.whole_weights() as model:
            if world()[0] == 0:
                assert isinstance(model, PreTrainedModel)  # noqa: S101 - load_ar made it
                save_ar(self._paths.work / "best", model, self._policy.vocabulary, facts)
        barrier()

    def _reference_of(self, pairs: Sequence[PreferencePair], like: PairLogprobs) -> PairLogprobs:
        device = like.chosen_B.device
        values_B2 = torch.tensor([self._reference[p.pair_id] for p in pairs], device=device)
        return PairLogprobs(
            chosen_B=values_B2[:, 0],
            rejected_B=values_B2[:, 1],
            chosen_tokens_B=like.chosen_tokens_B,
            rejected_tokens_B=like.rejected_tokens_B,
        )


def _local_means(
    output: PairLoss, policy: PairLogprobs, reference: PairLogprobs
) -> dict[str, float]:
    chosen_B = policy.chosen_B.detach() / policy.chosen_tokens_B
    rejected_B = policy.rejected_B.detach() / policy.rejected_tokens_B
    chosen_drop_B = reference.chosen_B / reference.chosen_tokens_B - chosen_B
    rejected_drop_B = reference.rejected_B / reference.rejected_tokens_B - rejected_B
    values = {
        "loss": output.loss_B.detach(),
        "anchor": output.anchor_B.detach(),
        "accuracy": (output.margin_B > 0).float(),
        "margin": output.margin_B,
        "chosen_reward": output.chosen_reward_B,
        "rejected_reward": output.rejected_reward_B,
        "chosen_logprob": chosen_B,
        "rejected_logprob": rejected_B,
        "chosen_drop": chosen_drop_B,
        # E[log reference - log policy] a token, over answers that the reference drew itself:
        # KL(reference || policy) for ranked pairs; golden answers are not the reference's.
        "kl_k1": (chosen_drop_B + rejected_drop_B) / 2,
    }
    if policy.entropy_B is not None:
        values["entropy"] = policy.entropy_B
    return {name: float(value_B.mean()) for name, value_B in values.items()}


def _means(output: PairLoss, policy: PairLogprobs, reference: PairLogprobs) -> dict[str, float]:
    """Return means over the pairs of all ranks."""
    values = _local_means(output, policy, reference)
    count = len(output.loss_B)
    row = torch.tensor([*values.values(), 1.0], device=output.loss_B.device)  # NCCL takes no other
    totals = global_sum(row * count)
    return {name: float(totals[i] / totals[-1]) for i, name in enumerate(values)}
