"""DPO on real Ray Train workers with a real DeepSpeed engine."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from speechalign.artifacts import committed_folder
from speechalign.config.preference_training import PreferenceTrainingConfig
from speechalign.config.training import WorkersConfig
from speechalign.errors import ConfigError, Diverged, LogprobMismatch
from speechalign.policy.ar import load_ar, save_ar
from speechalign.rows import pairs_to_table
from speechalign.training.launch import run_workers
from speechalign.training.metrics import read_metrics
from speechalign.training.preference import TrainingPaths, train_on_pairs
from speechalign.training.reference import sampler_difference
from speechalign.training.stored_pairs import PAIRS, split_pairs
from speechalign.types import PreferencePair, Sample
from tests.builders import some_pairs
from tests.tiny_stack import TinyStack

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("cluster"),
]


def write_pairs(folder: Path, pairs: list[PreferencePair]) -> Path:
    with committed_folder(folder, {}) as partial:
        pq.write_table(pairs_to_table(pairs), partial / PAIRS)
    return folder


def a_config(num_workers: int, zero_stage: int) -> PreferenceTrainingConfig:
    return PreferenceTrainingConfig.model_validate(
        {
            "num_epochs": 1,
            "pairs_per_step": 4,
            "heldout_share": 0.2,
            "loss": {"sft_weight": 0.1},
            "early_stop": {"every": 2, "max_chosen_drop": 9.0},
            "engine": {"learning_rate": 3e-3, "zero_stage": zero_stage},
            "workers": {"num_workers": num_workers, "max_failures": 0},
        }
    )


def trained(
    stack: TinyStack, folder: Path, config: PreferenceTrainingConfig, pairs: list[PreferencePair]
) -> TrainingPaths:
    paths = TrainingPaths(
        policy=stack.ar,
        reference=stack.ar,
        pairs=write_pairs(folder / "pairs", pairs),
        output=folder / f"policy-{config.workers.num_workers}",
    )
    train_on_pairs(config, paths)
    return paths


def test_two_workers_train_what_one_trains(stack: TinyStack, tmp_path: Path):
    pairs = some_pairs(20, chosen=(8, 16), rejected=(16, 24))
    one, two = (
        trained(stack, tmp_path, a_config(num, stage), pairs) for num, stage in ((1, 0), (2, 2))
    )
    losses, entropies = (
        [
            [row[name] for row in read_metrics(paths.work / "metrics.jsonl") if "loss" in row]
            for paths in (one, two)
        ]
        for name in ("loss", "entropy")
    )
    assert len(losses[0]) >= 3
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)
    np.testing.assert_allclose(entropies[0], entropies[1], atol=1e-5)
    weights = [load_ar(paths.output).model.state_dict() for paths in (one, two)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-5, rtol=1e-4)
    assert load_ar(one.output).facts["policy_version"] == 1


def test_a_policy_that_only_gets_worse_leaves_the_start(stack: TinyStack, tmp_path: Path):
    config = a_config(1, 0)
    train, heldout = split_pairs(
        some_pairs(20, chosen=(8, 16), rejected=(16, 24)), config.heldout_share, config.seed
    )
    turned = [
        replace(
            pair,
            chosen_token_ids=pair.rejected_token_ids,
            rejected_token_ids=pair.chosen_token_ids,
        )
        for pair in heldout
    ]
    paths = trained(stack, tmp_path, config, train + turned)
    start, kept = load_ar(stack.ar), load_ar(paths.output)
    assert (kept.facts["best_step"], kept.facts["policy_version"]) == (0, 1)
    assert kept.facts["stop_reason"].startswith("nothing was better than the start")
    for name, tensor in start.model.state_dict().items():
        torch.testing.assert_close(tensor, kept.model.state_dict()[name], atol=0.0, rtol=0.0)


def test_a_policy_far_from_an_older_reference_can_still_be_trained(
    stack: TinyStack, tmp_path: Path
):
    pairs, config, start = (
        some_pairs(20, chosen=(8, 16), rejected=(16, 24)),
        a_config(1, 0),
        load_ar(stack.ar),
    )
    with torch.no_grad():  # low codes, of which the chosen answers are, become unlikely
        start.model.get_parameter("model.embed_tokens.weight")[8:16] *= 0.2
    far = tmp_path / "far"
    save_ar(far, start.model, start.vocabulary, dict(start.facts) | {"policy_version": 1})
    paths = TrainingPaths(
        policy=far,
        reference=stack.ar,
        pairs=write_pairs(tmp_path / "pairs", pairs),
        output=tmp_path / "policy",
    )
    strict = config.early_stop.model_copy(update={"max_chosen_drop": 0.001})
    train_on_pairs(config.model_copy(update={"early_stop": strict}), paths)
    looks = [r for r in read_metrics(paths.work / "metrics.jsonl") if "heldout_loss" in r]
    assert looks[0]["heldout_chosen_drop"] > 0.001
    facts = load_ar(paths.output).facts
    assert (facts["policy_version"], facts["best_step"] > 0) == (2, True)


def test_too_few_pairs_are_refused_before_a_worker_starts(stack: TinyStack, tmp_path: Path):
    paths = TrainingPaths(
        policy=stack.ar,
        reference=stack.ar,
        pairs=write_pairs(tmp_path / "pairs", some_pairs(3, chosen=(8, 16), rejected=(16, 24))),
        output=tmp_path / "policy",
    )
    with pytest.raises(ConfigError, match="do not fill one step"):
        train_on_pairs(PreferenceTrainingConfig(), paths)


def test_a_sampler_that_disagrees_with_the_trainer_stops_the_run(stack: TinyStack):
    sample = Sample(
        prompt_id="p0",
        sample_index=0,
        policy_version=0,
        codec_fingerprint="f",
        prompt_token_ids=(2, 8, 3, 25, 4),
        token_ids=(8, 1),
        logprobs=(-9.0, -9.0),
        temperature=1.0,
        is_truncated=False,
    )
    with pytest.raises(LogprobMismatch, match="sample p0/0"):
        sampler_difference(stack.ar, [sample], 1e-4)


def dies_once(settings: dict[str, Any]) -> None:
    mark = Path(settings["folder"]) / "died"
    if not mark.exists():
        time.sleep(5)  # both are in training by then, and the others want all CPUs of the two
        mark.touch()
        os._exit(1)
    (mark.parent / "done").touch()


def diverges(settings: dict[str, Any]) -> None:
    if torch.distributed.get_rank() == 0:
        with (Path(settings["folder"]) / "starts").open("a") as file:
            file.write("x")
    raise Diverged("not finite")


def test_a_worker_whose_process_dies_is_started_again_and_one_that_diverges_is_not(tmp_path: Path):
    workers, settings = WorkersConfig(num_workers=2, max_failures=2), {"folder": str(tmp_path)}
    run_workers(dies_once, settings, workers, tmp_path / "one" / "ray")
    assert (tmp_path / "done").exists()
    with pytest.raises(Diverged, match="not finite"):
        run_workers(diverges, settings, workers, tmp_path / "two" / "ray")
    assert (tmp_path / "starts").read_text() == "x"
