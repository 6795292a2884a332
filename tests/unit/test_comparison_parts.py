from pathlib import Path
from typing import Any

import pytest

from speechalign.artifacts import committed_folder
from speechalign.config.compare import ArmConfig, CompareConfig
from speechalign.config.load import load_config
from speechalign.errors import ConfigError, DataError
from speechalign.evaluation.comparison import Compared, comparison_rows
from speechalign.evaluation.comparison_parts import with_earlier
from speechalign.pipeline.compare import run_compare

ARMS = ("golden", "ranked", "ppo")


def exactly(value: float) -> dict[str, float]:
    return {"value": value, "low": value, "high": value}


def row(
    arm: str, iteration: int = 1, *, wer: float = 0.2, commit: str = "new", **measured: float
) -> dict[str, Any]:
    """Return a system; wins are measured of all but the first and the last."""
    facts: dict[str, Any] = {"arm": arm}
    wins: dict[str, Any] = {}
    if arm not in ("start", "ceiling"):
        facts |= {"seed": 0, "iteration": iteration, "commit": commit}
        wins = {"reward_model": exactly(0.9 if commit == "new" else 0.8), "eval_wer": exactly(0.6)}
    estimates = {key: exactly(value) for key, value in ({"wer": wer} | measured).items()}
    summary = {
        "name": f"{commit} {arm} {iteration}",
        "num_prompts": 4,
        "estimates": estimates,
        "missing": {},
    }
    return {
        "summary": summary,
        "facts": facts,
        "wins": wins,
        "relative": {},
        "difference": {},
        "closed": {},
        "seconds": 60.0,
        "stage_seconds": {} if arm in ("start", "ceiling") else {"scored": 30.0, "policy": 90.0},
    }


def table(*rows: dict[str, Any]) -> dict[str, Any]:
    cells = comparison_rows([Compared.from_json(one) for one in rows])
    return {"facts": {"commit": "f"}, "rows": list(rows), "table": cells}


NEW = table(row("start"), row("ppo"), row("ceiling"))
OLD = table(
    row("start", commit="old", sim=0.8),
    row("golden", 1, commit="old", sim=0.8),
    row("golden", 2, commit="old", sim=0.8),
    row("ppo", commit="old", sim=0.8),
    row("ceiling", sim=0.8),
)


def test_the_rows_of_both_stand_in_the_order_of_the_file_and_the_newer_one_wins():
    both = with_earlier(NEW, OLD, ARMS)
    assert [(r["facts"]["arm"], r["facts"].get("commit")) for r in both["rows"]] == [
        ("start", None),
        ("golden", "old"),
        ("golden", "old"),
        ("ppo", "new"),
        ("ceiling", None),
    ]
    assert both["facts"] == {"commit": "f"}


def test_the_minutes_of_both_stand_below_their_stages():
    assert with_earlier(NEW, OLD, ARMS)["times"] == [
        ["minutes", "sampled and judged", "paired", "trained", "evaluated"],
        ["old golden 1", "0.5", "", "1.5", ""],
        ["old golden 2", "0.5", "", "1.5", ""],
        ["new ppo 1", "0.5", "", "1.5", ""],
    ]


def test_a_cell_stands_below_its_head_and_says_where_nobody_measured():
    head, start, golden, _, ppo, _ = with_earlier(NEW, OLD, ARMS)["table"]
    assert head == [
        "system", "prompts", "WER %", "SIM", "WER against the first", "wins % by WER",
        "wins % by reward model", "min",
    ]  # fmt: skip
    error, wins = "20.0 [20.0, 20.0]", "60 [60, 60]"
    assert start == ["new start 1", "4", error, "not measured", "", "", "", "1"]
    similar = "0.800 [0.800, 0.800]"
    assert golden == ["old golden 1", "4", error, similar, "", wins, "80 [80, 80]", "1"]
    assert ppo == ["new ppo 1", "4", error, "not measured", "", wins, "90 [90, 90]", "1"]


@pytest.mark.parametrize(
    ("mine", "theirs", "kept"), [("a", "a", True), ("a", "b", False), (None, "b", True)]
)
def test_wins_by_another_reward_model_are_left_out(mine: str | None, theirs: str, kept: bool):
    new = table(row("start"), row("ppo"))
    old = table(row("start", commit="old"), row("golden", commit="old"))
    old["facts"]["reward_model"] = theirs
    if mine is not None:
        new["facts"]["reward_model"] = mine
    both = with_earlier(new, old, ARMS)
    assert both["facts"]["reward_model"] == (mine or theirs)
    assert ("reward_model" in both["rows"][1]["wins"]) == kept
    assert both["rows"][1]["wins"]["eval_wer"] == exactly(0.6)
    assert both["rows"][2]["wins"]["reward_model"] == exactly(0.9)
    head, _, golden, ppo = both["table"]
    place = head.index("wins % by reward model")
    assert golden[place - 1 : place + 1] == ["60 [60, 60]", "80 [80, 80]" if kept else ""]
    assert ppo[place] == "90 [90, 90]"


def test_tables_of_another_start_are_refused():
    other = table(row("start", wer=0.206), row("golden"))
    with pytest.raises(DataError, match=r"has a wer of 0\.2000 here and of 0\.2060"):
        with_earlier(NEW, other, ARMS)
    near = table(row("start", wer=0.204), row("golden"))
    assert len(with_earlier(NEW, near, ARMS)["rows"]) == 4


def test_an_arm_that_the_file_does_not_have_is_refused():
    with pytest.raises(DataError, match="an arm 'golden' that this file has not"):
        with_earlier(NEW, OLD, ("ppo",))


def test_what_cannot_be_found_is_told_before_anything_runs(tmp_path: Path):
    step = ArmConfig(name="golden", label="golden")
    config = CompareConfig(
        run_dir=tmp_path / "run", recipe=Path("jobs/align-embedded-cpu.yaml"), steps=(step,)
    )
    with pytest.raises(ConfigError, match="no step is named pp; there are golden"):
        run_compare(config, only=["pp"])
    with pytest.raises(ConfigError, match="there is no earlier table"):
        run_compare(config, earlier=tmp_path / "none.json")
    assert not (tmp_path / "run").exists()


def test_a_part_that_needs_other_steps_is_told_which(tmp_path: Path):
    shipped = load_config(CompareConfig, Path("jobs/compare-embedded-cpu.yaml"))
    config = shipped.model_copy(update={"run_dir": tmp_path})

    def advice(*only: str) -> str:
        with pytest.raises(ConfigError, match="reads what other steps make") as refused:
            run_compare(config, only=only)
        return str(refused.value).partition("; add ")[2]

    every = "--only reward-pairs --only unseen-pairs --only reward-model"
    assert advice("grpo") == every
    assert advice("reward-model") == "--only reward-pairs --only unseen-pairs"
    assert advice("grpo", "reward-pairs") == "--only unseen-pairs --only reward-model"
    with committed_folder(tmp_path / "reward-pairs/iteration-1/pairs", {}):
        pass
    assert advice("ppo", "grpo") == "--only unseen-pairs --only reward-model"
    assert not (tmp_path / "grpo").exists()


def test_a_part_may_use_what_is_there_already(tmp_path: Path):
    judges = [{"kind": "reward_model", "path": "{run}/rm-seed1"}]
    steps = (
        ArmConfig(name="rm", label="a", seeds=(0, 1)),
        ArmConfig(name="ppo", label="b", overrides={"judges": judges, "nothing": "valid"}),
    )
    config = CompareConfig(
        run_dir=tmp_path, recipe=Path("jobs/align-embedded-cpu.yaml"), steps=steps
    )
    with pytest.raises(ConfigError, match=r"add --only rm$"):
        run_compare(config, only=["ppo"])
    with committed_folder(tmp_path / "rm-seed1", {}):
        pass
    with pytest.raises(ConfigError, match="nothing: Extra inputs"):  # it got as far as the recipe
        run_compare(config, only=["ppo"])
