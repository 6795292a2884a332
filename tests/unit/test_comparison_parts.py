from pathlib import Path
from typing import Any

import pytest

from speechalign.config.compare import ArmConfig, CompareConfig
from speechalign.errors import ConfigError, DataError
from speechalign.evaluation.comparison_parts import with_earlier
from speechalign.pipeline.compare import run_compare

ARMS = ("golden", "ranked", "ppo")


def row(arm: str, iteration: int = 1, *, wer: float = 0.2, commit: str = "new") -> dict[str, Any]:
    facts: dict[str, Any] = {"arm": arm}
    if arm not in ("start", "ceiling"):
        facts |= {"seed": 0, "iteration": iteration, "commit": commit}
    estimates = {"wer": {"value": wer, "low": wer, "high": wer}}
    summary = {"name": f"{arm}{iteration}", "estimates": estimates}
    return {"summary": summary, "facts": facts, "wins": {"reward_model": 0.9, "eval_wer": 0.6}}


def table(columns: tuple[str, ...], *rows: dict[str, Any]) -> dict[str, Any]:
    cells = [
        [one["summary"]["name"], *(f"{name} of {one['facts'].get('commit')}" for name in columns)]
        for one in rows
    ]
    return {"facts": {"commit": "f"}, "rows": list(rows), "table": [["system", *columns], *cells]}


NEW = table(("wins", "min"), row("start"), row("ppo"), row("ceiling"))
OLD = table(
    ("SIM", "min"),
    row("start", commit="old"),
    row("golden", 1, commit="old"),
    row("golden", 2, commit="old"),
    row("ppo", commit="old"),
    row("ceiling"),
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


def test_a_cell_stands_below_its_head_and_is_empty_where_nobody_measured():
    head, start, golden, _, ppo, _ = with_earlier(NEW, OLD, ARMS)["table"]
    assert head == ["system", "wins", "SIM", "min"]
    assert start == ["start1", "wins of None", "", "min of None"]
    assert golden == ["golden1", "", "SIM of old", "min of old"]
    assert ppo == ["ppo1", "wins of new", "", "min of new"]


@pytest.mark.parametrize(
    ("mine", "theirs", "kept"), [("a", "a", True), ("a", "b", False), (None, "b", True)]
)
def test_wins_by_another_reward_model_are_left_out(mine: str | None, theirs: str, kept: bool):
    columns = ("wins % by WER", "wins % by reward model", "min")
    new = table(columns, row("start"), row("ppo"))
    old = table(columns, row("start", commit="old"), row("golden", commit="old"))
    old["facts"]["reward_model"] = theirs
    if mine is not None:
        new["facts"]["reward_model"] = mine
    both = with_earlier(new, old, ARMS)
    assert both["facts"]["reward_model"] == (mine or theirs)
    assert ("reward_model" in both["rows"][1]["wins"]) == kept
    assert both["rows"][1]["wins"]["eval_wer"] == 0.6
    assert both["rows"][2]["wins"]["reward_model"] == 0.9
    said = " of old" if kept else ""
    assert both["table"][2] == [
        "golden1", "wins % by WER of old", f"wins % by reward model{said}" if kept else "",
        "min of old",
    ]  # fmt: skip
    assert both["table"][3][2] == "wins % by reward model of new"


def test_tables_of_another_start_are_refused():
    other = table(("min",), row("start", wer=0.206), row("golden"))
    with pytest.raises(DataError, match=r"has a wer of 0\.2000 here and of 0\.2060"):
        with_earlier(NEW, other, ARMS)
    near = table(("min",), row("start", wer=0.204), row("golden"))
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
