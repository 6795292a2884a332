from pathlib import Path

import pytest
from pydantic import Field

from speechalign.config.align import AlignConfig
from speechalign.config.base import Config
from speechalign.config.load import config_hash, dump_yaml, load_config
from speechalign.errors import ConfigError


class Training(Config):
    beta: float = Field(default=0.1, gt=0)


class Term(Config):
    measure: str
    weight: float = 1.0


class Recipe(Config):
    training: Training = Training()
    terms: tuple[Term, ...] = ()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("training: {beta: 0.3}\nterms: [{measure: wer}, {measure: mos}]\n")
    return path


def test_an_override_wins_over_the_file(recipe: Path):
    config = load_config(Recipe, recipe, ["training.beta=0.2", "terms.1.weight=5"])
    assert (config.training.beta, config.terms[1].weight) == (0.2, 5.0)


def test_an_override_may_open_a_section_that_the_file_left_out(tmp_path: Path):
    path = tmp_path / "empty.yaml"
    path.write_text("{}")
    assert load_config(Recipe, path, ["training.beta=0.5"]).training.beta == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.bta=1", "did you mean 'beta'"),
        ("trainin.beta=1", "did you mean 'training'"),
        ("terms.0.wieght=2", "did you mean 'weight'"),
        ("training.beta=-1", r"training\.beta: Input should be greater than 0 \(got -1\)"),
        ("training.beta", "not of the form"),
        ("terms.7.weight=1", "not an index into a list of 2"),
        ("training.beta.x=1", "'beta' is a value, not a section"),
        ("training=0.2", r"training: must be a section of keys and values \(got 0\.2\)"),
        ("training.beta=2024-13-45", "the value is not YAML: month must be in"),
    ],
)
def test_a_mistake_is_named_with_what_to_write_instead(recipe: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(Recipe, recipe, [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training=dpo"], "1 mistake:\n  training: must be a section of keys and values"),
        (["training="], "1 mistake:\n  training: must be a section of keys and values"),
        (["training=[1]"], "1 mistake:\n  training: must be a section of keys and values"),
        (["training.loss.betta=1"], "1 mistake:\n  training.loss.betta: "),
        (["judges.0.x=1", "seed=a"], "2 mistakes:\n  seed: "),
        (["judges.0.x=1", "seed=a"], "\n  judges.0.x: "),
        (["judges=[{kind: http, name: mos}]"], "1 mistake:\n  judges.0.url: Field required"),
        (["reward.terms=[]"], "1 mistake:\n  reward.terms is empty"),
    ],
)
def test_a_mistake_is_at_a_key_that_a_person_writes(overrides: list[str], message: str):
    recipe = Path("jobs/align-embedded-cpu.yaml")
    with pytest.raises(ConfigError) as refused:
        load_config(AlignConfig, recipe, overrides)
    assert str(refused.value).startswith(f"{recipe} has ")
    assert message in str(refused.value)
    assert "Value error" not in str(refused.value)
    assert "'run_dir':" not in str(refused.value)  # the whole recipe is not repeated


def test_a_file_with_a_day_that_is_none_is_not_a_traceback(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("run_dir: 2024-13-45\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml is not YAML: month must be in"):
        load_config(Recipe, path)


def test_a_missing_file_is_not_a_traceback(tmp_path: Path):
    with pytest.raises(ConfigError, match="No such file"):
        load_config(Recipe, tmp_path / "nothing.yaml")


def test_the_resolved_config_reads_back_as_itself(recipe: Path, tmp_path: Path):
    config = load_config(Recipe, recipe)
    (tmp_path / "resolved.yaml").write_text(dump_yaml(config))
    again = load_config(Recipe, tmp_path / "resolved.yaml")
    assert (again, config_hash(again)) == (config, config_hash(config))


def test_configs_that_differ_have_different_hashes():
    assert config_hash(Training(beta=0.1)) != config_hash(Training(beta=0.2))
