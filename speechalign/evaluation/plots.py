"""The plots of a report, as SVG that a page can hold. Each is wide enough to read on a phone."""

import io
from collections.abc import Mapping, Sequence
from html import escape

import matplotlib as mpl
from matplotlib.figure import Figure

CURVES = (
    ("reward", {"reward": "reward"}),
    ("loss", {"loss": "loss"}),
    ("policy loss", {"policy_loss": "loss"}),
    ("critic", {"value_loss": "loss", "value_error": "squared error"}),
    ("accuracy", {"accuracy": "accuracy"}),
    ("margin", {"margin": "margin"}),
    ("log-probability a token", {"chosen_logprob": "chosen", "rejected_logprob": "rejected"}),
    (
        "moved from the reference, nats a token",
        {"chosen_drop": "chosen lost", "kl_k1": "KL (k1)", "kl_k3": "KL (k3)"},
    ),
    ("implicit reward", {"chosen_reward": "chosen", "rejected_reward": "rejected"}),
    ("word error rate, as another recogniser hears", {"wer": "WER"}),
    ("entropy, nats a token", {"entropy": "entropy"}),
    ("tokens an answer", {"length": "length"}),
    ("share of the answers", {"stop_share": "end by themselves", "kept_answers": "learned from"}),
    (
        "share of the groups that teach nothing",
        {"zero_variance_groups": "nothing to learn", "tied_groups": "no pair"},
    ),
    ("share of the tokens that the clip holds back", {"clip_fraction": "held back"}),
    ("gradient norm, before clipping", {"grad_norm": "norm"}),
    ("learning rate", {"learning_rate": "rate"}),
)
"""Title, and the keys of the metrics with what a curve is called."""
COLOURS = ("#0b5cad", "#b3400b", "#2d7a3a")
JUDGED = "judge_"
HELDOUT = "heldout_"


def training_curves(metrics: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the curves of one training; held-out values have markers.

    A key that no row has makes no curve, and a plot without curves is left out. What judges
    measured of an online training's answers has a plot a measure.
    """
    written = {key.removeprefix(HELDOUT) for row in metrics for key in row}
    measures = sorted(key for key in written if key.startswith(JUDGED))
    judged = [(f"judged: {key.removeprefix(JUDGED)}", {key: "mean"}) for key in measures]
    plots: list[str] = []
    for name, keys in (*CURVES, *judged):
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        axis = figure.subplots()
        for colour, (key, label) in zip(COLOURS, keys.items(), strict=False):
            trained, heldout = _points(metrics, key), _points(metrics, HELDOUT + key)
            if trained:
                axis.plot(*zip(*trained, strict=True), color=colour, linewidth=0.9, alpha=0.55,
                          label=f"{label}, trained on")  # fmt: skip
            if heldout:
                axis.plot(*zip(*heldout, strict=True), color=colour, linewidth=1.8, marker="o",
                          label=f"{label}, held out")  # fmt: skip
        if not axis.lines:
            continue
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("update")
        axis.grid(alpha=0.25)
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
        plots.append(_svg(figure, f"{name} over the updates"))
    return plots


def metric_over_iterations(
    names: Sequence[str], values: Sequence[tuple[float, float, float]], label: str
) -> str:
    """Return one metric with its intervals, system by system; values are as they are shown."""
    figure = Figure(figsize=(max(3.6, 0.9 * len(names)), 2.6), layout="constrained")
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
    return _svg(figure, f"{label}, system by system")


def systems_compared(
    names: Sequence[str], values: Sequence[tuple[float, float, float]], label: str
) -> str:
    """Return one metric with its intervals, a line a system, the first at the top."""
    figure = Figure(figsize=(6.4, 0.6 + 0.3 * len(names)), layout="constrained")
    axis = figure.subplots()
    centres = [value for value, _, _ in values]
    errors = [
        [value - low for value, low, _ in values],
        [high - value for value, _, high in values],
    ]
    places = range(len(names))
    axis.errorbar(centres, places, xerr=errors, fmt="o", capsize=3, color=COLOURS[0])
    axis.axvline(centres[0], color=COLOURS[1], linestyle=":")
    axis.set_yticks(places, names, fontsize=8)
    axis.invert_yaxis()
    axis.set_title(label, fontsize=10)
    axis.grid(alpha=0.25, axis="x")
    return _svg(figure, f"{label}, system by system")


def margin_histogram(margins_by_kind: Mapping[str, Sequence[float]]) -> str:
    """Return how much more the chosen answers are worth, kind by kind; right of 0 is right."""
    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axis = figure.subplots()
    axis.hist(list(margins_by_kind.values()), bins=24, label=list(margins_by_kind),
              color=COLOURS[: len(margins_by_kind)])  # fmt: skip
    axis.axvline(0.0, color="#444444", linewidth=0.8)
    axis.set_title("held-out margins", fontsize=10)
    axis.set_xlabel("reward of the chosen less that of the rejected")
    axis.legend(fontsize=8, frameon=False)
    return _svg(figure, "histogram of the margins of held-out pairs")


def calibration(points: Sequence[tuple[float, float, int]]) -> str:
    """Return how often the model is right against how sure it is; on the line is calibrated.

    Args:
        points: (mean confidence, share right, number of pairs) of each bin.
    """
    figure = Figure(figsize=(3.6, 3.0), layout="constrained")
    axis = figure.subplots()
    axis.plot([0.5, 1.0], [0.5, 1.0], color="#888888", linewidth=0.8)
    axis.plot([p[0] for p in points], [p[1] for p in points], marker="o", color=COLOURS[0])
    for confidence, share, count in points:
        axis.annotate(str(count), (confidence, share), textcoords="offset points", xytext=(4, 4),
                      fontsize=7)  # fmt: skip
    axis.set_title("calibration, pairs a point", fontsize=10)
    axis.set_xlabel("confidence")
    axis.set_ylabel("share right")
    axis.grid(alpha=0.25)
    return _svg(figure, "share of held-out pairs that are right, by confidence")


def token_cloud(
    golden: Sequence[tuple[float, float]], synthetic: Sequence[tuple[float, float]], name: str
) -> str:
    """Return golden and one policy's synthetic answers in the plane, those of a prompt joined."""
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axis = figure.subplots()
    for (x, y), (other_x, other_y) in zip(golden, synthetic, strict=True):
        axis.plot([x, other_x], [y, other_y], color="#888888", linewidth=0.5, alpha=0.6, zorder=1)
    clouds = (("golden", "o", golden), (f"synthetic, {name}", "x", synthetic))
    for colour, (label, marker, points) in zip(COLOURS, clouds, strict=False):
        axis.scatter(*zip(*points, strict=True), s=13, marker=marker, color=colour, label=label,
                     linewidths=0.9, zorder=2)  # fmt: skip
    axis.set_xticks([])
    axis.set_yticks([])
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return _svg(figure, f"t-SNE of golden and synthetic answers, {name}")


def time_split(seconds: Mapping[str, float]) -> str:
    """Return where the time of a pipeline's actors went."""
    figure = Figure(figsize=(6, 0.8 + 0.35 * len(seconds)), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(
        [name.replace("_", " ") for name in seconds], list(seconds.values()), color=COLOURS[0]
    )
    axis.bar_label(bars, fmt="%.0f s", padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("actor seconds")
    axis.margins(x=0.15)
    return _svg(figure, "seconds that the actors of each stage worked")


def _points(metrics: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in metrics if key in row and "step" in row]


def _svg(figure: Figure, description: str) -> str:
    """Return the drawing with a name for people who cannot see it."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "speechalign"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    label = f'<svg role="img" aria-label="{escape(description)}"'
    return text[text.index("<svg") :].replace("<svg", label, 1)
