"""`speechalign ballot`: the samples of a run as a page on which people vote."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from speechalign.artifacts import verify_folder
from speechalign.config.align import AlignConfig
from speechalign.config.load import config_hash
from speechalign.errors import ConfigError, DataError
from speechalign.evaluation.pages import sound_url, write_page
from speechalign.locks import make_writable
from speechalign.pipeline.cluster import connected
from speechalign.pipeline.sample import listening_stages
from speechalign.preferences.ballots import Comparison, choose_comparisons
from speechalign.rows import NOT_RENDERED, SAMPLE, Row, sample_from_row
from speechalign.sampling.pipeline import SCORED, errors_of_actors, stream
from speechalign.types import Sample

TEMPLATE = "ballot.html.j2"


def write_ballot(config: AlignConfig, output: Path, *, iteration: int, count: int) -> str:
    """Render two samples of some prompts and write the page; return what came of it.

    Args:
        config: of a run that has judged samples.
        output: the page; the votes that a listener saves there are for `speechalign votes`.
        iteration: whose samples, 1 being the first.
        count: how many prompts.

    Raises:
        ConfigError: the iteration has no judged samples, or `output` exists or cannot be written.
        DataError: no prompt has two samples that can be compared and rendered.
    """
    scored = config.run_dir / f"iteration-{iteration}" / "scored"
    if output.exists():
        raise ConfigError(f"{output} exists; name another file, or remove it")
    make_writable(output.parent)
    if not (scored / SCORED).is_file():
        raise ConfigError(f"{scored} holds no judged samples; `speechalign judge` makes them")
    verify_folder(scored)
    table = pq.read_table(scored / SCORED, columns=SAMPLE.names)
    samples = [sample_from_row(row) for row in table.to_pylist()]
    comparisons = choose_comparisons(samples, count, seed=config.seed)
    heard = _heard(config, table, comparisons) if comparisons else {}
    items = [
        {"prompt_id": c.first.prompt_id, "text": heard[_key(c.first)]["text"]}
        | {side: _side(heard[_key(s)]) for side, s in (("a", c.first), ("b", c.second))}
        for c in comparisons
        if all(_key(sample) in heard for sample in (c.first, c.second))
    ]
    if not items:
        raise DataError(f"{scored} has no prompt with two samples that people could compare")
    values: dict[str, object] = {
        "title": f"Listening: {config.run_dir.name}, iteration {iteration}",
        "key": f"ballot {config.run_dir.name} {iteration} {config_hash(config)}",
        "file": f"votes-{config.run_dir.name}-{iteration}.jsonl",
        "comparisons": items,
    }
    write_page(TEMPLATE, values, output)
    return (
        f"{len(items)} comparisons: {output}\n"
        f"for the votes: speechalign votes {values['file']} {scored} NEW-FOLDER"
    )


def _heard(
    config: AlignConfig, table: pa.Table, comparisons: tuple[Comparison, ...]
) -> dict[tuple[str, int], Row]:
    """Render what is compared; who has no sound is left out."""
    asked = {_key(s) for c in comparisons for s in (c.first, c.second)}
    keys = zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True)
    chosen = table.filter(pa.array([key in asked for key in keys]))
    stages = listening_stages(config, config.policy, ())
    with connected(), errors_of_actors(stages):
        rows: list[Any] = stream(chosen, stages).take_all()
    return {
        (row["prompt_id"], row["sample_index"]): row
        for row in rows
        if row["waveform_pcm"] and not row["judge_errors"].startswith(NOT_RENDERED)
    }


def _side(row: Row) -> dict[str, object]:
    return {
        "index": row["sample_index"],
        "source": sound_url(row["waveform_pcm"], row["sample_rate_hz"]),
    }


def _key(sample: Sample) -> tuple[str, int]:
    return (sample.prompt_id, sample.sample_index)
