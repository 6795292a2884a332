"""Prompts, samples and judged samples of a run."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from speechalign.artifacts import committed_folder, is_committed, manifest_facts, verify_folder
from speechalign.config.align import AlignConfig
from speechalign.config.judges import JudgeConfig, RewardModelJudgeConfig, judge_name
from speechalign.policy.ar import VOCABULARY
from speechalign.policy.vocabulary import Vocabulary
from speechalign.rewards.learned import RewardModelStage
from speechalign.rewards.stage import JudgeStage
from speechalign.sampling.pipeline import (
    SCORED,
    Stage,
    render_stage,
    sample_and_judge,
    sample_stage,
)
from speechalign.sampling.prompts import admit_prompts, build_prompts

TRAIN, HELDOUT, QUARANTINE = "train.parquet", "heldout.parquet", "quarantine.parquet"


def write_prompts(config: AlignConfig, folder: Path) -> None:
    """Choose the prompts of training and evaluation, once for all iterations."""
    golden = pq.read_table(config.golden)
    evaluation = config.evaluation
    chosen = {TRAIN: (config.prompts, config.seed), HELDOUT: (evaluation.prompts, evaluation.seed)}
    facts = manifest_facts(config.policy)
    vocabulary = Vocabulary.load(config.policy / VOCABULARY)
    feedback = 1  # a token that chain of hindsight may put in front
    room = config.engine.max_model_len - config.sampling.max_new_tokens - feedback
    dropped: list[pa.Table] = []
    with committed_folder(folder, {"kind": "prompts"}) as partial:
        for file, (prompts_config, seed) in chosen.items():
            prompts = build_prompts(golden, prompts_config, seed=seed)
            admitted = admit_prompts(prompts, vocabulary, facts, max_prompt_tokens=room)
            pq.write_table(admitted.prompts, partial / file)
            dropped.append(admitted.quarantine)
        pq.write_table(pa.concat_tables(dropped), partial / QUARANTINE)


def write_samples(config: AlignConfig, policy: Path, folder: Path) -> None:
    """Let the policy answer the training prompts; nothing is rendered or judged."""
    prompts = read_prompts(config, TRAIN)
    sample_and_judge(prompts, [_sampling(config, policy)], folder, keep_audio=False)


def write_scored(config: AlignConfig, policy: Path, folder: Path) -> None:
    """Sample, render and judge the training prompts in one stream.

    Samples that `speechalign sample` has left beside `folder` are not drawn again.
    """
    samples = folder.with_name("samples")
    if is_committed(samples):
        verify_folder(samples)
        table = pq.read_table(samples / SCORED)
        stages = listening_stages(config, policy, config.judges)
    else:
        table = read_prompts(config, TRAIN)
        stages = speaking_stages(config, policy, config.judges)
    sample_and_judge(table, stages, folder, keep_audio=False)


def read_prompts(config: AlignConfig, file: str) -> pa.Table:
    """Return the prompts that the run has chosen."""
    return pq.read_table(config.run_dir / "prompts" / file)


def speaking_stages(
    config: AlignConfig, policy: Path, judges: tuple[JudgeConfig, ...]
) -> list[Stage]:
    """Return the stages from prompts to judged samples."""
    return [_sampling(config, policy), *listening_stages(config, policy, judges)]


def listening_stages(
    config: AlignConfig, policy: Path, judges: tuple[JudgeConfig, ...]
) -> list[Stage]:
    """Return the stages from samples to judged samples."""
    render = render_stage(
        config.codec,
        policy.resolve(),
        config.nar.resolve(),
        config.rendering,
        pool=config.pools.render,
    )
    return [render, *map(_judging, judges)]


def _judging(judge: JudgeConfig) -> Stage:
    stage: type[JudgeStage | RewardModelStage] = JudgeStage
    if isinstance(judge, RewardModelJudgeConfig):
        judge = judge.model_copy(update={"path": judge.path.resolve()})
        stage = RewardModelStage
    return Stage(name=judge_name(judge), stage=stage, arguments={"config": judge}, pool=judge.pool)


def _sampling(config: AlignConfig, policy: Path) -> Stage:
    return sample_stage(
        policy.resolve(),
        config.engine,
        config.sampling,
        run_seed=config.seed,
        pool=config.pools.sample,
    )
