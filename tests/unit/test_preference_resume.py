"""A training on pairs that is killed, or asked to stop, ends like one that was left alone."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from speechalign.artifacts import MANIFEST, committed_folder, is_committed, manifest_facts
from speechalign.config.preference_training import PreferenceTrainingConfig
from speechalign.errors import Stopped
from speechalign.policy.ar import load_ar
from speechalign.rows import pairs_to_table
from speechalign.training import preference
from speechalign.training.metrics import MetricsWriter, read_metrics
from speechalign.training.preference import TrainingPaths, preference_worker
from speechalign.training.stopping import STOP_REQUEST
from speechalign.training.stored_pairs import PAIRS, split_pairs
from speechalign.types import PreferencePair
from tests.builders import some_pairs
from tests.online_toy import a_process_group
from tests.tiny_stack import TinyStack, build_tiny_stack

pytestmark = pytest.mark.filterwarnings("ignore")


LIMIT = 0.05
"""Nats a token that held-out answers may lose."""
ANY_PAIRS = some_pairs(25)
LEARNABLE_PAIRS = some_pairs(25, chosen=(8, 16), rejected=(16, 24))
"""Every update on some makes the others better."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyStack]:
    with a_process_group():
        yield build_tiny_stack(tmp_path_factory.mktemp("stack"))


class Training:
    """Ten updates, a look after every third, a checkpoint after every fourth."""

    def __init__(
        self,
        stack: TinyStack,
        folder: Path,
        *,
        pairs: Sequence[PreferencePair] = ANY_PAIRS,
        **changes: Any,
    ) -> None:
        values: dict[str, Any] = {
            "num_epochs": 2,
            "pairs_per_step": 4,
            "heldout_share": 0.2,
            "checkpoint_every": 4,
            "loss": {"sft_weight": 0.1},
            "early_stop": {"every": 3, "patience": 9, "max_chosen_drop": 9.0},
            "engine": {"learning_rate": 3e-3, "warmup_steps": 3, "decay_share": 0.5},
            "workers": {"num_workers": 1},
        }
        self.config = PreferenceTrainingConfig.model_validate(values | changes)
        with committed_folder(folder / "pairs", {}) as partial:
            pq.write_table(pairs_to_table(pairs), partial / PAIRS)
        self.paths = TrainingPaths(
            policy=stack.ar, reference=stack.ar, pairs=folder / "pairs", output=folder / "policy"
        )

    def run(self) -> None:
        paths = {
            name: str(getattr(self.paths, name))
            for name in ("policy", "reference", "pairs", "output")
        }
        preference_worker({"config": self.config.model_dump(mode="json"), "paths": paths})

    def metrics(self) -> list[dict[str, float]]:
        return read_metrics(self.paths.work / "metrics.jsonl")

    def steps(self) -> list[float]:
        return [row["step"] for row in self.metrics() if "loss" in row]


class Killed(Exception):
    pass


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch, training: Training) -> None:
    write = MetricsWriter.write

    def write_or_die(self: MetricsWriter, at: int, values: Mapping[str, float | str]) -> None:
        write(self, at, values)
        if at == step:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MetricsWriter, "write", write_or_die)
        training.run()


def assert_equal(one: Training, other: Training) -> None:
    assert one.metrics() == other.metrics()
    policies = [load_ar(training.paths.output) for training in (one, other)]
    assert policies[0].facts == policies[1].facts
    weights = [policy.model.state_dict() for policy in policies]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=0.0, rtol=0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"early_stop": {"every": 1, "patience": 2, "max_chosen_drop": 9.0}},
        {
            "num_epochs": 4,
            "loss": {"variant": "kto"},
            "engine": {"learning_rate": 3e-3, "num_accumulated": 2},
        },
    ],
    ids=["dpo", "kto, accumulated"],
)
def test_a_killed_training_ends_like_one_that_was_left_alone(
    stack: TinyStack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
):
    whole = Training(stack, tmp_path / "whole", **changes)
    whole.run()
    killed = Training(stack, tmp_path / "killed", **changes)
    kill_at(6, monkeypatch, killed)
    assert killed.steps()[-1] == 6
    assert manifest_facts(killed.paths.checkpoint)["step"] == 4
    killed.run()
    assert_equal(killed, whole)
    left = {path.name for path in killed.paths.work.iterdir()}
    assert left & {"best", "checkpoint", ".checkpoint.former"} == set()


def test_the_driver_makes_all_that_ranks_would_write_to_one_folder(
    stack: TinyStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    training = Training(stack, tmp_path, loss={"variant": "kto"})
    made: list[str] = []

    def workers(*settings: object) -> None:
        made.extend(sorted(path.name for path in training.paths.work.glob("reference*")))
        facts = {"best_step": 2, "num_updates": 9, "stop_reason": "all epochs done"}
        with committed_folder(training.paths.output, facts):
            pass

    monkeypatch.setattr(preference, "run_workers", workers)
    preference.train_on_pairs(training.config, training.paths)
    assert made == ["reference", "reference-mismatched"]


@pytest.mark.parametrize("is_learnable", [True, False])
def test_the_driver_says_why_a_training_ended(
    stack: TinyStack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_learnable: bool,
):
    train, heldout = split_pairs(LEARNABLE_PAIRS, 0.2, 0)
    turned = [  # whatever is learned, the contrary is right there
        replace(p, chosen_token_ids=p.rejected_token_ids, rejected_token_ids=p.chosen_token_ids)
        for p in heldout
    ]
    training = Training(stack, tmp_path, pairs=[*train, *(heldout if is_learnable else turned)])

    def workers(worker: Callable[[Any], None], settings: Any, *others: object) -> None:
        worker(settings)

    monkeypatch.setattr(preference, "run_workers", workers)
    with caplog.at_level("INFO"):
        preference.train_on_pairs(training.config, training.paths)
    facts = manifest_facts(training.paths.output)
    (said,) = [r for r in caplog.records if r.getMessage().startswith("training ended")]
    assert said.levelname == ("INFO" if is_learnable else "WARNING")
    assert said.getMessage() == (
        f"training ended after {facts['num_updates']} updates: {facts['stop_reason']}; the new "
        f"policy is that of update {facts['best_step']}"
    )


def test_a_training_that_is_asked_to_stop_saves_after_the_update_at_hand(
    stack: TinyStack, tmp_path: Path
):
    whole = Training(stack, tmp_path / "whole")
    whole.run()
    stopped = Training(stack, tmp_path / "stopped")
    request = stopped.paths.work / STOP_REQUEST
    for step in (1, 2):
        request.parent.mkdir(exist_ok=True)
        request.touch()
        with pytest.raises(Stopped):
            stopped.run()
        assert manifest_facts(stopped.paths.checkpoint)["step"] == step
        assert not is_committed(stopped.paths.output)
    request.unlink()
    stopped.run()
    assert_equal(stopped, whole)


def test_a_resumed_training_counts_the_drop_from_its_start_and_not_from_the_reference(
    stack: TinyStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    better = Training(stack, tmp_path / "better")
    better.run()
    strict = {"every": 3, "patience": 9, "max_chosen_drop": LIMIT}
    training = Training(stack, tmp_path / "run", early_stop=strict)
    training.paths = replace(training.paths, reference=better.paths.output)
    kill_at(6, monkeypatch, training)
    first, *_ = training.metrics()
    assert first["heldout_chosen_drop"] > LIMIT
    training.run()
    assert training.steps()[-1] == 10


def test_the_best_weights_before_a_checkpoint_outlive_better_ones_after_it(
    stack: TinyStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    training = Training(
        stack,
        tmp_path,
        pairs=LEARNABLE_PAIRS,
        early_stop={"every": 1, "max_chosen_drop": 9.0},
    )
    kill_at(6, monkeypatch, training)
    state = json.loads((training.paths.checkpoint / "state.json").read_text())
    assert state["early_stop"]["best"]["step"] == 4
    kept = {path.name for path in (training.paths.work / "best").glob("step-*")}
    assert kept == {"step-4", "step-5"}


def test_a_checkpoint_of_other_pairs_is_not_gone_on_from(
    stack: TinyStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    training = Training(stack, tmp_path)
    kill_at(6, monkeypatch, training)
    manifest = training.paths.pairs / MANIFEST
    manifest.write_text(manifest.read_text() + "\n")
    training.run()
    assert training.steps() == list(range(1, 11))
    assert [row["step"] for row in training.metrics()].count(0) == 1


def test_a_kill_while_a_checkpoint_is_replaced_leaves_the_former(
    stack: TinyStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    training = Training(stack, tmp_path)
    kill_at(6, monkeypatch, training)
    checkpoint = training.paths.checkpoint
    checkpoint.rename(checkpoint.with_name(".checkpoint.former"))
    kill_at(5, monkeypatch, training)  # it came back at step 4, and went on
    assert manifest_facts(checkpoint)["step"] == 4
