"""Prompts, samples and judged samples of a run."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from speechalign.artifacts import committed_folder, is_committed, manifest_facts, verify_folder
from speechalign.config.align import AlignConfig
from speechalign.config.judges import (
    JudgeConfig,
    PythonJudgeConfig,
    RewardModelJudgeConfig,
    judge_measures,
    judge_name,
    listens,
)
from speechalign.errors import DataError
from speechalign.policy.ar import VOCABULARY
from speechalign.policy.vocabulary import Vocabulary
from speechalign.rewards.learned import RewardModelStage
from speechalign.rewards.stage import JudgeStage
from speechalign.rewards.user_tokens import UserTokenStage
from speechalign.rows import RENDERED, SAMPLE
from speechalign.sampling.heldout import ERRORS, HeldoutStage
from speechalign.sampling.pipeline import (
    QUARANTINED,
    SCORED,
    SECONDS,
    Stage,
    render_stage,
    sample_and_judge,
    sample_stage,
)
from speechalign.sampling.prompts import admit_prompts, build_prompts
from speechalign.sampling.stages import RENDER_SECONDS

TRAIN, HELDOUT, QUARANTINE = "train.parquet", "heldout.parquet", "quarantine.parquet"
SOUND = [*(f for f in RENDERED if f.name not in {*SAMPLE.names, ERRORS.name}), RENDER_SECONDS]
"""The columns that rendering adds."""


def write_prompts(config: AlignConfig, folder: Path) -> None:
    """Choose the prompts of training and evaluation, once for all iterations.

    Raises:
        DataError: there are too few recordings for so many prompts.
    """
    golden = pq.read_table(config.golden)
    evaluation = config.evaluation
    turns = config.pipeline.iterations if config.pipeline.prompts == "fresh" else 1
    several = config.prompts.model_copy(update={"num_prompts": turns * config.prompts.num_prompts})
    chosen = {TRAIN: (several, config.seed), HELDOUT: (evaluation.prompts, evaluation.seed)}
    facts = manifest_facts(config.policy)
    vocabulary = Vocabulary.load(config.policy / VOCABULARY)
    feedback = 1  # a token that chain of hindsight may put in front
    room = config.engine.max_model_len - config.sampling.max_new_tokens - feedback
    dropped: list[pa.Table] = []
    with committed_folder(folder, {"kind": "prompts"}) as partial:
        for file, (prompts_config, seed) in chosen.items():
            try:
                prompts = build_prompts(golden, prompts_config, seed=seed)
            except DataError as error:
                raise DataError(f"{file}: {error}{_why_so_many(file, config)}") from None
            admitted = admit_prompts(prompts, vocabulary, facts, max_prompt_tokens=room)
            pq.write_table(admitted.prompts, partial / file)
            dropped.append(admitted.quarantine)
        pq.write_table(pa.concat_tables(dropped), partial / QUARANTINE)


def _why_so_many(file: str, config: AlignConfig) -> str:
    """Return what a person must know who asked for fewer prompts than were looked for."""
    turns, size = config.pipeline.iterations, config.prompts.num_prompts
    if file != TRAIN or turns == 1 or config.pipeline.prompts == "same":
        return ""
    return (
        f". {turns} iterations want {size} other prompts each; set pipeline.prompts to same for "
        "the same ones again"
    )


def write_samples(config: AlignConfig, iteration: int, policy: Path, folder: Path) -> None:
    """Let the policy answer the training prompts; nothing is rendered or judged."""
    prompts = training_prompts(config, iteration)
    sample_and_judge(prompts, [sampling_stage(config, policy)], folder, keep_audio=False)


def write_scored(config: AlignConfig, iteration: int, policy: Path, folder: Path) -> None:
    """Sample, render and judge the training prompts in one stream.

    Samples that `speechalign sample` has left beside `folder` are not drawn again. Where no
    judge listens, nothing is rendered.
    """
    samples = folder.with_name("samples")
    stages = judging_stages(config, policy, config.judges)
    if is_committed(samples):
        facts = verify_folder(samples)
        if not stages:
            with committed_folder(folder, facts) as partial:
                for file in (SCORED, QUARANTINED):
                    shutil.copy(samples / file, partial / file)
            return
        table = pq.read_table(samples / SCORED)
    else:
        table = training_prompts(config, iteration)
        stages = [sampling_stage(config, policy), *stages]
    sample_and_judge(table, stages, folder, keep_audio=False)


def training_prompts(config: AlignConfig, iteration: int) -> pa.Table:
    """Return the texts that the policy speaks in an iteration, 1 being the first."""
    prompts = read_prompts(config, TRAIN)
    if config.pipeline.prompts == "same":
        return prompts
    size = -(-prompts.num_rows // config.pipeline.iterations)
    return prompts.slice((iteration - 1) * size, size)


def read_prompts(config: AlignConfig, file: str) -> pa.Table:
    """Return the prompts that the run has chosen."""
    return pq.read_table(config.run_dir / "prompts" / file)


def speaking_stages(
    config: AlignConfig, policy: Path, judges: tuple[JudgeConfig, ...]
) -> list[Stage]:
    """Return the stages from prompts to judged samples."""
    return [sampling_stage(config, policy), *listening_stages(config, policy, judges)]


def judging_stages(
    config: AlignConfig, policy: Path, judges: tuple[JudgeConfig, ...]
) -> list[Stage]:
    """Return the stages from samples to judged samples; nothing is rendered for nobody."""
    if any(map(listens, judges)):
        return listening_stages(config, policy, judges)
    return list(map(_judging, judges))


def rollout_judging_stages(config: AlignConfig, policy: Path) -> list[Stage]:
    """Return the stages from rollouts to judged ones.

    Only held-out answers pass the judges of `training.heldout`, and only they are rendered where
    no other judge listens.
    """
    heard_by_all = {stage.name for stage in judging_stages(config, policy, config.judges)}
    stages = judging_stages(config, policy, (*config.judges, *config.heldout_judges))
    added = {judge_name(judge): _measured(judge) for judge in config.heldout_judges}
    return [
        stage if stage.name in heard_by_all else _of_heldout(stage, added.get(stage.name, SOUND))
        for stage in stages
    ]


def _of_heldout(stage: Stage, adds: "list[pa.Field[Any]]") -> Stage:
    arguments = {"stage": stage.stage, "arguments": stage.arguments, "adds": adds}
    return replace(stage, stage=HeldoutStage, arguments=arguments)


def _measured(judge: JudgeConfig) -> "list[pa.Field[Any]]":
    """Return the columns of numbers that a judge adds."""
    names = (*judge_measures(judge), judge_name(judge) + SECONDS)
    return [pa.field(name, pa.float32()) for name in names]


def listening_stages(
    config: AlignConfig, policy: Path, judges: tuple[JudgeConfig, ...]
) -> list[Stage]:
    """Return the stages from samples to judged samples with sound."""
    render = render_stage(
        config.codec,
        policy.resolve(),
        config.nar.resolve(),
        config.rendering,
        pool=config.pools.render,
    )
    return [render, *map(_judging, judges)]


def _judging(judge: JudgeConfig) -> Stage:
    stage: type[JudgeStage | RewardModelStage | UserTokenStage] = JudgeStage
    if isinstance(judge, RewardModelJudgeConfig):
        judge = judge.model_copy(update={"path": judge.path.resolve()})
        stage = RewardModelStage
    elif isinstance(judge, PythonJudgeConfig) and judge.reads == "tokens":
        stage = UserTokenStage
    return Stage(name=judge_name(judge), stage=stage, arguments={"config": judge}, pool=judge.pool)


def sampling_stage(config: AlignConfig, policy: Path) -> Stage:
    """Return the stage from prompts to samples."""
    return sample_stage(
        policy.resolve(),
        config.engine,
        config.sampling,
        run_seed=config.seed,
        pool=config.pools.sample,
    )
