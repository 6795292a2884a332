"""The distribution gap of a run: golden against synthetic tokens, before and after alignment."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from speechalign.artifacts import committed_folder, is_committed, manifest_facts
from speechalign.config.align import AlignConfig
from speechalign.evaluation.distribution_gap import (
    MIN_PROMPTS,
    Separation,
    TokenClouds,
    project,
    separate,
)
from speechalign.pipeline.evaluate import read_evaluations
from speechalign.pipeline.sample import HELDOUT, read_prompts
from speechalign.policy.ar import load_ar
from speechalign.policy.representation import answer_representations, spoken_codes
from speechalign.rows import Row
from speechalign.sampling.prompts import golden_samples

GOLDEN = "golden"
POINTS = "points.parquet"

Clouds = Mapping[str, NDArray[np.float32]]


def write_gap(config: AlignConfig, folder: Path) -> None:
    """Commit how far the answers of each evaluated policy are from the recordings.

    The folder gets the points of the picture; the numbers are in its manifest.
    """
    evaluations = read_evaluations(config)
    torch.set_num_threads(config.engine.num_threads)
    prompt_ids, clouds = _represented(config, evaluations)
    facts = {"kind": "gap", "num_prompts": len(prompt_ids), "separations": {}}
    points: list[Row] = []
    if len(prompt_ids) >= MIN_PROMPTS:
        synthetic = {name: clouds[name] for name in evaluations}
        separations = separate(clouds[GOLDEN], synthetic, config.evaluation.num_resamples)
        facts["separations"] = {name: found.to_json() for name, found in separations.items()}
        first, last = next(iter(evaluations)), list(evaluations)[-1]
        shown = {name: clouds[name] for name in dict.fromkeys((GOLDEN, first, last))}
        for name, plane in project(shown).items():
            points += [
                {"cloud": name, "prompt_id": id_, "x": x, "y": y}
                for id_, (x, y) in zip(prompt_ids, plane, strict=True)
            ]
    with committed_folder(folder, facts) as partial:
        pq.write_table(pa.Table.from_pylist(points, schema=_POINT), partial / POINTS)


def read_clouds(folder: Path) -> TokenClouds | None:
    """Return what `write_gap` has found; None if it had too few prompts or was not run."""
    if not is_committed(folder):
        return None
    found = manifest_facts(folder)["separations"]
    points: dict[str, list[tuple[float, float]]] = {}
    for row in pq.read_table(folder / POINTS).to_pylist():
        points.setdefault(row["cloud"], []).append((row["x"], row["y"]))
    separations = {name: Separation.from_json(one) for name, one in found.items()}
    return TokenClouds(separations=separations, points=points) if found else None


def _represented(
    config: AlignConfig, evaluations: Mapping[str, pa.Table]
) -> tuple[list[str], Clouds]:
    """Return the prompts that all have an answer to, and the clouds, golden first.

    All answers are shown to the policy of the start, behind the prompts that it was given: what
    is compared are the answers, not the models, nor the words of a chain of hindsight.
    """
    policy = load_ar(config.policy)
    golden = golden_samples(read_prompts(config, HELDOUT), policy.vocabulary)
    answers = {
        name: _answers(table) for name, table in ({GOLDEN: golden} | dict(evaluations)).items()
    }
    first = next(iter(evaluations.values()))
    prompts = _by_prompt(first, "prompt_token_ids")
    prompt_ids = sorted(set.intersection(*(set(side) for side in answers.values())))
    clouds = {
        name: answer_representations(
            policy.model, [(prompts[id_], side[id_]) for id_ in prompt_ids]
        )
        for name, side in answers.items()
    }
    return prompt_ids, clouds


def _answers(table: pa.Table) -> dict[str, list[int]]:
    """Return the answer to each prompt; one that says nothing is left out."""
    answers = _by_prompt(table, "token_ids")
    return {id_: answer for id_, answer in answers.items() if spoken_codes(answer)}


def _by_prompt(table: pa.Table, column: str) -> dict[str, list[int]]:
    rows: list[Row] = table.select(["prompt_id", column]).to_pylist()
    return {row["prompt_id"]: row[column] for row in rows}


_POINT = pa.schema(
    [
        pa.field("cloud", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("x", pa.float32(), nullable=False),
        pa.field("y", pa.float32(), nullable=False),
    ]
)
