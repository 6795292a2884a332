"""A stage for held-out answers only: judges that watch an online training and reward nothing.

It is in a module of its own because actors import it: a judge that needs no torch must not wait
for what the rest of the pipeline imports.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from speechalign.rows import NOT_RENDERED, RENDERED

logger = logging.getLogger(__name__)

ERRORS = RENDERED.field("judge_errors")
"""What a stage adds its reasons to, and a reward may read."""
HELDOUT_ERRORS = pa.field("heldout_errors", pa.string(), nullable=False)
"""The reasons of these stages: no reward must depend on a judge that makes none."""
EMPTY: Mapping[Any, Any] = {pa.int32(): 0, pa.float32(): 0.0, pa.binary(): b"", pa.string(): ""}
"""What a column without nulls has where nothing was asked, by its type."""


class HeldoutStage:
    """A plain class: tests call it directly, Ray Data makes actors of it.

    It passes those rows to a stage that are held out and could be rendered. All rows keep their
    order and the columns that they came with. What the stage adds is null in the other rows, or
    empty where a column has no nulls; so every block gets the same columns.
    """

    def __init__(
        self,
        stage: Callable[..., Callable[[pa.Table], pa.Table]],
        arguments: Mapping[str, Any],
        adds: Sequence["pa.Field[Any]"],
    ) -> None:
        """Create the stage inside.

        Args:
            stage: its class, e.g. JudgeStage.
            arguments: of its constructor.
            adds: its columns; what else it writes, a transcript, is left out.
        """
        self._stage = stage(**arguments)
        self._adds = adds

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Pass the held-out rows of one block through the stage."""
        is_asked = _is_asked(batch)
        asked = batch.filter(pa.array(is_asked, pa.bool_()))
        if asked.num_rows:
            others = {ERRORS.name, HELDOUT_ERRORS.name}  # what earlier stages had to say
            given = [name for name in asked.column_names if name not in others]
            answered = self._stage(asked.select(given))
        else:
            answered = pa.schema([*self._adds, ERRORS]).empty_table()
        places = count()
        rows = pa.array([next(places) if asked else None for asked in is_asked], pa.int64())
        for field in self._adds:
            batch = batch.append_column(field, _placed(answered[field.name], rows, field))
        _tell(_texts(answered, ERRORS.name))
        return _with_errors(batch, _placed(answered[ERRORS.name], rows, ERRORS).to_pylist())


def _is_asked(batch: pa.Table) -> list[bool]:
    """Return which rows are held out, and have their sound if anybody wants to hear them."""
    flags: list[Any] = batch["is_heldout"].to_pylist()
    errors = zip(_texts(batch, ERRORS.name), _texts(batch, HELDOUT_ERRORS.name), strict=True)
    return [
        is_heldout and not any(error.startswith(NOT_RENDERED) for error in both)
        for is_heldout, both in zip(flags, errors, strict=True)
    ]


def _texts(batch: pa.Table, name: str) -> list[Any]:
    """Return a column of texts, empty ones if nothing has written it yet."""
    return batch[name].to_pylist() if name in batch.column_names else [""] * batch.num_rows


def _placed(values: Any, rows: Any, field: "pa.Field[Any]") -> Any:
    """Return a column with values in the rows that have an index of one, and none in the others."""
    column = pc.take(values, rows)
    return column if field.nullable else pc.fill_null(column, EMPTY[field.type])


def _with_errors(batch: pa.Table, reasons: Sequence[str]) -> pa.Table:
    name = HELDOUT_ERRORS.name
    both = zip(_texts(batch, name), reasons, strict=True)
    joined = pa.array(["; ".join(part for part in parts if part) for parts in both], pa.string())
    others = [column for column in batch.column_names if column != name]
    return batch.select(others).append_column(HELDOUT_ERRORS, joined)


def _tell(reasons: Sequence[str]) -> None:
    """Log it if a stage failed for all; as no reward is missing then, nothing else would tell."""
    if reasons and all(reasons):
        logger.warning("not one of %d held-out answers was judged: %s", len(reasons), reasons[0])
