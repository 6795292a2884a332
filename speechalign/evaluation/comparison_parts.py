"""A comparison that was run in parts: the rows of an earlier table beside those of this one. Pure.

A table is what `speechalign compare` writes: `rows`, a JSON object a system, and `table`, the
cells of the same systems below a head.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from speechalign.errors import DataError

Table: TypeAlias = Mapping[str, Any]

START, CEILING = "start", "ceiling"
REWARD_MODEL, WINS_BY_IT = "reward_model", "wins % by reward model"
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
    facts = dict(table["facts"])
    theirs = earlier["facts"].get(REWARD_MODEL)
    if REWARD_MODEL not in facts and theirs is not None:
        facts[REWARD_MODEL] = theirs
    elif facts.get(REWARD_MODEL) != theirs:
        earlier = _without_its_wins(earlier)
    head, *cells = table["table"]
    earlier_head, *earlier_cells = earlier["table"]
    head = [*head[:-1], *(n for n in earlier_head if n not in head), head[-1]]
    found: dict[tuple[Any, ...], tuple[Any, list[str]]] = {}
    for names, rows, lines in (
        (earlier_head, earlier["rows"], earlier_cells),
        (table["table"][0], table["rows"], cells),
    ):
        for row, line in zip(rows, lines, strict=True):
            known = dict(zip(names, line, strict=True))
            found[_place(row, arms)] = (row, [known.get(name, "") for name in head])
    ordered = [found[place] for place in sorted(found)]
    return {
        "facts": facts,
        "rows": [row for row, _ in ordered],
        "table": [head, *(line for _, line in ordered)],
    }


def _without_its_wins(table: Table) -> dict[str, Any]:
    rows = [dict(row) for row in table["rows"]]
    for row in rows:
        row["wins"] = {key: value for key, value in row["wins"].items() if key != REWARD_MODEL}
    head, *lines = table["table"]
    kept = [index for index, name in enumerate(head) if name != WINS_BY_IT]
    cells = [[line[index] for index in kept] for line in (head, *lines)]
    return dict(table) | {"rows": rows, "table": cells}


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
