"""How good a reward model is on pairs it was not trained on, and the page that shows it."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from speechalign.evaluation.pages import write_page
from speechalign.evaluation.plots import calibration, margin_histogram, training_curves

TEMPLATE = "reward_model.html.j2"
NUM_BINS = 5


def calibration_points(margins: Sequence[float]) -> list[tuple[float, float, int]]:
    """Return (mean confidence, share right, number of pairs), from unsure to sure.

    Confidence is sigmoid(|margin|), what Bradley-Terry says of being right: .5 to 1. The bins
    hold equally many pairs.
    """
    ordered = sorted(margins, key=abs)
    edges = [round(index * len(ordered) / NUM_BINS) for index in range(NUM_BINS + 1)]
    points: list[tuple[float, float, int]] = []
    for start, stop in itertools.pairwise(edges):
        inside = ordered[start:stop]
        if inside:
            confidence = sum(1 / (1 + math.exp(-abs(m))) for m in inside) / len(inside)
            right = sum(margin > 0 for margin in inside) / len(inside)
            points.append((confidence, right, len(inside)))
    return points


def write_reward_report(
    facts: Mapping[str, object],
    margins_by_kind: Mapping[str, Sequence[float]],
    metrics: Sequence[Mapping[str, float]],
    path: Path,
) -> None:
    """Write the page: facts, curves, margins and calibration."""
    everything = [margin for margins in margins_by_kind.values() for margin in margins]
    plots = [
        margin_histogram(margins_by_kind),
        calibration(calibration_points(everything)),
        *training_curves(metrics),
    ]
    write_page(TEMPLATE, {"facts": facts, "plots": plots}, path)
