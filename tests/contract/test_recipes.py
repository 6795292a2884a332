"""Every file of jobs/ is a config that loads."""

from pathlib import Path

import pytest

from speechalign.config.align import AlignConfig
from speechalign.config.base import Config
from speechalign.config.codec import CodecTrainingConfig
from speechalign.config.compare import ArmConfig, CompareConfig, RewardModelStepConfig
from speechalign.config.corpus import CorpusConfig
from speechalign.config.load import load_config
from speechalign.config.prepare import PrepareConfig
from speechalign.config.training import RewardModelConfig, SftJob
from speechalign.pipeline.compare import arms_of, reward_model_of

JOBS = Path(__file__).parents[2] / "jobs"
MODELS: dict[str, type[Config]] = {
    "align": AlignConfig,
    "codec": CodecTrainingConfig,
    "compare": CompareConfig,
    "corpus": CorpusConfig,
    "prepare": PrepareConfig,
    "reward": RewardModelConfig,
    "sft": SftJob,
}


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.name)
def test_a_recipe_loads(path: Path):
    load_config(MODELS[path.name.partition("-")[0]], path)


def test_every_step_of_the_comparison_is_a_valid_recipe():
    config = load_config(CompareConfig, JOBS / "compare-embedded-cpu.yaml")
    methods: set[str] = set()
    for step in config.steps:
        if isinstance(step, ArmConfig):
            methods |= {arm.config.training.method for arm in arms_of(config, step)}
        else:
            assert isinstance(step, RewardModelStepConfig)
            assert reward_model_of(config, step).output == config.run_dir / step.name
    assert methods == {"dpo", "sft", "coh", "best_of_n", "ppo", "grpo"}
