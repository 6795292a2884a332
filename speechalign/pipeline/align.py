"""The main job: one iteration after another, every stage committed before the next.

    prompts -> iteration-1: samples | scored -> pairs -> policy -> evaluation -> iteration-2 ...
                                                                       -> best -> report.html

Which stage comes next is decided here and nowhere else.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from speechalign.artifacts import is_committed
from speechalign.config.align import AlignConfig
from speechalign.config.online_training import OnlineTrainingConfig
from speechalign.config.preference_training import PreferenceTrainingConfig
from speechalign.errors import ConfigError
from speechalign.pipeline.cluster import connected
from speechalign.pipeline.evaluate import (
    evaluate_best,
    evaluate_ceiling,
    evaluate_policy,
    resynthesise,
    write_candidates,
)
from speechalign.pipeline.gap import write_gap
from speechalign.pipeline.guards import judge_iterations, write_best
from speechalign.pipeline.online import train_online
from speechalign.pipeline.pair import write_pairs
from speechalign.pipeline.preflight import check_resources, check_run
from speechalign.pipeline.report import write_run_report
from speechalign.pipeline.run_directory import RunDirectory, open_run
from speechalign.pipeline.sample import write_prompts, write_samples, write_scored
from speechalign.training.online import OnlinePaths
from speechalign.training.preference import TrainingPaths, train_on_pairs

logger = logging.getLogger(__name__)

StageName: TypeAlias = Literal["samples", "scored", "pairs", "policy", "evaluation", "report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a command did, in words."""

    text: str
    folder: Path


def run_align(config: AlignConfig, *, until: StageName = "report") -> Outcome:
    """Run every stage that is not finished, up to one of the next unfinished iteration.

    Raises:
        ConfigError: the run could never have worked; raised before the first actor starts.
        RunLocked: another process holds the run directory.
        DataError, BudgetExceeded, LogprobMismatch, Diverged: what a stage found.
    """
    check_run(config)
    with open_run(config.run_dir, config) as run, connected():
        check_resources(config)
        run.stage("prompts", lambda folder: write_prompts(config, folder))
        for number in range(1, config.pipeline.iterations + 1):
            iteration = Iteration(config, run, number)
            reached = iteration.run(until)
            if reached is not None:
                return Outcome(text=f"{until}: {reached}", folder=reached)
            if judge_iterations(config).stopped_after is not None:
                logger.warning("a guard stops the run after iteration %d", number)
                if until != "report":
                    last = config.run_dir / f"iteration-{number}" / until
                    return Outcome(text=f"{until}: {last}, the last one", folder=last)
                break
        verdict = judge_iterations(config)
        best = policy_after(config, verdict.best)
        run.stage("best", lambda folder: write_best(verdict, best, folder))
        run.stage("ceiling", lambda folder: evaluate_ceiling(config, folder))
        run.stage("reference", lambda folder: resynthesise(config, folder))
        run.stage("gap", lambda folder: write_gap(config, folder))
        report = write_run_report(config)
    text = (config.run_dir / "result.txt").read_text()
    return Outcome(text=f"{text}\nreport: {report}", folder=config.run_dir)


class Iteration:
    """One turn of the wheel: a policy in, a better policy and its measurements out."""

    def __init__(self, config: AlignConfig, run: RunDirectory, number: int) -> None:
        self._config, self._run, self._number = config, run, number
        self.policy_before = policy_after(config, number - 1)

    def run(self, until: StageName) -> Path | None:
        """Run the stages; return the folder of `until` if the command ends with it.

        It does where that stage was produced now, or no later iteration has one to produce.
        """
        config, name = self._config, f"iteration-{self._number}"
        stages = self._stages()
        if until not in (*stages, "report"):
            raise ConfigError(
                f"{config.training.method} has no stage {until!r}; its stages are "
                f"{', '.join(stages)}, and `align` runs all"
            )
        for stage, produce in stages.items():
            if stage == "samples" and until != "samples":
                continue  # sampled, rendered and judged in one stream, unless asked otherwise
            was_finished = is_committed(config.run_dir / name / stage)
            folder = self._run.stage(f"{name}/{stage}", produce)
            if stage == until and not (was_finished and self._number < config.pipeline.iterations):
                return folder
        return None

    def _stages(self) -> dict[str, Callable[[Path], None]]:
        config, number = self._config, self._number
        evaluation = {"evaluation": self._evaluate}
        if config.training.method == "best_of_n":
            return evaluation
        if isinstance(config.training, OnlineTrainingConfig):
            return {"policy": self._train_online, **evaluation}
        return {
            "samples": lambda folder: write_samples(config, number, self.policy_before, folder),
            "scored": lambda folder: write_scored(config, number, self.policy_before, folder),
            "pairs": lambda folder: write_pairs(config, number, folder),
            "policy": self._train,
            **evaluation,
        }

    def _train_online(self, folder: Path) -> None:
        train_online(
            self._config,
            self._number,
            OnlinePaths(policy=self.policy_before, reference=self._reference(), output=folder),
        )

    def _reference(self) -> Path:
        start = self._number - 1 if self._config.pipeline.reference == "previous" else 0
        return policy_after(self._config, start)

    def _train(self, folder: Path) -> None:
        config = self._config
        assert isinstance(config.training, PreferenceTrainingConfig)  # noqa: S101 - `run` asked
        paths = TrainingPaths(
            policy=self.policy_before,
            reference=self._reference(),
            pairs=config.run_dir / f"iteration-{self._number}" / "pairs",
            output=folder,
        )
        train_on_pairs(config.training, paths)

    def _evaluate(self, folder: Path) -> None:
        best_of = self._config.evaluation.best_of
        if self._number == 1:
            chooses = best_of > 1 and self._config.training.method != "best_of_n"
            self._run.stage(
                "iteration-0/evaluation", lambda path: self._evaluate_one(0, path, chooses=chooses)
            )
        self._evaluate_one(self._number, folder, chooses=best_of > 1)

    def _evaluate_one(self, number: int, folder: Path, *, chooses: bool) -> None:
        policy = policy_after(self._config, number)
        if not chooses:
            evaluate_policy(self._config, policy, folder)
            return
        candidates = self._run.stage(
            f"iteration-{number}/candidates",
            lambda path: write_candidates(self._config, policy, path),
        )
        evaluate_best(self._config, policy, candidates, folder)


def policy_after(config: AlignConfig, iteration: int) -> Path:
    """Return the policy's folder after an iteration; 0 is the policy of the start."""
    if iteration == 0 or config.training.method == "best_of_n":
        return config.policy
    return config.run_dir / f"iteration-{iteration}" / "policy"
