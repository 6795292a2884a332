"""`speechalign reward-model`: train it, and say how far it can be trusted."""

from collections import defaultdict
from pathlib import Path

import pyarrow.parquet as pq

from speechalign.artifacts import manifest_facts
from speechalign.config.training import RewardModelConfig
from speechalign.evaluation.reward_model import write_reward_report
from speechalign.pipeline.cluster import connected
from speechalign.training.metrics import read_metrics
from speechalign.training.reward_model import MARGINS
from speechalign.training.sft import run_training, work_folder


def train_reward_model(config: RewardModelConfig) -> str:
    """Train and commit a reward model, write its report, and return what it came to.

    Raises:
        ConfigError: too few pairs, or no policy.
        DataError: the pairs are of another codec.
        Diverged: the loss stopped being finite.
    """
    with connected():
        folder = run_training(config)
    facts = manifest_facts(folder)
    report = _report(folder, work_folder(config))
    return (
        f"reward model: {folder}\n"
        f"{facts['num_heldout_pairs']} held-out pairs, {facts['heldout_accuracy']:.1%} right\n"
        f"weights of update {facts['best_step']} of {facts['num_steps']}, the lowest held-out "
        "loss\n"
        f"report: {report}"
    )


def _report(folder: Path, work: Path) -> Path:
    margins: dict[str, list[float]] = defaultdict(list)
    for row in pq.read_table(work / MARGINS).to_pylist():
        margins[row["kind"]].append(row["margin"])
    report = work / "report.html"
    facts = manifest_facts(folder)
    write_reward_report(facts, margins, read_metrics(work / "metrics.jsonl"), report)
    return report
