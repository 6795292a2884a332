"""A reward model learns what separates the sides of its pairs, and then rewards samples."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from speechalign.artifacts import MANIFEST, committed_folder, manifest_facts
from speechalign.config.align import AlignConfig
from speechalign.config.training import EngineConfig, RewardModelConfig, WorkersConfig
from speechalign.errors import ConfigError, DataError
from speechalign.pipeline.align import run_align
from speechalign.pipeline.reward_model import train_reward_model
from speechalign.policy.ar import load_ar
from speechalign.policy.reward_model import load_reward_model
from speechalign.rows import pairs_to_table
from speechalign.training.metrics import read_metrics
from speechalign.training.sft import identity_of, work_folder
from speechalign.training.stored_pairs import PAIRS, read_pairs, split_pairs
from speechalign.types import PairKind, PreferencePair
from tests.tiny_stack import TinyStack, tiny_recipe

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("cluster"),
]


def write_pairs(folder: Path, fingerprint: str, count: int = 60) -> Path:
    """Chosen answers are of low codes, rejected ones of high codes."""
    rng = np.random.default_rng(0)
    pairs = [
        PreferencePair(
            pair_id=f"p{index}",
            kind=PairKind.GOLDEN,
            prompt_id=f"p{index}",
            policy_version=0,
            codec_fingerprint=fingerprint,
            prompt_token_ids=(2, 8, 9, 3, 25, 4),
            chosen_token_ids=(*rng.integers(8, 16, rng.integers(2, 9)).tolist(), 1),
            rejected_token_ids=(*rng.integers(16, 24, rng.integers(2, 9)).tolist(), 1),
            margin=1.0,
        )
        for index in range(count)
    ]
    with committed_folder(folder, {}) as partial:
        pq.write_table(pairs_to_table(pairs), partial / PAIRS)
    return folder


def a_config(stack: TinyStack, folder: Path, pairs: Path) -> RewardModelConfig:
    return RewardModelConfig(
        policy=stack.ar,
        pairs=(pairs,),
        output=folder / "rm",
        train_policy=True,
        num_steps=20,
        rows_per_step=8,
        log_every=5,
        heldout_every=10,
        heldout_share=0.3,
        engine=EngineConfig(learning_rate=3e-3),
        workers=WorkersConfig(num_workers=2, max_failures=0),
    )


def test_it_learns_judges_a_run_and_is_kept(stack: TinyStack, tmp_path: Path):
    fingerprint = manifest_facts(stack.ar)["codec_fingerprint"]
    config = a_config(stack, tmp_path, write_pairs(tmp_path / "pairs", fingerprint))
    said = train_reward_model(config)
    facts = manifest_facts(config.output)
    assert facts["heldout_accuracy"] > 0.9
    assert "% right" in said
    fresh = load_ar(stack.ar).model.state_dict()
    heard = load_reward_model(config.output).model.policy.state_dict()
    assert any(not torch.equal(fresh[name], heard[name]) for name in fresh)
    page = (tmp_path / "rm-work" / "report.html").read_text()
    assert page.count("<svg") >= 3
    work = work_folder(config)
    kept = [config.output / "model.safetensors", work / "report.html"]
    written = [path.stat().st_mtime_ns for path in kept]
    (work / "heldout_margins.parquet").unlink()  # what the report was made of is not needed again
    assert train_reward_model(config) == said
    assert [path.stat().st_mtime_ns for path in kept] == written

    values = tiny_recipe(stack, tmp_path / "run").model_dump(mode="json")
    values["judges"] = [{"kind": "reward_model", "path": str(config.output)}]
    values["reward"] = {"terms": [{"measure": "reward_model", "weight": 1.0}]}
    values["pairing"] = {"kinds": ["ranked"], "min_margin": 1e-6}
    run = AlignConfig.model_validate(values)
    run_align(run, until="pairs")
    rows = pq.read_table(run.run_dir / "iteration-1" / "scored" / "scored.parquet").to_pylist()
    assert all(row["reward_model"] is not None for row in rows if row["token_ids"])
    pairs = pq.read_table(run.run_dir / "iteration-1" / "pairs" / "pairs.parquet").to_pylist()
    rewards = {(row["prompt_id"], tuple(row["token_ids"])): row["reward_model"] for row in rows}
    for pair in pairs:
        chosen, rejected = (
            rewards[pair["prompt_id"], tuple(pair[side])]
            for side in ("chosen_token_ids", "rejected_token_ids")
        )
        assert chosen - rejected == pytest.approx(pair["margin"], abs=1e-5)


def test_the_head_alone_learns_and_golden_answers_are_worth_nothing_in_the_mean(
    stack: TinyStack, tmp_path: Path
):
    fingerprint = manifest_facts(stack.ar)["codec_fingerprint"]
    config = a_config(stack, tmp_path, write_pairs(tmp_path / "pairs", fingerprint))
    engine = EngineConfig(learning_rate=3e-2)
    # Turned round: of what it has learned, the contrary is right here.
    turned = [
        replace(p, chosen_token_ids=p.rejected_token_ids, rejected_token_ids=p.chosen_token_ids)
        for p in read_pairs(config.pairs[0])
    ]
    with committed_folder(tmp_path / "others", {}) as partial:
        pq.write_table(pairs_to_table(turned), partial / PAIRS)
    others = (tmp_path / "others",)
    changes = {"train_policy": False, "engine": engine, "measured_pairs": others}
    config = config.model_copy(update=changes)
    said = train_reward_model(config)
    (right,) = re.findall(rf"right of the pairs of {others[0]}: ([\d.]+)% of 60", said)
    assert float(right) < 10
    assert f"{right}% of 60" in (tmp_path / "rm-work" / "report.html").read_text()
    assert manifest_facts(config.output)["heldout_accuracy"] > 0.9
    loaded = load_reward_model(config.output)
    fresh = load_ar(stack.ar).model.state_dict()
    for name, tensor in loaded.model.policy.state_dict().items():
        torch.testing.assert_close(tensor, fresh[name], atol=0, rtol=0)
    _, heldout = split_pairs(read_pairs(config.pairs[0]), config.heldout_share, config.seed)
    chosen = loaded.rewards([(p.prompt_token_ids, p.chosen_token_ids) for p in heldout])
    assert np.mean(chosen) == pytest.approx(0, abs=1e-4)


def forget_the_end_of(config: RewardModelConfig) -> None:
    """Leave what a killed training leaves: a checkpoint, of one that had all its steps to do."""
    shutil.rmtree(config.output)
    (work_folder(config) / "report.html").unlink()
    manifest = work_folder(config) / "checkpoint" / MANIFEST
    known = json.loads(manifest.read_text())
    known["facts"]["identity"] = identity_of(config)
    manifest.write_text(json.dumps(known))


def metrics_of(config: RewardModelConfig) -> list[dict[str, float]]:
    return read_metrics(work_folder(config) / "metrics.jsonl")


def test_the_weights_of_the_lowest_heldout_loss_survive_a_kill(stack: TinyStack, tmp_path: Path):
    fingerprint = manifest_facts(stack.ar)["codec_fingerprint"]
    config = a_config(stack, tmp_path, write_pairs(tmp_path / "pairs", fingerprint))
    # Held-out pairs that say the contrary of the training pairs: the first look is the best.
    pairs = read_pairs(tmp_path / "pairs")
    _, heldout = split_pairs(pairs, config.heldout_share, config.seed)
    others = {pair.pair_id for pair in heldout}
    turned = [
        replace(p, chosen_token_ids=p.rejected_token_ids, rejected_token_ids=p.chosen_token_ids)
        if p.pair_id in others
        else p
        for p in pairs
    ]
    with committed_folder(tmp_path / "pairs", {}) as partial:
        pq.write_table(pairs_to_table(turned), partial / PAIRS)
    workers = WorkersConfig(num_workers=1, max_failures=0)
    changes = {"heldout_every": 5, "checkpoint_every": 10, "workers": workers}
    whole = config.model_copy(update=changes | {"output": tmp_path / "whole"})
    train_reward_model(whole)

    killed = config.model_copy(update=changes | {"output": tmp_path / "killed"})
    train_reward_model(killed.model_copy(update={"num_steps": 10}))
    forget_the_end_of(killed)
    with (work_folder(killed) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "loss": 9.0}\n')  # it came as far, without a checkpoint
    said = train_reward_model(killed)

    assert "weights of update 5 of 20" in said
    assert manifest_facts(killed.output)["best_step"] == 5
    assert [row["step"] for row in metrics_of(killed)] == [5, 5, 10, 10, 15, 15, 20, 20]
    losses = [
        [row["heldout_loss"] for row in metrics_of(config) if "heldout_loss" in row]
        for config in (killed, whole)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] == min(losses[0])
    assert manifest_facts(killed.output)["heldout_loss"] == pytest.approx(losses[0][0], abs=1e-5)
    assert "pairs_per_s" in metrics_of(killed)[0]
    first, second = (load_reward_model(config.output).model for config in (killed, whole))
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(tensor, second.state_dict()[name], atol=1e-5, rtol=1e-4)


def test_pairs_of_another_codec_are_refused_before_any_worker_starts(
    stack: TinyStack, tmp_path: Path
):
    config = a_config(stack, tmp_path, write_pairs(tmp_path / "pairs", "other"))
    with pytest.raises(DataError, match="their codes mean different sounds"):
        train_reward_model(config)


def test_too_few_pairs_are_refused(stack: TinyStack, tmp_path: Path):
    fingerprint = manifest_facts(stack.ar)["codec_fingerprint"]
    config = a_config(stack, tmp_path, write_pairs(tmp_path / "pairs", fingerprint, count=6))
    with pytest.raises(ConfigError, match="do not fill one step of 8"):
        train_reward_model(config)
