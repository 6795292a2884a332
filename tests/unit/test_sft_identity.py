"""A training resumes, and a finished model is taken, only for the same data and settings."""

from pathlib import Path

import pytest

from speechalign.artifacts import committed_folder
from speechalign.config.training import RewardModelConfig, SftArConfig
from speechalign.errors import ConfigError
from speechalign.locks import held_output
from speechalign.training.sft import IDENTITY, identity_of, run_training


def a_config(golden: Path, **changes: object) -> SftArConfig:
    values = {"golden": golden, "output": golden.parent / "ar", "num_steps": 3} | changes
    return SftArConfig.model_validate(values)


def a_file(path: Path, content: str = "tokens") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    return path


def test_it_is_of_settings_and_content_and_of_no_place(tmp_path: Path):
    golden = a_file(tmp_path / "golden.parquet")
    mine = identity_of(a_config(golden))
    moved = a_file(tmp_path / "elsewhere" / "g.parquet")
    workers = {"num_workers": 2, "threads_per_worker": 3, "cpus_per_worker": 0.5, "max_failures": 0}
    pace = {"log_every": 7, "heldout_every": 7, "checkpoint_every": 7, "workers": workers}
    assert identity_of(a_config(moved, **pace)) == mine
    assert identity_of(a_config(golden, workers={"num_workers": 1})) != mine
    assert identity_of(a_config(golden, seed=1)) != mine
    assert identity_of(a_config(a_file(golden, "others"))) != mine


def test_it_is_of_the_pairs_that_a_reward_model_learns_from(tmp_path: Path):
    folders = [tmp_path / name for name in ("policy", "one", "two")]
    for number, folder in enumerate(folders):
        with committed_folder(folder, {"number": number}):
            pass
    policy, *pairs = folders
    one, two = (
        RewardModelConfig(policy=policy, pairs=(path,), output=tmp_path / "rm", num_steps=3)
        for path in pairs
    )
    assert identity_of(one) != identity_of(two)
    looks = one.model_copy(update={"heldout_every": 7})  # the best of other looks is another
    assert identity_of(looks) != identity_of(one)


def test_a_finished_model_of_other_settings_is_not_taken_for_this_one(tmp_path: Path):
    config = a_config(a_file(tmp_path / "golden.parquet"))
    with committed_folder(config.output, {IDENTITY: identity_of(config)}):
        pass
    with held_output(config.output):  # it is only read
        assert run_training(config) == config.output
    with pytest.raises(ConfigError, match="other data or settings"):
        run_training(config.model_copy(update={"seed": 1}))


def test_an_output_that_is_no_artifact_is_refused_before_anything_is_read(tmp_path: Path):
    config = a_config(tmp_path / "nowhere.parquet")
    a_file(config.output / "notes.txt")
    with pytest.raises(ConfigError, match="it is no artifact"):
        run_training(config)
