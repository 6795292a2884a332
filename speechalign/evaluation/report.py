"""One HTML file that opens offline: the table, the plots, and the sound of before and after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speechalign.evaluation.distribution_gap import TokenClouds, separation_lines
from speechalign.evaluation.heard_gap import HeardGap, heard_rows
from speechalign.evaluation.pages import sound_url, write_page
from speechalign.evaluation.plots import (
    metric_over_iterations,
    time_split,
    token_cloud,
    training_curves,
)
from speechalign.evaluation.summary import Differences, Summary, measured_metrics, table_rows

TEMPLATE = "report.html.j2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Player:
    """One sound of the page."""

    label: str
    pcm: bytes
    sample_rate_hz: int
    note: str
    """What the evaluation measured of it."""
    heard: str = ""
    """What the evaluation's recogniser understood."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """The sounds of one prompt."""

    text: str
    speaker_id: str
    players: tuple[Player, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportInputs:
    """Everything that a report shows; a run directory has all of it."""

    title: str
    facts: Mapping[str, str]
    """What was run, on what."""
    ceilings: Sequence[Summary]
    """Systems that no policy is part of."""
    iterations: Sequence[Summary]
    """The policy before, and after each iteration."""
    verdict: Sequence[str]
    """Which iteration is the best, and what guards have to say, a sentence an entry."""
    differences: Differences
    trainings: Sequence[tuple[str, Sequence[Mapping[str, float]]]]
    """Title and metrics of each preference training."""
    stage_seconds: Mapping[str, float]
    listening: Sequence[Listening]
    heard_gap: HeardGap | None = None
    """None without judged recordings."""
    clouds: TokenClouds | None = None
    """None with too few prompts."""


def write_report(inputs: ReportInputs, path: Path) -> None:
    """Write the page, whole or not at all."""
    values = {
        "title": inputs.title,
        "facts": inputs.facts,
        "table": table_rows([*inputs.ceilings, *inputs.iterations], inputs.differences),
        "verdict": inputs.verdict,
        "metric_plots": _metric_plots(inputs.iterations),
        "trainings": [(title, training_curves(rows)) for title, rows in inputs.trainings],
        "time_plot": time_split(inputs.stage_seconds) if inputs.stage_seconds else "",
        "listening": [_for_page(item) for item in inputs.listening],
        "heard_gap": heard_rows(inputs.heard_gap) if inputs.heard_gap else [],
        "clouds": _cloud_plots(inputs.clouds) if inputs.clouds else [],
        "separations": separation_lines(inputs.clouds) if inputs.clouds else [],
    }
    write_page(TEMPLATE, values, path)


def _metric_plots(iterations: Sequence[Summary]) -> list[str]:
    plots: list[str] = []
    for metric in measured_metrics(iterations):
        estimates = [summary.estimates.get(metric.key) for summary in iterations]
        values = [
            (metric.scale * e.value, metric.scale * e.low, metric.scale * e.high)
            for e in estimates
            if e is not None
        ]
        if len(values) == len(iterations):
            plots.append(metric_over_iterations([s.name for s in iterations], values, metric.label))
    return plots


def _cloud_plots(clouds: TokenClouds) -> list[tuple[str, str]]:
    """Return title and picture of golden beside each synthetic cloud that was projected."""
    golden, *synthetic = clouds.points.items()
    return [
        (
            f"{name}: AUC {clouds.separations[name].auc.shown(digits=2)}",
            token_cloud(golden[1], points, name),
        )
        for name, points in synthetic
    ]


def _for_page(item: Listening) -> dict[str, object]:
    players = [
        {
            "label": player.label,
            "note": player.note,
            "heard": player.heard,
            "source": sound_url(player.pcm, player.sample_rate_hz),
        }
        for player in item.players
    ]
    return {"text": item.text, "speaker": item.speaker_id, "players": players}
