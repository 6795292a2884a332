"""The online loop without a cluster: the sampler's stage and one trainer take turns."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from speechalign.artifacts import verify_folder
from speechalign.config.online_training import OnlineTrainingConfig
from speechalign.config.sampling import PromptsConfig, SamplingConfig, TransformersConfig
from speechalign.errors import BudgetExceeded, Diverged, LogprobMismatch, StaleRollouts, Stopped
from speechalign.evaluation.plots import training_curves
from speechalign.pipeline.sample import rollout_judging_stages
from speechalign.policy.answer_batch import AnswerBatch
from speechalign.policy.ar import load_ar
from speechalign.policy.versions import PolicyVersions, Probe
from speechalign.rewards.combine import rewards_of
from speechalign.rows import Row, prompts_to_table
from speechalign.sampling.prompts import build_prompts
from speechalign.sampling.rollouts import RolloutStage, Sampler, plan_rollouts
from speechalign.training.metrics import read_metrics
from speechalign.training.online import OnlineJob, OnlinePaths, OnlineTrainer, finished_steps
from speechalign.training.online_base import OnlineTask, TrainedPolicy
from speechalign.training.stopping import STOP_REQUEST
from speechalign.types import Measured, Score, Unmeasured
from tests.online_toy import a_process_group
from tests.tiny_stack import TinyStack, build_tiny_stack, tiny_recipe

pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLES = 3
PROBES = (
    Probe(prompt_token_ids=(2, 9, 10, 3, 30, 4), answer_token_ids=(8, 9, 10, 1)),
    Probe(prompt_token_ids=(2, 9, 3, 31, 4), answer_token_ids=(12, 1)),
)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyStack]:
    with a_process_group():
        yield build_tiny_stack(tmp_path_factory.mktemp("stack"), num_clips=60)


def a_config(**changes: Any) -> OnlineTrainingConfig:
    values: dict[str, Any] = {
        "method": "grpo",
        "num_steps": 4,
        "prompts_per_step": 4,
        "answers_per_forward": 8,
        "truncated": "kept",
        "checkpoint_every": 1,
        "heldout": {"every": 2, "num_prompts": 4, "answers_per_prompt": 2},
        "guards": {"min_stop_share": 0.0},
        "engine": {"learning_rate": 1e-3},
        "workers": {"num_workers": 1},
    }
    return OnlineTrainingConfig.model_validate(values | changes)


def share_of_low_tokens(rows: Sequence[Row]) -> list[Score]:
    return [
        Measured(sum(token < 16 for token in row["token_ids"]) / len(row["token_ids"]))
        for row in rows
    ]


class Run:
    """A job, and what its sampler would send it."""

    def __init__(
        self, stack: TinyStack, folder: Path, config: OnlineTrainingConfig, **job: Any
    ) -> None:
        self.config = config
        self.paths = OnlinePaths(
            policy=stack.ar, reference=stack.ar, output=folder / "iteration-1" / "policy"
        )
        self.job = replace(
            OnlineJob(
                task=OnlineTask(config=config, temperature=1.0, samples_per_prompt=SAMPLES),
                paths=self.paths,
                probes=PROBES,
                rewards=share_of_low_tokens,
                failure_budget=0.2,
            ),
            **job,
        )
        golden = pq.read_table(stack.golden)
        chosen = PromptsConfig(num_prompts=16, speaker_frames=8, max_golden_frames=100)
        self.prompts = prompts_to_table(build_prompts(golden, chosen, seed=0))

    def blocks(self) -> Iterator[pa.Table]:
        """Yield what Ray Data would: a block is sampled when the trainer asks for it."""
        sampler = Sampler(
            versions=self.paths.versions,
            engine=TransformersConfig(max_model_len=64),
            sampling=SamplingConfig(samples_per_prompt=SAMPLES, max_new_tokens=16),
            run_seed=0,
            heldout_answers=self.config.heldout.answers_per_prompt,
            probes=PROBES,
            max_logprob_difference=self.config.max_logprob_difference,
            timeout_s=2.0,
        )
        stage = RolloutStage(sampler)
        steps = range(finished_steps(self.paths), self.config.num_steps)
        learned, heldout = self.prompts.slice(4), self.prompts.slice(0, 4)
        for block in plan_rollouts(learned, heldout, steps, self.config):
            yield stage(block)

    def train(self, blocks: Iterable[pa.Table] | None = None) -> OnlineTrainer:
        trainer = OnlineTrainer(self.job)
        trainer.run(self.blocks() if blocks is None else blocks)
        return trainer

    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.paths.work / "metrics.jsonl")

    def version(self, step: int) -> dict[str, torch.Tensor]:
        return load_ar(self.paths.versions / f"v{step:06d}").model.state_dict()


class Killed(Exception):
    pass


def until_killed(blocks: Iterator[pa.Table], count: int) -> Iterator[pa.Table]:
    for _ in range(count):
        yield next(blocks)
    raise Killed


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "grpo"},
        {"method": "grpo", "max_staleness": 1},
        {"method": "ppo", "kl": {"coefficient": 0.01, "controller": "adaptive"}},
        {"method": "online_dpo", "online_dpo": {"min_margin": 0.01}},
    ],
)
def test_a_killed_training_ends_like_one_that_was_left_alone(
    stack: TinyStack, tmp_path: Path, changes: dict[str, Any]
):
    whole = Run(stack, tmp_path / "whole", a_config(**changes))
    whole.train().commit()
    killed = Run(stack, tmp_path / "killed", a_config(**changes))
    with pytest.raises(Killed):
        killed.train(until_killed(killed.blocks(), 3))
    assert finished_steps(killed.paths) == 2
    killed.train().commit()
    for name, weight in whole.version(4).items():
        torch.testing.assert_close(killed.version(4)[name], weight, atol=1e-6, rtol=0)
    facts = [verify_folder(run.paths.output) for run in (whole, killed)]
    for key in ("best_step", "best_heldout_reward", "num_answers", "policy_version"):
        assert facts[0][key] == pytest.approx(facts[1][key]), key
    rows = [
        [(row["step"], round(row["reward"], 6)) for row in run.metrics() if "reward" in row]
        for run in (whole, killed)
    ]
    assert rows[0] == rows[1]
    looks = [row["step"] for row in killed.metrics() if "heldout_reward" in row]
    assert looks == ([0, 1, 4] if "max_staleness" in changes else [0, 2, 4])


def test_a_training_that_is_asked_to_stop_saves_and_goes_on_where_it_was(
    stack: TinyStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = a_config(num_steps=2, checkpoint_every=10)
    whole, stopped = (Run(stack, tmp_path / name, config) for name in ("whole", "stopped"))
    whole.train().commit()
    request = stopped.paths.work / STOP_REQUEST
    request.parent.mkdir(parents=True)

    request.touch()  # while it waits for a block, which it then does not learn from
    with pytest.raises(Stopped):
        stopped.train(until_killed(stopped.blocks(), 1))
    assert finished_steps(stopped.paths) == 0
    with pytest.raises(Diverged, match="the trainer stopped"):
        PolicyVersions(stopped.paths.versions).wait_for(1, timeout_s=1.0)
    request.unlink()

    learn: Any = vars(OnlineTrainer)["_learn"]

    def asked_and_learn(*arguments: Any) -> Any:
        request.touch()
        return learn(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Stopped):  # while it learns
        patch.setattr(OnlineTrainer, "_learn", asked_and_learn)
        stopped.train(until_killed(stopped.blocks(), 1))
    assert finished_steps(stopped.paths) == 1
    request.unlink()

    stopped.train().commit()
    rewards = [
        [row["reward"] for row in run.metrics() if "reward" in row] for run in (whole, stopped)
    ]
    assert rewards[0] == pytest.approx(rewards[1])
    assert len(rewards[0]) == 2


def test_a_step_moves_the_policy_and_raises_the_reward(stack: TinyStack, tmp_path: Path):
    far = {"min_stop_share": 0.0, "max_kl": 10.0, "patience": 10}
    config = a_config(num_steps=12, prompts_per_step=8, engine={"learning_rate": 0.01}, guards=far)
    run = Run(stack, tmp_path, config)
    run.train().commit()
    looks = [row["heldout_reward"] for row in run.metrics() if "heldout_reward" in row]
    assert max(looks) > looks[0] + 0.1
    facts = verify_folder(run.paths.output)
    assert facts["best_heldout_reward"] == pytest.approx(max(looks))
    assert facts["policy_version"] == facts["best_step"]


@pytest.mark.parametrize(("staleness", "versions"), [(0, [0, 1, 2]), (1, [0, 0, 1])])
def test_a_block_is_answered_by_the_version_that_its_step_asks_for(
    stack: TinyStack, tmp_path: Path, staleness: int, versions: list[int]
):
    run = Run(stack, tmp_path, a_config(num_steps=3, max_staleness=staleness))
    seen: list[pa.Table] = []

    def watched() -> Iterator[pa.Table]:
        for block in run.blocks():
            seen.append(block)
            yield block

    run.train(watched())
    found = [set(block["policy_version"].to_pylist()) for block in seen]
    assert found == [*({version} for version in versions), {3}]


def test_answers_of_another_version_stop_the_run(stack: TinyStack, tmp_path: Path):
    run = Run(stack, tmp_path, a_config())
    block = next(run_blocks_of(run))
    index = block.schema.get_field_index("policy_version")
    wrong = pa.array([5] * block.num_rows, pa.int64())
    stale = block.set_column(index, block.schema.field(index), wrong)
    with pytest.raises(StaleRollouts, match="policy version 5, wanted was 0"):
        run.train([stale])


def test_a_step_out_of_turn_stops_the_run(stack: TinyStack, tmp_path: Path):
    run = Run(stack, tmp_path, a_config())
    block = next(run_blocks_of(run))
    with pytest.raises(StaleRollouts, match="step 0 came when those of 1"):
        run.train([block, block])


def run_blocks_of(run: Run) -> Iterator[pa.Table]:
    OnlineTrainer(run.job)  # publishes the first version
    return run.blocks()


@pytest.mark.parametrize(("change", "says"), [(0.01, r"1\.00e-02 nats"), (math.nan, "nan nats")])
def test_a_sampler_that_disagrees_with_the_trainer_stops(
    stack: TinyStack, tmp_path: Path, change: float, says: str
):
    run = Run(stack, tmp_path, a_config())
    OnlineTrainer(run.job)
    manifest = run.paths.versions / "v000000" / "manifest.json"
    values = json.loads(manifest.read_text())
    values["facts"]["probe_logprobs"][1][0] += change
    manifest.write_text(json.dumps(values))
    with pytest.raises(LogprobMismatch, match=says):
        next(run.blocks())


def test_looks_are_taken_in_the_batches_that_the_memory_allows(
    stack: TinyStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[int] = []
    reference: Any = vars(TrainedPolicy)["reference"]

    def counted(policy: TrainedPolicy, batch: AnswerBatch) -> Any:
        asked.append(len(batch.input_ids_BS))
        return reference(policy, batch)

    monkeypatch.setattr(TrainedPolicy, "reference", counted)
    run = Run(stack, tmp_path, a_config(num_steps=1, answers_per_forward=3))
    run.train()  # without a KL cost, only looks ask the reference: two, of 8 answers
    assert asked == [3, 3, 2] * 2


def test_what_judges_measured_is_written_apart_for_held_out_answers(
    stack: TinyStack, tmp_path: Path
):
    run = Run(stack, tmp_path, a_config(num_steps=1))

    def judged() -> Iterator[pa.Table]:
        for block in run.blocks():
            heldout = iter((0.25, None, *[0.75, 0.25] * 3))  # mean of the measured: 3.25 / 7
            flags = block["is_heldout"].to_pylist()
            measured = [next(heldout) if is_heldout else 1.0 for is_heldout in flags]
            yield block.append_column("wer", pa.array(measured, pa.float32()))

    run.train(judged())
    rows = run.metrics()
    looks = [row["heldout_judge_wer"] for row in rows if "heldout_reward" in row]
    assert looks == pytest.approx([3.25 / 7] * 2)
    assert [row["judge_wer"] for row in rows if "reward" in row] == [1.0]
    page = "".join(training_curves(rows))
    assert "judged: wer" in page


LOW = {"kind": "python", "name": "low", "target": "tests.user_rewards:ShareOfLowTokens",
       "reads": "tokens"}  # fmt: skip


def test_a_judge_of_held_out_answers_hears_no_others(stack: TinyStack, tmp_path: Path):
    recipe = tiny_recipe(
        stack,
        tmp_path / "recipe",
        judges=[LOW],
        reward={"terms": [{"measure": "low", "weight": 1.0}]},
        training={"method": "grpo", "heldout": {"judges": [{"kind": "signal"}]}},
    )
    rewards = partial(rewards_of, config=recipe.reward)
    run = Run(stack, tmp_path, a_config(num_steps=1), rewards=rewards)
    planned = rollout_judging_stages(recipe, stack.ar)
    stages = [stage.stage(**stage.arguments) for stage in planned]

    def judged() -> Iterator[pa.Table]:
        for block in run.blocks():
            for stage in stages:
                block = stage(block)
            yield block

    run.train(judged())
    rows = run.metrics()
    looks = [row for row in rows if "heldout_reward" in row]
    assert [row["heldout_judge_low"] for row in looks] == pytest.approx(
        [row["heldout_reward"] for row in looks]
    )
    assert all(0 < row["heldout_judge_silence_ratio"] <= 1 for row in looks)
    (learned,) = [row for row in rows if "reward" in row]
    assert [key for key in learned if key.startswith("judge_")] == ["judge_low"]
    assert "judged: silence_ratio" in "".join(training_curves(rows))


def heard_by_another(run: Run, wers: dict[int, float]) -> Iterator[pa.Table]:
    """Yield blocks whose held-out answers have 18 and 2 words, all errors in the long ones.

    Args:
        run: its blocks.
        wers: of all words, by the step of the policy.
    """
    for block in run.blocks():
        first: Row = block.slice(0, 1).to_pylist()[0]
        flags, wer = block["is_heldout"].to_pylist(), wers.get(first["version_step"], 0.0)
        is_long = iter([True, False] * len(flags))
        told = [(20 * wer, 18.0) if next(is_long) else (0.0, 2.0) for _ in flags]
        for name, values in (
            ("eval_word_errors", [errors for errors, _ in told]),
            ("eval_words", [words for _, words in told]),
            ("eval_wer", [errors / words for errors, words in told]),
        ):
            cells = [value if flag else None for value, flag in zip(values, flags, strict=True)]
            block = block.append_column(name, pa.array(cells, pa.float32()))
        yield block


def test_a_wer_that_grows_stops_the_run_also_after_it_was_killed(stack: TinyStack, tmp_path: Path):
    run, wers = Run(stack, tmp_path, a_config()), {0: 0.2, 2: 0.31}
    with pytest.raises(Killed):
        run.train(until_killed(heard_by_another(run, wers), 2))
    assert finished_steps(run.paths) == 1
    run.train(heard_by_another(run, wers)).commit()
    assert verify_folder(run.paths.output)["stop_reason"] == (
        "step 2: the held-out WER grew from 20.0% to 31.0%, by more than guards.max_wer_growth 50%"
    )
    assert_it_is_the_start(run, stack)
    looks = [row for row in run.metrics() if "heldout_reward" in row]
    assert [row["heldout_wer"] for row in looks] == pytest.approx([0.2, 0.31])
    assert not [key for row in run.metrics() for key in row if key.startswith("judge_")]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        (
            {"method": "ppo", "kl": {"coefficient": 0.01}},
            ("critic", "policy loss", "KL (k3), trained on", "held back, trained on"),
        ),
        (
            {"method": "grpo"},
            ("policy loss", "share of the groups that teach nothing", "learned from, trained on"),
        ),
        (
            {"method": "online_dpo", "online_dpo": {"min_margin": 0.01}},
            ("accuracy", "no pair, trained on"),
        ),
    ],
)
def test_a_report_shows_what_a_training_wrote(
    stack: TinyStack, tmp_path: Path, changes: dict[str, Any], shown: tuple[str, ...]
):
    run = Run(stack, tmp_path, a_config(num_steps=1, **changes))
    run.train()
    page = "".join(training_curves(run.metrics()))
    of_all = [
        f"{label}, {which}"
        for label in ("reward", "entropy", "length", "end by themselves")
        for which in ("trained on", "held out")
    ]
    for name in (*of_all, "KL (k1), held out", *shown):
        assert name in page, name


def a_tenth_fails(rows: Sequence[Row]) -> list[Score]:
    scores = share_of_low_tokens(rows)
    return [Unmeasured("broken") if i % 10 == 9 else score for i, score in enumerate(scores)]


def test_failed_rewards_are_counted_and_left_out(stack: TinyStack, tmp_path: Path):
    run = Run(stack, tmp_path, a_config(num_steps=2), rewards=a_tenth_fails)
    run.train().commit()
    facts = verify_folder(run.paths.output)
    assert facts["num_answers"] == 2 * 4 * SAMPLES + 2 * 4 * 2
    assert facts["num_without_reward"] == 1 + 2  # rows 9, 19 and 29 of 20 and 12 and 8 rows
    assert all(row["rewarded_share"] < 1 for row in run.metrics() if "reward" in row)


def test_too_many_failed_rewards_stop_the_run(stack: TinyStack, tmp_path: Path):
    run = Run(stack, tmp_path, a_config(), rewards=a_tenth_fails, failure_budget=0.01)
    with pytest.raises(BudgetExceeded, match="answers have no reward"):
        run.train()


def later_is_better_until_it_gives_up(rows: Sequence[Row]) -> list[Score]:
    """Return more for each version; from step 2 on the answers to learn from have no reward."""
    return [
        Measured(row["version_step"])
        if row["is_heldout"] or row["step"] < 2
        else Unmeasured("broken")
        for row in rows
    ]


def test_a_run_whose_judge_gives_up_keeps_the_best_policy(stack: TinyStack, tmp_path: Path):
    config = a_config(num_steps=6, heldout={"every": 1, "num_prompts": 4, "answers_per_prompt": 2})
    run = Run(
        stack, tmp_path, config, rewards=later_is_better_until_it_gives_up, failure_budget=0.1
    )
    run.train().commit()
    facts = verify_folder(run.paths.output)
    assert facts["best_step"] == 2
    assert "answers have no reward after step 2" in facts["stop_reason"]


def always_the_same(rows: Sequence[Row]) -> list[Score]:
    return [Measured(1.0) for _ in rows]


def test_a_critic_that_warms_up_tries_no_patience(stack: TinyStack, tmp_path: Path):
    config = a_config(
        method="ppo",
        num_steps=3,
        ppo={"critic_warmup_steps": 3},
        heldout={"every": 1, "num_prompts": 4, "answers_per_prompt": 2},
        guards={"min_stop_share": 0.0, "patience": 1},
    )
    run = Run(stack, tmp_path, config, rewards=always_the_same)
    run.train().commit()
    facts = verify_folder(run.paths.output)
    assert (facts["num_steps"], facts["stop_reason"]) == (3, "all steps done")


def assert_it_is_the_start(run: Run, stack: TinyStack) -> None:
    facts = verify_folder(run.paths.output)
    assert (facts["best_step"], facts["policy_version"]) == (0, 0)
    before, after = load_ar(stack.ar).model.state_dict(), load_ar(run.paths.output).model
    for name, weight in after.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_a_guard_stops_the_run_and_the_best_is_kept(stack: TinyStack, tmp_path: Path):
    run = Run(stack, tmp_path, a_config(guards={"min_stop_share": 1.0}))
    run.train().commit()
    assert "guards.min_stop_share is 100%" in verify_folder(run.paths.output)["stop_reason"]
    assert_it_is_the_start(run, stack)


def test_a_loss_that_is_no_number_before_anything_was_gained_is_no_success(
    stack: TinyStack, tmp_path: Path
):
    def infinite(rows: Sequence[Row]) -> list[Score]:
        return [Measured(float("inf") if i else 0.0) for i, _ in enumerate(rows)]

    run = Run(stack, tmp_path, a_config(), rewards=infinite)
    with pytest.raises(Diverged, match=r"step 0: .* not a number; .*better than the start"):
        run.train()
    assert not run.paths.output.exists()


def test_versions_that_nobody_needs_are_removed_but_the_best_stays(
    stack: TinyStack, tmp_path: Path
):
    run = Run(stack, tmp_path, a_config(num_steps=6))
    trainer = run.train()
    trainer.commit()
    left = sorted(int(folder.name[1:]) for folder in run.paths.versions.glob("v*"))
    best = verify_folder(run.paths.output)["best_step"]
    assert set(left) == {best, 6}
