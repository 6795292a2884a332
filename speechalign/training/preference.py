"""Training on pairs: DPO, fine-tuning on the chosen, chain of hindsight.

Ray Train workers, each with a DeepSpeed engine:

    pairs -> held-out split by prompt -> updates -> looks at the held-out pairs -> best policy

The reference's log-probs come from a cache, so a worker holds one model. At step 0 policy and
reference are one, and DPO's loss must be ln 2: the run stops if it is not.

Killed, a training goes on from its last checkpoint.
"""

import hashlib
import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from speechalign.artifacts import (
    MANIFEST,
    is_committed,
    manifest_facts,
    verify_folder,
    write_json_atomically,
)
from speechalign.config.load import config_hash
from speechalign.config.preference_training import PreferenceTrainingConfig
from speechalign.config.training import WorkersConfig
from speechalign.errors import ConfigError, Diverged, LogprobMismatch, Stopped
from speechalign.policy.ar import LoadedPolicy, load_ar, save_ar
from speechalign.seeds import derive_seed
from speechalign.training.batches import BatchPlan, rows_of_rank
from speechalign.training.checkpoint import checkpoint_folder, has_checkpoint, stop_is_asked
from speechalign.training.early_stop import EarlyStop, Look
from speechalign.training.engine import Engine, barrier, global_mean, global_sum, world
from speechalign.training.launch import run_workers
from speechalign.training.losses import loss_of_an_unmoved_policy
from speechalign.training.metrics import MetricsWriter
from speechalign.training.pair_comparison import (
    PairComparison,
    cached_references,
    check_pairs,
    good_share,
)
from speechalign.training.pair_means import count_in, no_means_yet
from speechalign.training.reference import Precision
from speechalign.training.stored_pairs import read_pairs, split_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

STEP0_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""Of a loss of 1. The reference is computed on a CPU: in bf16 another device rounds otherwise, and
a summed log-prob moves by half a nat."""
MAX_BAD_UPDATES = 3
STATE, REFERENCE = "state.json", "reference"


def is_unmoved(loss: float, expected: float, precision: Precision) -> bool:
    """Whether a loss at step 0 is what it must be, but for rounding.

    IPO's is 1 / (2 beta)^2, 25 with the usual beta, and the steeper for it.
    """
    return abs(loss - expected) <= STEP0_TOLERANCE[precision] * max(1.0, expected)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPaths:
    """Where a training reads and writes."""

    policy: Path
    """The policy to start from; also the reference, unless `reference` says otherwise."""
    reference: Path
    pairs: Path
    """A committed folder with `pairs.parquet`."""
    output: Path
    """Becomes the new policy; `<output>-work` holds metrics, cache, checkpoint and best weights."""

    @property
    def work(self) -> Path:
        """Where the state of an unfinished training is."""
        return self.output.with_name(f"{self.output.name}-work")

    @property
    def checkpoint(self) -> Path:
        """The last one."""
        return self.work / "checkpoint"

    def kept(self, step: int) -> Path:
        """Return where the weights of a step are, if they were the best so far."""
        return self.work / "best" / f"step-{step}"


@dataclass(slots=True, kw_only=True)
class Progress:
    """What a checkpoint keeps beside the weights and the looks."""

    num_micro: int = 0
    """Micro-batches that were trained on."""
    bad_updates: int = 0
    """In a row."""
    drop_at_start: float = 0.0


def train_on_pairs(config: PreferenceTrainingConfig, paths: TrainingPaths) -> None:
    """Train on pairs and commit the best policy, its version one higher.

    Raises:
        ConfigError: too few pairs, or of a kind that the loss cannot use, or too small a cluster.
        Diverged: the loss stopped being finite.
        LogprobMismatch: the loss at step 0 is not that of an unmoved policy.
    """
    pairs = read_pairs(paths.pairs)
    check_pairs(config, pairs)
    train, _ = split_pairs(pairs, config.heldout_share, config.seed)
    if len(train) < config.pairs_per_step:
        raise ConfigError(
            f"{len(train)} training pairs do not fill one step of {config.pairs_per_step} pairs; "
            "make more pairs or lower pairs_per_step"
        )
    cached_references(config, pairs, paths.reference, paths.work / REFERENCE)
    settings = {
        "config": config.model_dump(mode="json"),
        "paths": {name: str(path.resolve()) for name, path in asdict(paths).items()},
    }
    run_workers(preference_worker, settings, config.workers, paths.work / "ray")
    facts = manifest_facts(paths.output)
    logger.log(
        logging.INFO if facts["best_step"] else logging.WARNING,
        "training ended after %d updates: %s; the new policy is that of update %d",
        facts["num_updates"],
        facts["stop_reason"],
        facts["best_step"],
    )


def preference_worker(settings: dict[str, Any]) -> None:
    """Train on this rank; rank 0 writes metrics and the policy."""
    config = PreferenceTrainingConfig.model_validate(settings["config"])
    paths = TrainingPaths(**{name: Path(value) for name, value in settings["paths"].items()})
    torch.manual_seed(derive_seed(config.seed, "pairs"))
    trainer = _PreferenceTrainer(config, paths)
    resumed_at = trainer.resume()
    is_writer = world()[0] == 0
    with MetricsWriter(paths.work, is_writer=is_writer, resumed_at=resumed_at) as metrics:
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
        self._train, self._heldout = split_pairs(pairs, config.heldout_share, config.seed)
        lengths = [len(p.chosen_token_ids) + len(p.rejected_token_ids) for p in self._train]
        self._plan = BatchPlan(lengths, config.pairs_per_step, config.seed)
        num_micro = config.num_epochs * self._plan.batches_per_epoch
        self._num_updates = max(1, num_micro // config.engine.num_accumulated)
        self._engine = Engine(self._policy.model, config.engine, self._num_updates)
        self._comparison = PairComparison(
            config, self._engine, pairs, paths.reference, paths.work / REFERENCE
        )
        self._early_stop = EarlyStop(config.early_stop)
        self._stop_reason = "all epochs done"
        self._progress = Progress()
        self._saved_best = -1

    def resume(self) -> int | None:
        """Go on from the checkpoint and return its step, or clear what a former life left."""
        checkpoint, is_resumed = self._paths.checkpoint, has_checkpoint(self._paths.checkpoint)
        if is_resumed and verify_folder(checkpoint)["identity"] != self._identity():
            logger.warning("%s is of other pairs or settings; starting over", checkpoint)
            is_resumed = False
        if not is_resumed:
            if world()[0] == 0:
                (self._paths.work / "metrics.jsonl").unlink(missing_ok=True)
                shutil.rmtree(self._paths.work / "tensorboard", ignore_errors=True)
                shutil.rmtree(self._paths.work / "best", ignore_errors=True)
            barrier()
            return None
        self._engine.load(checkpoint / "policy")
        state = json.loads((checkpoint / STATE).read_text())
        self._progress = Progress(**state["progress"])
        self._early_stop.restore(state["early_stop"])
        self._saved_best = self._best_step
        logger.info("resumed after update %d", self._engine.step_index)
        return self._engine.step_index

    def run(self, metrics: MetricsWriter) -> None:
        """Update until the epochs are done, the held-out pairs say stop, or it diverges.

        Raises:
            Diverged: the loss stopped being finite before anything was better than the start.
            Stopped: the driver was asked to end; everything is saved.
        """
        if not self._progress.num_micro:
            self._begin(metrics)
        num_micro = self._num_updates * self._config.engine.num_accumulated
        for micro in range(self._progress.num_micro, num_micro):
            values = self._update(self._plan.batch(micro))
            self._progress.num_micro = micro + 1
            if self._progress.bad_updates >= MAX_BAD_UPDATES:
                self._stop_reason = (
                    f"the loss was not finite {MAX_BAD_UPDATES} times in a row, at update "
                    f"{self._engine.step_index}; lower training.engine.learning_rate"
                )
                break
            if (micro + 1) % self._config.engine.num_accumulated:
                continue
            metrics.write(self._engine.step_index, values)
            is_last = micro + 1 == num_micro
            if self._engine.step_index % self._config.early_stop.every == 0 or is_last:
                reason = self._early_stop.see(self._look(metrics))
                self._keep_if_best()
                if reason is not None:
                    self._stop_reason = reason
                    break
            self._save_if_due()
        metrics.write(self._engine.step_index, {"stopped": self._stop_reason})
        if self._progress.bad_updates >= MAX_BAD_UPDATES and self._best_step <= 0:
            raise Diverged(f"{self._stop_reason}; nothing before it was better than the start")

    def _begin(self, metrics: MetricsWriter) -> None:
        start = self._look(metrics)
        if self._config.method == "dpo" and self._paths.policy == self._paths.reference:
            self._check_step0(start)
        self._early_stop.see(start)  # a policy worse than the start is never the best
        self._keep_if_best()

    def _save_if_due(self) -> None:
        asked = stop_is_asked(self._paths.work, self._engine.device)
        step = self._engine.step_index
        if asked or step % self._config.checkpoint_every == 0:
            facts = {"step": step, "identity": self._identity()}
            with checkpoint_folder(self._paths.checkpoint, facts) as partial:
                self._engine.save(partial / "policy")
                if world()[0] == 0:
                    state = {
                        "progress": asdict(self._progress),
                        "early_stop": self._early_stop.state(),
                    }
                    write_json_atomically(partial / STATE, state)
            self._saved_best = self._best_step
            self._forget_former_bests()
        if asked:
            logger.info("saved after update %d, and stopped", step)
            raise Stopped

    @property
    def _best_step(self) -> int:
        return self._early_stop.best.step if self._early_stop.best else -1

    def _identity(self) -> str:
        """Return what a checkpoint must share with the training that goes on from it."""
        anywhere = WorkersConfig(num_workers=self._config.workers.num_workers)
        alike = self._config.model_copy(update={"workers": anywhere})
        digest = hashlib.sha256(config_hash(alike).encode())
        for folder in (self._paths.policy, self._paths.reference, self._paths.pairs):
            digest.update((folder / MANIFEST).read_bytes())
        return digest.hexdigest()[:16]

    def commit(self) -> None:
        """Make the best weights the new policy."""
        best = self._early_stop.best
        if best is None or not is_committed(self._paths.kept(best.step)):
            raise Diverged(f"the start itself was not worth keeping ({self._stop_reason})")
        if best.step == 0:
            self._stop_reason = f"nothing was better than the start: {self._stop_reason}"
        kept = self._paths.kept(best.step)
        facts = manifest_facts(kept) | {
            "stop_reason": self._stop_reason,
            "num_updates": self._engine.step_index,
            "num_train_pairs": len(self._train),
            "num_heldout_pairs": len(self._heldout),
        }
        loaded = load_ar(kept)
        save_ar(self._paths.output, loaded.model, loaded.vocabulary, facts)
        # Its weights may be mapped from these files still, which NFS then does not let go of.
        shutil.rmtree(kept.parent, ignore_errors=True)
        shutil.rmtree(self._paths.checkpoint, ignore_errors=True)  # a short training has none

    def _check_step0(self, start: Look) -> None:
        expected = loss_of_an_unmoved_policy(self._config.loss, good_share(self._heldout))
        precision = self._config.engine.precision
        if expected is not None and not is_unmoved(start.loss, expected, precision):
            raise LogprobMismatch(
                f"at step 0 the loss is {start.loss:.5f}, that of an unmoved policy is "
                f"{expected:.5f}; the cached reference is of another model or other pairs"
            )

    def _update(self, indices: list[int]) -> dict[str, float]:
        rank, num_ranks = world()
        pairs = [self._train[index] for index in rows_of_rank(indices, rank, num_ranks)]
        compared = self._comparison.compare(pairs, num_counted=len(pairs))
        total, count = compared.loss.loss_B.sum(), torch.tensor(float(len(pairs)))
        if torch.isfinite(global_sum(total)):
            self._progress.bad_updates = 0
            self._engine.update(global_mean(total, count.to(total.device)))
        else:
            self._progress.bad_updates += 1
            self._engine.pass_over()
        means = no_means_yet()
        count_in(means, compared)
        return means.over_ranks(self._engine.device) | {
            "grad_norm": self._engine.grad_norm,
            "learning_rate": self._engine.learning_rate,
        }

    @torch.no_grad()
    def _look(self, metrics: MetricsWriter) -> Look:
        self._engine.unwrapped.eval()
        rank, num_ranks = world()
        seen = no_means_yet()
        size = self._config.pairs_per_step
        for first in range(0, len(self._heldout), size):
            pairs = self._heldout[first : first + size]
            mine = rows_of_rank(pairs, rank, num_ranks) or pairs[:1]
            weight = len(rows_of_rank(pairs, rank, num_ranks))  # 0: only keeps the ranks in step
            compared = self._comparison.compare(mine, num_counted=weight)
            if weight:
                count_in(seen, compared)
        self._engine.unwrapped.train()
        means = seen.over_ranks(self._engine.device)
        metrics.write(
            self._engine.step_index, {f"heldout_{name}": value for name, value in means.items()}
        )
        chosen_drop = means.get("chosen_drop", 0.0)  # no good answer among labelled ones: no limit
        if self._engine.step_index == 0:
            # Not 0 where the reference is older than the policy, or was never told feedback (coh):
            # the limit is on what this training loses, or a third iteration could never start.
            self._progress.drop_at_start = chosen_drop
        return Look(
            step=self._engine.step_index,
            loss=means["loss"] - self._config.loss.sft_weight * means["anchor"],
            accuracy=means["accuracy"],
            chosen_drop=chosen_drop - self._progress.drop_at_start,
        )

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
        if self._config.method == "coh" and best.step:  # the start was not told any
            facts["knows_feedback"] = True
        with self._engine.whole_weights() as model:
            if world()[0] == 0:
                policy = cast("PreTrainedModel", model)  # load_ar made it
                save_ar(self._paths.kept(best.step), policy, self._policy.vocabulary, facts)
        self._forget_former_bests()

    def _forget_former_bests(self) -> None:
        """Remove the weights that neither this training nor a resumed one can choose."""
        needed = {self._paths.kept(step) for step in (self._saved_best, self._best_step)}
        if world()[0] == 0:
            for folder in set((self._paths.work / "best").glob("step-*")) - needed:
                shutil.rmtree(folder)
        barrier()
