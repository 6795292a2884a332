"""A comparison that was run in parts: the rows of an earlier table beside those of this one. Pure.

A table is what `speechalign compare` writes: `rows`, a JSON object a system; `table`, the cells of
the same systems below a head; and `times`, those of their wall clock.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from speechalign.errors import DataError
from speechalign.evaluation.comparison import Compared, comparison_rows, time_rows

Table: TypeAlias = Mapping[str, Any]

START, CEILING = "start", "ceiling"
REWARD_MODEL = "reward_model"
MAX_BASELINE_DIFFERENCE = 0.005
"""Of the error rates of the start: it was sampled again, perhaps on another machine."""


def with_earlier(table: Table, earlier: Table, arms: Sequence[str]) -> dict[str, Any]:
    """Return a table with the systems of both; who is in both is as in `table`.

    Wins by another reward model than this run's are left out of the earlier rows: one column has
    one judge. A run without one leaves them.

    Args:
        table: of this run.
        earlier: of an earlier run of the same file. Its wins and differences stay those against
            its own start, which was asked the same and drew the same luck.
        arms: names in the order of the rows; the start is the first row, the ceiling the last.

    Raises:
        DataError: the two were not measured against the same start, or an arm is not known.
    """
    _check_starts(table["rows"][0], earlier["rows"][0])
    facts, earlier_rows = dict(table["facts"]), earlier["rows"]
    theirs = earlier["facts"].get(REWARD_MODEL)
    if REWARD_MODEL not in facts and theirs is not None:
        facts[REWARD_MODEL] = theirs
    elif facts.get(REWARD_MODEL) != theirs:
        earlier_rows = [_without_its_wins(row) for row in earlier_rows]
    found = {_place(row, arms): row for row in (*earlier_rows, *table["rows"])}
    rows = [found[place] for place in sorted(found)]
    compared = [Compared.from_json(row) for row in rows]
    return {
        "facts": facts,
        "rows": rows,
        "table": comparison_rows(compared),
        "times": time_rows(compared),
    }


def _without_its_wins(row: Mapping[str, Any]) -> dict[str, Any]:
    wins = {key: value for key, value in row["wins"].items() if key != REWARD_MODEL}
    return dict(row) | {"wins": wins}


def _check_starts(mine: Table, earlier: Table) -> None:
    for key in ("wer", "cer"):
        values = [row["summary"]["estimates"].get(key, {}).get("value") for row in (mine, earlier)]
        if None in values:
            continue
        if abs(values[0] - values[1]) > MAX_BASELINE_DIFFERENCE:
            raise DataError(
                f"the start has a {key} of {values[0]:.4f} here and of {values[1]:.4f} in the "
                "earlier table: it was another policy, or other prompts; run all steps again"
            )


def _place(row: Table, arms: Sequence[str]) -> tuple[int, int, int]:
    facts = row["facts"]
    if facts["arm"] == START:
        return (-1, 0, 0)
    if facts["arm"] == CEILING:
        return (len(arms), 0, 0)
    if facts["arm"] not in arms:
        raise DataError(f"the earlier table has an arm {facts['arm']!r} that this file has not")
    return (arms.index(facts["arm"]), facts["seed"], facts["iteration"])
