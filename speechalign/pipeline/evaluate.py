"""What a policy, or no policy at all, sounds like on held-out prompts."""

from pathlib import Path

from speechalign.config.align import AlignConfig
from speechalign.config.sampling import RenderingConfig
from speechalign.pipeline.sample import HELDOUT, listening_stages, read_prompts, speaking_stages
from speechalign.policy.ar import VOCABULARY
from speechalign.policy.vocabulary import Vocabulary
from speechalign.sampling.pipeline import sample_and_judge
from speechalign.sampling.prompts import golden_samples


def evaluate_policy(config: AlignConfig, policy: Path, folder: Path) -> None:
    """Let a policy answer every held-out prompt once, and let the evaluation's judges listen.

    Every policy answers with the same seeds: before and after differ less by chance.
    """
    temperatures = (config.evaluation.temperature,)
    once = config.sampling.model_copy(
        update={"samples_per_prompt": 1, "temperatures": temperatures, "common_seeds": True}
    )
    single = config.model_copy(update={"sampling": once})
    stages = speaking_stages(single, policy, config.evaluation.judges)
    sample_and_judge(read_prompts(config, HELDOUT), stages, folder, keep_audio=True)


def evaluate_ceiling(config: AlignConfig, folder: Path) -> None:
    """Render the recordings' own AR tokens through the NAR model: no AR model can beat that."""
    vocabulary = Vocabulary.load(config.policy / VOCABULARY)
    limit = config.evaluation.num_ceiling_prompts
    samples = golden_samples(read_prompts(config, HELDOUT).slice(0, limit), vocabulary)
    judges = config.evaluation.judges
    stages = listening_stages(config, config.policy, judges)
    sample_and_judge(samples, stages, folder, keep_audio=True)


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
