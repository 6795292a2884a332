"""The plots of a report, as SVG that a page can hold."""

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

CURVES = (
    ("margin and accuracy", ("margin", "accuracy", "heldout_margin", "heldout_accuracy")),
    (
        "log-probability a token",
        (
            "chosen_logprob",
            "rejected_logprob",
            "heldout_chosen_logprob",
            "heldout_rejected_logprob",
        ),
    ),
    ("loss", ("loss", "heldout_loss")),
)
COLOURS = ("#0b5cad", "#b3400b", "#0b5cad", "#b3400b")


def training_curves(metrics: Sequence[Mapping[str, float]], title: str) -> str:
    """Return the curves of one preference training; held-out values have markers."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots(1, len(CURVES))
    for axis, (name, keys) in zip(axes, CURVES, strict=True):
        for index, key in enumerate(keys):
            points = [(row["step"], row[key]) for row in metrics if key in row]
            if points:
                is_heldout = key.startswith("heldout")
                axis.plot(
                    *zip(*points, strict=True),
                    color=COLOURS[index % len(COLOURS)],
                    marker="o" if is_heldout else "",
                    linewidth=1.8 if is_heldout else 0.9,
                    alpha=1.0 if is_heldout else 0.55,
                    label=key.replace("_", " "),
                )
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("update")
        axis.grid(alpha=0.25)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=11)
    return _svg(figure)


def metric_over_iterations(
    names: Sequence[str], values: Sequence[tuple[float, float, float]], label: str
) -> str:
    """Return one metric with its intervals, system by system."""
    figure = Figure(figsize=(3.6, 2.6), layout="constrained")
    axis = figure.subplots()
    centres = [value for value, _, _ in values]
    errors = [
        [value - low for value, low, _ in values],
        [high - value for value, _, high in values],
    ]
    axis.errorbar(range(len(names)), centres, yerr=errors, marker="o", capsize=4, color=COLOURS[0])
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set_title(label, fontsize=10)
    axis.grid(alpha=0.25)
    axis.margins(x=0.2)
    return _svg(figure)


def time_split(seconds: Mapping[str, float]) -> str:
    """Return where the time of a pipeline's actors went."""
    figure = Figure(figsize=(6, 0.5 + 0.35 * len(seconds)), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(list(seconds), list(seconds.values()), color=COLOURS[0])
    axis.bar_label(bars, fmt="%.0f s", padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("actor seconds")
    axis.margins(x=0.15)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "speechalign"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
