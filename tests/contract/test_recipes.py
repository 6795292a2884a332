"""Every file of jobs/ is a config that loads."""

from pathlib import Path

import pytest

from speechalign.config.align import AlignConfig
from speechalign.config.base import Config
from speechalign.config.codec import CodecTrainingConfig
from speechalign.config.corpus import CorpusConfig
from speechalign.config.load import load_config
from speechalign.config.prepare import PrepareConfig
from speechalign.config.training import RewardModelConfig, SftJob

JOBS = Path(__file__).parents[2] / "jobs"
MODELS: dict[str, type[Config]] = {
    "align": AlignConfig,
    "codec": CodecTrainingConfig,
    "corpus": CorpusConfig,
    "prepare": PrepareConfig,
    "reward": RewardModelConfig,
    "sft": SftJob,
}


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.name)
def test_a_recipe_loads(path: Path):
    load_config(MODELS[path.name.partition("-")[0]], path)
