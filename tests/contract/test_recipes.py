"""Every file of jobs/ is a config that loads."""

import subprocess
import sys
from pathlib import Path

import pytest

from speechalign.config.align import AlignConfig
from speechalign.config.base import Config
from speechalign.config.codec import CodecTrainingConfig
from speechalign.config.compare import ArmConfig, CompareConfig, RewardModelStepConfig
from speechalign.config.corpus import CorpusConfig
from speechalign.config.load import load_config
from speechalign.config.prepare import PrepareConfig
from speechalign.config.sampling import VllmConfig
from speechalign.config.training import RewardModelConfig, SftJob
from speechalign.pipeline.compare import arms_of, reward_model_of
from speechalign.pipeline.submit import RUNTIME_ENV, plan_job

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


NO_RECIPES = (RUNTIME_ENV.name, "serve-embedded-cpu.yaml")
"""test_cluster_files.py looks at these."""
RECIPES = [path for path in sorted(JOBS.glob("*.yaml")) if path.name not in NO_RECIPES]
SCRIPTS = {
    "align.py": ("align-paper-8gpu.yaml", "codec:\n  kind: encodec_hf"),
    "evaluate.py": ("align-single-gpu.yaml", "device: cuda"),
    "prepare.py": ("prepare-librispeech.yaml", "kind: librispeech"),
    "sft.py": ("sft-nar-embedded-cpu.yaml", "kind: nar"),
    "train.py": ("align-embedded-cpu.yaml", "run_dir: runs/demo"),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_loads(path: Path):
    load_config(MODELS[path.name.partition("-")[0]], path)


def test_every_script_has_a_recipe_here():
    assert {path.name for path in JOBS.glob("*.py")} == SCRIPTS.keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_takes_what_the_command_takes(script: str):
    recipe, expected = SCRIPTS[script]
    command = [sys.executable, str(JOBS / script), str(JOBS / recipe), "--dry-run"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout


@pytest.mark.parametrize("recipe", ["align-paper-8gpu.yaml", "align-single-gpu.yaml"])
def test_a_recipe_for_gpus_can_be_sent_and_says_what_is_unverified(
    recipe: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(JOBS.parent)
    request = plan_job("align", Path("jobs") / recipe)
    assert request.runtime_env["working_dir"] == "."
    assert request.runtime_env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "120"
    assert "UNVERIFIED" in (JOBS / recipe).read_text()


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


def test_the_7b_recipe_has_room_for_one_answer_in_vllms_cache():
    engine = load_config(AlignConfig, JOBS / "align-paper-8gpu.yaml").engine
    assert isinstance(engine, VllmConfig)
    bytes_a_token = 2 * 32 * 4096 * 2  # keys and values of 32 layers of 4096 in bf16
    assert engine.kv_cache_mib * 2**20 >= engine.max_model_len * bytes_a_token
