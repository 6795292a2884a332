"""Several runs of one recipe, and one table of all: `speechalign compare`.

    RUN/ARM/...   RUN/REWARD-MODEL/...   RUN/compare.json  compare.md  compare.svg  timings.json

An arm is an ordinary run: it resumes, and `speechalign align` could have made it. What two arms
share (prompts, the evaluation of the start, its judged samples) is made once and copied.
"""

import json
import logging
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from speechalign.artifacts import is_committed, sha256_of, write_json_atomically
from speechalign.config.align import AlignConfig
from speechalign.config.compare import ArmConfig, CompareConfig, RewardModelStepConfig
from speechalign.config.load import load_config
from speechalign.config.training import RewardModelConfig
from speechalign.errors import BudgetExceeded, ConfigError, DataError, Diverged
from speechalign.evaluation.comparison import (
    System,
    compare_systems,
    comparison_rows,
    time_rows,
)
from speechalign.evaluation.comparison_parts import (
    CEILING,
    REWARD_MODEL,
    START,
    with_earlier,
)
from speechalign.evaluation.plots import systems_compared
from speechalign.evaluation.summary import METRICS, markdown_rows, metrics_of
from speechalign.pipeline.align import run_align
from speechalign.pipeline.cluster import connected
from speechalign.pipeline.report import machine_facts
from speechalign.pipeline.reward_model import train_reward_model
from speechalign.pipeline.run_directory import TIMINGS, read_timings
from speechalign.policy.reward_model import WEIGHTS, load_reward_model
from speechalign.sampling.pipeline import SCORED

logger = logging.getLogger(__name__)

SHARED_STAGES: Mapping[str, tuple[str, ...]] = {
    "prompts": (
        "run_dir", "training", "pairing", "reward", "judges", "rendering", "pools", "nar",
        "pipeline.earlier_pairs", "pipeline.reference", "pipeline.guards",
        "sampling.samples_per_prompt", "sampling.temperatures", "sampling.common_seeds",
        "evaluation.judges", "evaluation.temperature", "evaluation.best_of",
    ),
    "iteration-0/evaluation": (
        "run_dir", "seed", "prompts", "training", "pairing", "pipeline", "reward", "judges",
        "pools", "sampling.samples_per_prompt", "sampling.temperatures", "sampling.common_seeds",
    ),
    "ceiling": (
        "run_dir", "seed", "prompts", "training", "pairing", "pipeline", "reward", "judges",
        "pools", "sampling", "engine", "evaluation.best_of", "evaluation.temperature",
    ),
    "reference": (
        "run_dir", "seed", "prompts", "training", "pairing", "pipeline", "reward", "judges",
        "pools", "sampling", "engine", "evaluation.best_of", "evaluation.temperature",
    ),
    "iteration-1/scored": ("run_dir", "training", "pairing", "reward", "evaluation", "pools",
        "pipeline.earlier_pairs", "pipeline.reference", "pipeline.guards"),
}  # fmt: skip
"""What of a recipe each stage does *not* depend on; two arms equal in the rest share it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One run of a comparison."""

    step: ArmConfig
    seed: int
    config: AlignConfig

    def label(self, iteration: int) -> str:
        """Return what a row of the table is called."""
        parts = [self.step.label]
        if self.config.pipeline.iterations > 1:
            parts.append(f"iteration {iteration}")
        if len(self.step.seeds) > 1:
            parts.append(f"seed {self.seed}")
        return ", ".join(parts)


def run_compare(
    config: CompareConfig, *, only: Sequence[str] = (), earlier: Path | None = None
) -> str:
    """Run the steps that are not finished, and write the table; return it.

    An arm that diverges or loses its judges has no row; the others go on.

    Args:
        config: the file.
        only: the names of the steps to run; none: all.
        earlier: a `compare.json` of the same file; its rows stand for the arms that did not run.

    Raises:
        ConfigError: a step could never have worked, or is not known; raised before the first.
        DataError: no arm was evaluated, or the earlier table is of another start.
    """
    order = [step.name for step in config.steps]
    if earlier is not None and not earlier.is_file():
        raise ConfigError(f"there is no earlier table {earlier}")
    config = _with_only(config, only)
    done, failures = _run_steps(config)
    result = comparison_of(config, done, failures)
    if earlier is not None:
        result = with_earlier(result, json.loads(earlier.read_text()), order)
    return _write(result, config.run_dir)


def _with_only(config: CompareConfig, names: Sequence[str]) -> CompareConfig:
    known = [step.name for step in config.steps]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ConfigError(f"no step is named {', '.join(unknown)}; there are {', '.join(known)}")
    wanted = _with_needs(config, names)
    lacking = [f"--only {name}" for name in known if name in wanted and name not in names]
    if lacking:
        raise ConfigError(
            f"{', '.join(names)} reads what other steps make, and {config.run_dir} does not have "
            f"it yet; add {' '.join(lacking)}"
        )
    steps = tuple(step for step in config.steps if not names or step.name in names)
    return config.model_copy(update={"steps": steps})


def _with_needs(config: CompareConfig, names: Sequence[str]) -> set[str]:
    """Return these steps and those that make what they read, as far as it is not there."""
    known, wanted = {step.name for step in config.steps}, set(names)
    for step in reversed(config.steps):  # a step reads what earlier ones have made
        if step.name not in wanted:
            continue
        told = json.dumps({**config.overrides, **step.overrides})
        for path in re.findall(r'\{run\}/([^"]+)', told):
            folder = path.partition("/")[0]
            maker = folder if folder in known else re.sub(r"-seed\d+$", "", folder)
            if maker in known and not is_committed(config.run_dir / path):
                wanted.add(maker)
    return wanted


def _run_steps(config: CompareConfig) -> tuple[list[Arm], dict[str, str]]:
    """Return the arms that were run, and why the others were not, by the name of their folder."""
    for step in config.steps:
        if isinstance(step, RewardModelStepConfig):
            reward_model_of(config, step)
    arms = {
        step.name: arms_of(config, step) for step in config.steps if isinstance(step, ArmConfig)
    }
    done: list[Arm] = []
    failures: dict[str, str] = {}
    with connected():
        for step in config.steps:
            if isinstance(step, RewardModelStepConfig):
                _train_reward_model(config, step)
                continue
            for arm in arms[step.name]:
                share_stages(arm.config, [earlier.config for earlier in done])
                try:
                    run_align(arm.config, until=step.until)
                except (Diverged, BudgetExceeded) as error:
                    logger.warning("%s: %s", arm.config.run_dir, error)
                    failures[arm.config.run_dir.name] = str(error)
                else:
                    done.append(arm)
    return done, failures


def _train_reward_model(config: CompareConfig, step: RewardModelStepConfig) -> None:
    """Train it unless it is there, and keep how long that took."""
    is_new, started_s = not is_committed(config.run_dir / step.name), time.monotonic()
    logger.info("%s", train_reward_model(reward_model_of(config, step)))
    if is_new:
        taken = {step.name: round(time.monotonic() - started_s, 1)}
        write_json_atomically(config.run_dir / TIMINGS, read_timings(config.run_dir) | taken)


def arms_of(config: CompareConfig, step: ArmConfig) -> list[Arm]:
    """Return the runs of a step, one a seed.

    Raises:
        ConfigError: the recipe with the overrides is not valid.
    """
    arms: list[Arm] = []
    for seed in step.seeds:
        suffix = f"-seed{seed}" if len(step.seeds) > 1 else ""
        own = {"run_dir": str(config.run_dir / f"{step.name}{suffix}"), "seed": seed,
               "training.seed": seed}  # fmt: skip
        chosen = {**config.overrides, **step.overrides, **own}
        loaded = load_config(AlignConfig, config.recipe, _as_overrides(chosen, config.run_dir))
        arms.append(Arm(step=step, seed=seed, config=loaded))
    return arms


def share_stages(config: AlignConfig, finished: Sequence[AlignConfig]) -> None:
    """Copy the stages that another run has made of the same settings."""
    for stage, ignored in SHARED_STAGES.items():
        target = config.run_dir / stage
        if is_committed(target) or _chooses_among_several(config, stage):
            continue
        for other in finished:
            source = other.run_dir / stage
            same = _without(config, ignored) == _without(other, ignored)
            if same and is_committed(source) and not _chooses_among_several(other, stage):
                partial = target.with_name(f".{target.name}.copy")
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(source, partial)
                partial.replace(target)
                _copy_timing(stage, other.run_dir, config.run_dir)
                logger.info("%s: as in %s", target, other.run_dir.name)
                break


def _copy_timing(stage: str, source: Path, target: Path) -> None:
    taken = {name: value for name, value in read_timings(source).items() if name == stage}
    write_json_atomically(target / TIMINGS, read_timings(target) | taken)


def comparison_of(
    config: CompareConfig, arms: Sequence[Arm], failures: Mapping[str, str]
) -> dict[str, Any]:
    """Return the facts, the rows and the table of what is on disk.

    Raises:
        DataError: no arm was evaluated.
    """
    evaluated = [arm for arm in arms if arm.step.until == "report"]
    if not evaluated:
        raise DataError(f"{config.run_dir} has no evaluated arm to compare")
    baseline, *others = _systems(config, evaluated)
    metrics = metrics_of(evaluated[0].config.evaluation.judges)
    ceiling = _ceiling(evaluated[0].config.run_dir / "ceiling")
    compared = compare_systems(baseline, others, config.num_resamples, metrics, ceiling)
    facts = machine_facts() | {"command": shlex.join(["speechalign", *sys.argv[1:]])}
    model = _reward_model_folder(config)
    if model is not None:
        facts[REWARD_MODEL] = sha256_of(model / WEIGHTS)[:12]
    facts |= _minutes_before(config, arms)
    facts |= {f"failed: {name}": reason for name, reason in failures.items()}
    rows = [one.to_json() for one in compared]
    return {
        "facts": facts,
        "rows": rows,
        "table": comparison_rows(compared),
        "times": time_rows(compared),
    }


def _ceiling(folder: Path) -> System | None:
    if not is_committed(folder):
        return None
    judged = pq.read_table(folder / SCORED)
    return System(label="golden level 1 + NAR", judged=judged, facts={"arm": CEILING})


def _minutes_before(config: CompareConfig, arms: Sequence[Arm]) -> dict[str, str]:
    """Return the wall clock of what arms are built on and no row shows: pairs, a reward model."""
    seconds = read_timings(config.run_dir)
    for arm in arms:
        if arm.step.until != "report":
            timings = read_timings(arm.config.run_dir).items()  # with those of copied stages
            own = [value for stage, value in timings if stage.startswith("iteration-1/")]
            seconds[arm.config.run_dir.name] = sum(own)
    return {f"minutes of {name}": f"{value / 60:.1f}" for name, value in seconds.items()}


def _write(result: Mapping[str, Any], run_dir: Path) -> str:
    """Write `compare.json`, `compare.md` and `compare.svg`; return the text."""
    write_json_atomically(run_dir / "compare.json", dict(result))
    lines = [f"* {name}: {value}" for name, value in result["facts"].items()]
    tables = [markdown_rows(result[name]) for name in ("table", "times")]
    text = "\n".join(["\n\n".join(tables), "", *lines]) + "\n"
    (run_dir / "compare.md").write_text(text)
    (run_dir / "compare.svg").write_text(_plot(result["rows"]))
    return text


def _systems(config: CompareConfig, arms: Sequence[Arm]) -> Iterator[System]:
    """Yield the start, then every iteration of every arm."""
    start = arms[0].config.run_dir / "iteration-0" / "evaluation"
    rewarded = _Rewarded(config)
    yield System(label="SFT", judged=rewarded(start), facts={"arm": START})
    for arm in arms:
        seconds = 0.0
        timings = read_timings(arm.config.run_dir)
        for iteration in range(1, arm.config.pipeline.iterations + 1):
            name = f"iteration-{iteration}"
            folder = arm.config.run_dir / name / "evaluation"
            if not is_committed(folder):
                continue
            stages = {
                stage.removeprefix(f"{name}/"): value
                for stage, value in timings.items()
                if stage.startswith(f"{name}/")
            }
            seconds += sum(value for stage, value in stages.items() if stage != "evaluation")
            yield System(
                label=arm.label(iteration),
                judged=rewarded(folder),
                seconds=seconds,
                stage_seconds=stages,
                facts={
                    "arm": arm.step.name,
                    "seed": arm.seed,
                    "iteration": iteration,
                    "commit": _commit_of(arm.config.run_dir),
                },
            )


def _commit_of(run_dir: Path) -> str:
    """Return the commit that wrote the report of a run."""
    result = json.loads((run_dir / "result.json").read_text())
    return result["facts"]["commit"]


class _Rewarded:
    """Reads judged samples and adds what the comparison's reward model says of them."""

    def __init__(self, config: CompareConfig) -> None:
        folder = _reward_model_folder(config)
        self._model = None if folder is None else load_reward_model(folder)

    def __call__(self, folder: Path) -> pa.Table:
        table = pq.read_table(folder / SCORED)
        if self._model is None:
            return table
        rows = table.select(["prompt_token_ids", "token_ids"]).to_pylist()
        rewards = [self._model.rewards([tuple(row.values())])[0] for row in rows]
        names = [name for name in table.column_names if name != "reward_model"]
        column = pa.array(rewards, pa.float32())
        return table.select(names).append_column("reward_model", column)


def _reward_model_folder(config: CompareConfig) -> Path | None:
    """Return where the model that votes is; a part of a comparison may have none yet."""
    if config.reward_model is None or not is_committed(config.run_dir / config.reward_model):
        return None
    return config.run_dir / config.reward_model


def reward_model_of(config: CompareConfig, step: RewardModelStepConfig) -> RewardModelConfig:
    """Return the training of a step.

    Raises:
        ConfigError: the recipe with the overrides is not valid.
    """
    chosen = {**step.overrides, "output": str(config.run_dir / step.name)}
    return load_config(RewardModelConfig, step.recipe, _as_overrides(chosen, config.run_dir))


def _as_overrides(values: Mapping[str, Any], run_dir: Path) -> list[str]:
    """Return the overrides as the command line would give them; JSON is YAML."""
    texts = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return [text.replace("{run}", str(run_dir)) for text in texts]


def _chooses_among_several(config: AlignConfig, stage: str) -> bool:
    """Whether the start itself was evaluated by a reward's choice."""
    is_choice = config.evaluation.best_of > 1 and config.training.method != "best_of_n"
    return stage == "iteration-0/evaluation" and is_choice


def _without(config: AlignConfig, ignored: Sequence[str]) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    if config.training.method == "best_of_n":
        values["evaluation"]["best_of"] = 1  # of the arm, not of the start
    for dotted in ignored:
        *parents, last = dotted.split(".")
        node = values
        for key in parents:
            node = node[key]
        node.pop(last, None)
    return values


def _plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the WER of all systems, or the first metric that the start has."""
    summaries = [row["summary"] for row in rows]
    metric = next(metric for metric in METRICS if metric.key in summaries[0]["estimates"])
    known = [summary for summary in summaries if metric.key in summary["estimates"]]
    estimates = [summary["estimates"][metric.key] for summary in known]
    scaled = [
        (metric.scale * one["value"], metric.scale * one["low"], metric.scale * one["high"])
        for one in estimates
    ]
    return systems_compared([summary["name"] for summary in known], scaled, metric.label)
