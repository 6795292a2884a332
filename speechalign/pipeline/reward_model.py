"""`speechalign reward-model`: train it, and say how far it can be trusted."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from speechalign.artifacts import manifest_facts
from speechalign.config.training import RewardModelConfig
from speechalign.errors import DataError
from speechalign.evaluation.reward_model import write_reward_report
from speechalign.pipeline.cluster import connected
from speechalign.policy.reward_model import load_reward_model
from speechalign.training.metrics import read_metrics
from speechalign.training.reward_model import MARGINS, REPORT, batched_rewards
from speechalign.training.sft import run_training, work_folder
from speechalign.training.stored_pairs import read_both_sides
from speechalign.types import PreferencePair


def train_reward_model(config: RewardModelConfig) -> str:
    """Train and commit a reward model, write its report, and return what it came to.

    Raises:
        ConfigError: too few pairs, or no policy, or too small a cluster.
        DataError: the pairs are of another codec, or answers without another one.
        RunLocked: another process trains it.
        Diverged: the loss stopped being finite.
    """
    measured = {str(path): read_both_sides(path) for path in config.measured_pairs}
    with connected():
        folder = run_training(config)
    facts = manifest_facts(folder) | _right_of(measured, folder)
    report = _report(facts, work_folder(config))
    others = "".join(f"right of the pairs of {path}: {facts[path]}\n" for path in measured)
    return (
        f"reward model: {folder}\n"
        f"{facts['num_heldout_pairs']} held-out pairs, {facts['heldout_accuracy']:.1%} right\n"
        f"weights of update {facts['best_step']} of {facts['num_steps']}, the lowest held-out "
        "loss\n"
        f"{others}report: {report}"
    )


def _right_of(pairs: Mapping[str, Sequence[PreferencePair]], folder: Path) -> dict[str, str]:
    """Return how many of some other pairs the model is right on, by their path."""
    loaded = load_reward_model(folder)
    known = loaded.facts["codec_fingerprint"]
    right: dict[str, str] = {}
    for path, some in pairs.items():
        if any(pair.codec_fingerprint != known for pair in some):
            raise DataError(
                f"the pairs of {path} are of another codec than the reward model {folder}; their "
                "codes mean different sounds"
            )
        chosen_N, rejected_N = batched_rewards(loaded.model, some)
        right[path] = f"{float((chosen_N > rejected_N).float().mean()):.1%} of {len(some)}"
    return right


def _report(facts: Mapping[str, object], work: Path) -> Path:
    """Return the report; one that is there is kept: its folder may be read-only by now."""
    report = work / REPORT
    if report.exists():
        return report
    margins: dict[str, list[float]] = defaultdict(list)
    for row in pq.read_table(work / MARGINS).to_pylist():
        margins[row["kind"]].append(row["margin"])
    write_reward_report(facts, margins, read_metrics(work / "metrics.jsonl"), report)
    return report
