"""What the NAR model makes of golden and of synthetic tokens: the gap, by ear. Pure.

SpeechAlign (Zhang et al. 2024, section 2, table 1) feeds the NAR model both. Golden tokens are
what no AR model can beat, so the way from "before" to them is the gap that alignment can close;
the paper's three iterations of DPO close 92 % of it in WER.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from speechalign.evaluation.statistics import Estimate
from speechalign.evaluation.summary import METRICS, Metric, Summary, compare, gap_closed, summarise

SHOWN = ("wer", "cer", "sim")
NO_GAP = "no clear gap"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeardGap:
    """Judgements of golden and of synthetic tokens, on the same prompts."""

    golden: Summary
    policies: Sequence[Summary]
    """The one before all first."""
    differences: Mapping[str, Mapping[str, Estimate]]
    """By policy and metric: synthetic minus golden, paired."""
    shares: Mapping[str, Mapping[str, Estimate]]
    """By later policy and metric: the share that is closed of the first one's gap."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def heard_gap(
    golden: pa.Table, evaluations: Mapping[str, pa.Table], num_resamples: int
) -> HeardGap | None:
    """Return the judgements on the prompts that all have; None if there are none.

    Args:
        golden: judged recordings, their own AR tokens rendered by the NAR model.
        evaluations: judged answers by policy, the one before all first.
        num_resamples: of the bootstrap over prompts.
    """
    tables = (golden, *evaluations.values())
    ids: list[set[Any]] = [set(table["prompt_id"].to_pylist()) for table in tables]
    shared = set[Any].intersection(*ids)
    if not shared:
        return None
    golden = _only(golden, shared)
    policies = {name: _only(table, shared) for name, table in evaluations.items()}
    (_, before), *later = policies.items()
    return HeardGap(
        golden=summarise("golden tokens", golden, num_resamples),
        policies=[summarise(name, table, num_resamples) for name, table in policies.items()],
        differences={
            name: compare(golden, table, num_resamples) for name, table in policies.items()
        },
        shares={name: gap_closed(before, table, golden, num_resamples) for name, table in later},
    )


def heard_rows(heard: HeardGap) -> list[list[str]]:
    """Return the cells of the table: a head, golden tokens, a row a policy.

    Each metric has its value, the paired difference to golden, and the share of the gap closed.
    """
    present = [m for m in METRICS if m.key in SHOWN and m.key in heard.golden.estimates]
    head = ["NAR fed with", "prompts"]
    for metric in present:
        head += [metric.label, "minus golden", "gap closed %"]
    golden = [heard.golden.name, str(heard.golden.num_prompts)]
    for metric in present:
        golden += [metric.shown(heard.golden.estimates[metric.key]), "", ""]
    return [head, golden, *(_row(heard, policy, present) for policy in heard.policies)]


def _row(heard: HeardGap, policy: Summary, metrics: Sequence[Metric]) -> list[str]:
    cells = [policy.name, str(policy.num_prompts)]
    for metric in metrics:
        value = policy.estimates.get(metric.key)
        difference = heard.differences[policy.name].get(metric.key)
        cells += [
            metric.shown(value) if value else "not measured",
            metric.shown(difference, signed=True) if difference else "",
            _percent(heard.shares[policy.name].get(metric.key)) if policy.name in heard.shares
            else "",
        ]  # fmt: skip
    return cells


def _percent(share: Estimate | None) -> str:
    return share.shown(scale=100.0, digits=0) if share else NO_GAP


def _only(judged: pa.Table, prompt_ids: set[str]) -> pa.Table:
    is_wanted = [id_ in prompt_ids for id_ in judged["prompt_id"].to_pylist()]
    return judged.filter(pa.array(is_wanted))
