"""What a policy, or no policy at all, sounds like on held-out prompts."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from speechalign.artifacts import is_committed, verify_folder
from speechalign.config.align import AlignConfig
from speechalign.config.sampling import RenderingConfig
from speechalign.errors import DataError
from speechalign.pipeline.sample import (
    HELDOUT,
    judging_stages,
    listening_stages,
    read_prompts,
    sampling_stage,
    speaking_stages,
)
from speechalign.policy.ar import VOCABULARY
from speechalign.policy.vocabulary import Vocabulary
from speechalign.rewards.combine import best_of_groups
from speechalign.rows import SAMPLE
from speechalign.sampling.pipeline import SCORED, sample_and_judge
from speechalign.sampling.prompts import golden_samples


def evaluate_policy(config: AlignConfig, policy: Path, folder: Path) -> None:
    """Let a policy answer every held-out prompt once, and let the evaluation's judges listen.

    Every policy answers with the same seeds: before and after differ less by chance.
    """
    single = _sampled_for_evaluation(config, 1)
    stages = speaking_stages(single, policy, config.evaluation.judges)
    sample_and_judge(read_prompts(config, HELDOUT), stages, folder, keep_audio=True)


def write_candidates(config: AlignConfig, policy: Path, folder: Path) -> None:
    """Let a policy answer every held-out prompt several times, and let the reward listen."""
    several = _sampled_for_evaluation(config, config.evaluation.best_of)
    stages = [
        sampling_stage(several, policy),
        *judging_stages(several, policy, config.judges),
    ]
    sample_and_judge(read_prompts(config, HELDOUT), stages, folder, keep_audio=False)


def evaluate_best(config: AlignConfig, policy: Path, candidates: Path, folder: Path) -> None:
    """Let the evaluation's judges hear the best candidate of each prompt, by the reward."""
    verify_folder(candidates)
    best = best_of_groups(pq.read_table(candidates / SCORED), config.reward)
    stages = listening_stages(config, policy, config.evaluation.judges)
    sample_and_judge(best.select(SAMPLE.names), stages, folder, keep_audio=True)


def _sampled_for_evaluation(config: AlignConfig, num_samples: int) -> AlignConfig:
    changes = {
        "samples_per_prompt": num_samples,
        "temperatures": (config.evaluation.temperature,),
        "common_seeds": True,
    }
    sampling = config.sampling.model_copy(update=changes)
    return config.model_copy(update={"sampling": sampling, "seed": config.evaluation.seed})


def evaluate_ceiling(config: AlignConfig, folder: Path) -> None:
    """Render the recordings' own AR tokens through the NAR model: no AR model can beat that."""
    vocabulary = Vocabulary.load(config.policy / VOCABULARY)
    limit = config.evaluation.num_ceiling_prompts
    samples = golden_samples(read_prompts(config, HELDOUT).slice(0, limit), vocabulary)
    judges = config.evaluation.judges
    stages = listening_stages(config, config.policy, judges)
    sample_and_judge(samples, stages, folder, keep_audio=True)


def read_evaluations(config: AlignConfig) -> dict[str, pa.Table]:
    """Return the judged answers of every policy that was evaluated, the one before all first.

    Raises:
        DataError: the run has not been evaluated yet.
    """
    tables: dict[str, pa.Table] = {}
    for number in range(config.pipeline.iterations + 1):
        folder = config.run_dir / f"iteration-{number}" / "evaluation"
        if is_committed(folder):
            name = "before" if number == 0 else f"iteration {number}"
            tables[name] = pq.read_table(folder / SCORED)
    if not tables:
        raise DataError(f"{config.run_dir} has no evaluation yet; run `speechalign align` first")
    return tables


def resynthesise(config: AlignConfig, folder: Path) -> None:
    """Decode the recordings of the report's prompts: what the players call the reference."""
    vocabulary = Vocabulary.load(config.policy / VOCABULARY)
    limit = config.evaluation.num_players
    prompts = read_prompts(config, HELDOUT).slice(0, limit)
    samples = golden_samples(prompts, vocabulary)
    recording = RenderingConfig(
        source="recording",
        num_levels=prompts["num_codebooks"][0].as_py(),
        num_threads=config.rendering.num_threads,
    )
    whole = config.model_copy(update={"rendering": recording})
    stages = listening_stages(whole, config.policy, ())
    sample_and_judge(samples, stages, folder, keep_audio=True)
