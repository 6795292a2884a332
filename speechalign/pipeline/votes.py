"""`speechalign votes`: what people preferred of a run's samples, as pairs for a reward model."""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from speechalign.artifacts import committed_folder, verify_folder
from speechalign.errors import ConfigError, DataError
from speechalign.preferences.votes import ListenerVote, pairs_of_votes
from speechalign.rows import QUARANTINE, SAMPLE, pairs_to_table, sample_from_row
from speechalign.sampling.pipeline import QUARANTINED, SCORED
from speechalign.training.stored_pairs import PAIRS

COLUMNS = ("prompt_id", "chosen", "rejected")


def write_votes(file: Path, scored: Path, output: Path) -> str:
    """Commit the pairs that a file of votes makes of judged samples; return what came of it.

    Args:
        file: JSON lines or CSV with `prompt_id`, `chosen` and `rejected` (the `sample_index` of
            two samples of the prompt); one line a listener and comparison, other columns are
            ignored.
        scored: the folder of the samples that were heard, RUN/iteration-1/scored.
        output: gets `pairs.parquet`, `quarantine.parquet` and the manifest.

    Raises:
        ConfigError: there is no such file or folder, or `output` exists.
        DataError: the file lacks a column, or makes no pair.
    """
    if output.exists():
        raise ConfigError(f"{output} exists; name another folder, or remove it")
    if not (scored / SCORED).is_file():
        raise ConfigError(f"{scored} holds no judged samples; give RUN/iteration-1/scored")
    verify_folder(scored)
    votes, unreadable = _read(file)
    rows = pq.read_table(scored / SCORED, columns=SAMPLE.names).to_pylist()
    samples = {(row["prompt_id"], row["sample_index"]): sample_from_row(row) for row in rows}
    voted = pairs_of_votes(votes, samples)
    quarantine = [*unreadable, *voted.quarantine]
    if not voted.pairs:
        reason = f"; first: {quarantine[0][1]}" if quarantine else ""
        raise DataError(
            f"{file} makes no pair: {voted.num_ties} ties, {len(quarantine)} votes that cannot be "
            f"counted{reason}"
        )
    facts = {
        "kind": "pairs",
        "num_votes": len(votes) + len(unreadable),
        "pairs_voted": len(voted.pairs),
        "num_ties": voted.num_ties,
        "num_quarantined": len(quarantine),
    }
    with committed_folder(output, facts) as partial:
        pq.write_table(pairs_to_table(voted.pairs), partial / PAIRS)
        bad = [{"stage": "votes", "row_id": row, "reason": why} for row, why in quarantine]
        pq.write_table(pa.Table.from_pylist(bad, schema=QUARANTINE), partial / QUARANTINED)
    return (
        f"{facts['num_votes']} votes: {len(voted.pairs)} pairs, {voted.num_ties} ties, "
        f"{len(quarantine)} in quarantine: {output}"
    )


def _read(file: Path) -> tuple[list[ListenerVote], list[tuple[str, str]]]:
    """Return the votes, and (line, reason) of what is none."""
    if not file.is_file():
        raise ConfigError(f"there is no file of votes {file}")
    read_lines: Any = pd.read_json  # its stubs do not know that dtype may be False
    try:
        table: Any = (
            pd.read_csv(file, dtype=str)
            if file.suffix == ".csv"
            else read_lines(file, lines=True, dtype=False)
        )
    except ValueError as error:
        raise DataError(f"{file} is neither JSON lines nor, as .csv, CSV: {error}") from error
    missing = set(COLUMNS) - set(table.columns)
    if missing:
        raise DataError(f"{file} has no column {', '.join(sorted(missing))}")
    votes: list[ListenerVote] = []
    unreadable: list[tuple[str, str]] = []
    for number, cells in enumerate(table[list(COLUMNS)].itertuples(index=False), 1):
        row_id = f"{file.name}:{number}"
        try:
            chosen, rejected = _index(cells.chosen), _index(cells.rejected)
        except (TypeError, ValueError, OverflowError):  # the last: Infinity
            unreadable.append((row_id, f"{cells.chosen!r}, {cells.rejected!r} are no two indices"))
            continue
        vote = ListenerVote(
            row_id=row_id, prompt_id=str(cells.prompt_id), chosen=chosen, rejected=rejected
        )
        votes.append(vote)
    return votes, unreadable


def _index(cell: Any) -> int:
    if int(cell) != float(cell):
        raise ValueError(f"{cell} is no whole number")
    return int(cell)
