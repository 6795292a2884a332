"""A section that is given in part keeps the rest of its field's default."""

from typing import Any

import pytest
from pydantic import ValidationError

from speechalign.config.base import Config
from speechalign.config.evaluation import EvaluationConfig
from speechalign.config.judges import DnsMosConfig
from speechalign.config.online_training import KlConfig, OnlineTrainingConfig
from speechalign.config.preference_training import PreferenceTrainingConfig
from speechalign.config.sampling import SamplingPoolsConfig
from speechalign.config.serving import ServingConfig
from speechalign.config.training import RewardModelConfig, SftArConfig

SERVING = {"nar": "nar", "policies": {"base": {"path": "p"}}, "voices": {"golden": "g.parquet"}}


@pytest.mark.parametrize(
    ("model", "needed"),
    [
        (EvaluationConfig, {}),
        (SamplingPoolsConfig, {}),
        (PreferenceTrainingConfig, {}),
        (OnlineTrainingConfig, {"method": "grpo"}),
        (DnsMosConfig, {}),
        (ServingConfig, SERVING),
    ],
)
def test_to_say_a_default_again_changes_nothing(model: type[Config], needed: dict[str, Any]):
    whole = model.model_validate(needed)
    for name, field in model.model_fields.items():
        if isinstance(field.default, Config):
            stated = field.default.model_dump()
            one = next(key for key in stated if key != "kind")
            kind = {"kind": stated["kind"]} if "kind" in stated else {}
            part = {name: kind | {one: stated[one]}}
            assert model.model_validate(needed | part) == whole, part


def test_fewer_prompts_of_an_evaluation_are_held_out_ones():
    config = EvaluationConfig.model_validate({"prompts": {"num_prompts": 50}})
    assert (config.prompts.split, config.prompts.num_prompts) == ("heldout", 50)


def test_a_section_of_another_kind_has_its_own_defaults():
    config = ServingConfig.model_validate(SERVING | {"engine": {"kind": "transformers"}})
    assert config.engine.kind == "transformers"


def test_an_adaptive_kl_starts_above_0():
    with pytest.raises(ValidationError, match="start above 0"):
        KlConfig(controller="adaptive")
    assert KlConfig(controller="adaptive", coefficient=0.1).coefficient == 0.1


def test_actor_and_critic_learn_on_one_device():
    cuda = {"engine": {"device": "cuda"}}
    with pytest.raises(ValidationError, match="the critic learns on cpu, the policy on cuda"):
        OnlineTrainingConfig.model_validate({"method": "ppo"} | cuda)
    OnlineTrainingConfig.model_validate({"method": "grpo"} | cuda)
    OnlineTrainingConfig.model_validate(
        {"method": "ppo", "ppo": {"critic_engine": {"device": "cuda"}}} | cuda
    )


def test_a_reward_model_keeps_its_weights_whole():
    values = {"policy": "p", "pairs": ["q"], "output": "o", "num_steps": 1}
    with pytest.raises(ValidationError, match="zero_stage 3 scatters"):
        RewardModelConfig.model_validate(values | {"engine": {"zero_stage": 3}})


def test_every_worker_has_a_row_of_each_step():
    four = {"workers": {"num_workers": 4}}
    assert PreferenceTrainingConfig.model_validate(four | {"pairs_per_step": 4})
    with pytest.raises(ValidationError, match="4 workers cannot share 3 pairs a step"):
        PreferenceTrainingConfig.model_validate(four | {"pairs_per_step": 3})
    needed = {"golden": "g", "output": "o", "num_steps": 1}
    assert SftArConfig.model_validate(needed | four | {"rows_per_step": 4})
    with pytest.raises(ValidationError, match="4 workers cannot share 3 rows a step"):
        SftArConfig.model_validate(needed | four | {"rows_per_step": 3})
