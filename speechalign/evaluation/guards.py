"""Which iteration is the best, and which are worse than a guard allows. Pure.

Each iteration is compared with the best one before it, over the prompts that both have measured.
The rule: an iteration that violates no guard and has a lower WER becomes the best; iteration 0 is
the policy of the start. Where nobody measured a WER, the last iteration that violates no guard is
the best.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from speechalign.config.guards import GuardsConfig
from speechalign.evaluation.statistics import Estimate
from speechalign.evaluation.summary import METRICS, Metric, compare, measured_keys

WER = "wer"
DURATION_ERROR = "duration_error"
"""A column made here: a mean duration ratio of 1 can hide clips of 0.5 and of 1.5."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """A metric that must not get much worse."""

    limit: str
    """The field of `GuardsConfig`."""
    metric: Metric
    higher_is_worse: bool

    def worsening(self, difference: Estimate) -> Estimate:
        """Return a difference, after minus before, so that more is worse."""
        if self.higher_is_worse:
            return difference
        return Estimate(value=-difference.value, low=-difference.high, high=-difference.low)


_METRIC_OF = {metric.key: metric for metric in METRICS}
GUARDS = (
    Guard(limit="max_wer_rise", metric=_METRIC_OF[WER], higher_is_worse=True),
    Guard(limit="max_speaker_similarity_drop", metric=_METRIC_OF["sim"], higher_is_worse=False),
    Guard(limit="max_distillmos_drop", metric=_METRIC_OF["distillmos"], higher_is_worse=False),
    Guard(limit="max_stop_rate_drop", metric=_METRIC_OF["stop"], higher_is_worse=False),
    Guard(
        limit="max_duration_error_rise",
        metric=Metric(key=DURATION_ERROR, label="duration error", total=DURATION_ERROR),
        higher_is_worse=True,
    ),
    Guard(limit="max_silence_rise", metric=_METRIC_OF["silence"], higher_is_worse=True),
)
GUARDED = tuple(guard.metric for guard in GUARDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A guard, and by how much it was passed."""

    metric: str
    limit: float
    worse_by: Estimate | None
    """None: not one prompt has a measurement any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """An iteration against the best one before it."""

    iteration: int
    against: int
    wer_difference: Estimate | None
    violations: tuple[Violation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the evaluations say of the iterations."""

    best: int
    comparisons: tuple[Comparison, ...]
    stopped_after: int | None
    """The iteration whose violation ends the run."""

    @property
    def reason(self) -> str:
        """Why the best is the best."""
        if not self.comparisons:
            return "no iteration was evaluated after it"
        if not self.best:
            return "no iteration after it has a lower held-out WER and violates no guard"
        comparison = self.comparisons[self.best - 1]
        if comparison.wer_difference is None:
            return "the last one that violates no guard; no WER was measured"
        change = _METRIC_OF[WER].shown(comparison.wer_difference, signed=True)
        return (
            f"the lowest held-out WER of those that violate no guard, {change} points against "
            f"{iteration_name(comparison.against)}"
        )

    def lines(self) -> list[str]:
        """Return what a person must know, a sentence a line."""
        worse = [
            f"{iteration_name(c.iteration)} is worse than {iteration_name(c.against)}: "
            + "; ".join(map(_violation_text, c.violations))
            for c in self.comparisons
            if c.violations
        ]
        stop = []
        if self.stopped_after is not None:
            stop = [f"stopped by a guard after {iteration_name(self.stopped_after)}"]
        return [*worse, *stop, f"best: {iteration_name(self.best)}, {self.reason}"]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self) | {"reason": self.reason}


def iteration_name(iteration: int) -> str:
    """Return what tables call an iteration."""
    return f"iteration {iteration}" if iteration else "before"


def judge(evaluations: Sequence[pa.Table], guards: GuardsConfig, num_resamples: int) -> Verdict:
    """Return which iteration is the best, and where the run ends.

    Args:
        evaluations: judged samples of iteration 0, 1, ..., over the same prompts.
        guards: the limits.
        num_resamples: of the bootstrap.
    """
    tables = [_with_duration_error(table) for table in evaluations]
    best = 0
    comparisons: list[Comparison] = []
    for iteration in range(1, len(tables)):
        measured = measured_keys(tables[best], GUARDED)
        difference = compare(tables[best], tables[iteration], num_resamples, GUARDED)
        comparison = Comparison(
            iteration=iteration,
            against=best,
            wer_difference=difference.get(WER),
            violations=violations(difference, measured, guards),
        )
        comparisons.append(comparison)
        if comparison.violations and guards.stop_when_worse:
            return Verdict(best=best, comparisons=tuple(comparisons), stopped_after=iteration)
        has_lower_wer = WER in difference and difference[WER].value < 0
        if not comparison.violations and (has_lower_wer or WER not in measured):
            best = iteration
    return Verdict(best=best, comparisons=tuple(comparisons), stopped_after=None)


def violations(
    difference: Mapping[str, Estimate], measured: frozenset[str], guards: GuardsConfig
) -> tuple[Violation, ...]:
    """Return the guards that a paired difference, after minus before, violates.

    Args:
        difference: by the key of the metric.
        measured: the metrics that were measured before; one that is lost is a violation.
        guards: the limits.
    """
    found: list[Violation] = []
    for guard in GUARDS:
        limit: float | None = getattr(guards, guard.limit)
        key = guard.metric.key
        if limit is None or key not in measured:
            continue
        worse_by = guard.worsening(difference[key]) if key in difference else None
        if worse_by is None or _is_beyond(worse_by, limit, guards):
            found.append(Violation(metric=key, limit=limit, worse_by=worse_by))
    return tuple(found)


def _is_beyond(worse_by: Estimate, limit: float, guards: GuardsConfig) -> bool:
    is_certain = worse_by.excludes_zero or not guards.interval_excludes_zero
    return worse_by.value > limit and is_certain


def _with_duration_error(judged: pa.Table) -> pa.Table:
    if "duration_ratio" not in judged.column_names:
        return judged
    return judged.append_column(DURATION_ERROR, pc.abs(pc.subtract(judged["duration_ratio"], 1.0)))


def _violation_text(violation: Violation) -> str:
    metric = next(metric for metric in GUARDED if metric.key == violation.metric)
    if violation.worse_by is None:
        return f"{metric.label} is measured for no prompt any more"
    limit = f"{metric.scale * violation.limit:.{metric.digits}f}"
    return f"{metric.label} by {metric.shown(violation.worse_by, signed=True)}, limit {limit}"
