"""Rollouts as the trainer reads them: answers with the rewards that the judges led to.

Shapes: B answers, S positions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import pyarrow as pa
import torch
from torch import Tensor

from speechalign.errors import StaleRollouts
from speechalign.rows import NOT_RENDERED, Row
from speechalign.types import Measured, Score

RewardOf: TypeAlias = Callable[[Sequence[Row]], Sequence[Score]]
"""Judged rows to their rewards; whole groups at once."""

MEASURE_SUFFIX_OF_TIME = "_seconds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One answer."""

    prompt_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]
    """At the temperature of the sampling."""
    reward: float | None
    """None: it could not be judged."""
    is_truncated: bool

    @property
    def row(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Prompt and answer, as `collate_answers` takes them."""
        return self.prompt_token_ids, self.token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBlock:
    """What one worker gets of one step."""

    step: int
    learned: Sequence[Rollout]
    heldout: Sequence[Rollout]
    measures: Mapping[str, Sequence[float]]
    """What the judges measured of the answers to learn from; missing ones are left out."""
    heldout_measures: Mapping[str, Sequence[float]]
    sampled_s: tuple[float, float]
    """From when until when the sampler worked on it."""
    probe_difference: float


def read_block(table: pa.Table, rewards: RewardOf, start_version: int) -> RolloutBlock:
    """Read a block.

    Raises:
        StaleRollouts: a row was answered by another policy version than it asked for.
    """
    spoken = [field.name for field in table.schema if not pa.types.is_binary(field.type)]
    rows = table.select(spoken).to_pylist()  # the sound itself has been judged
    for row in rows:
        wanted = start_version + row["version_step"]
        if row["policy_version"] != wanted:
            raise StaleRollouts(
                f"sample {row['prompt_id']}/{row['sample_index']} of step {row['step']} is of "
                f"policy version {row['policy_version']}, wanted was {wanted}"
            )
    read = [
        (row["is_heldout"], _rollout(row, reward))
        for row, reward in zip(rows, rewards(rows), strict=True)
    ]
    return RolloutBlock(
        step=rows[0]["step"],
        learned=[rollout for is_heldout, rollout in read if not is_heldout],
        heldout=[rollout for is_heldout, rollout in read if is_heldout],
        measures=_measures(table, [row for row in rows if not row["is_heldout"]]),
        heldout_measures=_measures(table, [row for row in rows if row["is_heldout"]]),
        sampled_s=(rows[0]["sampled_from_s"], rows[0]["sampled_until_s"]),
        probe_difference=rows[0]["probe_difference"],
    )


def _rollout(row: Row, reward: Score) -> Rollout:
    return Rollout(
        prompt_id=row["prompt_id"],
        prompt_token_ids=tuple(row["prompt_token_ids"]),
        token_ids=tuple(row["token_ids"]),
        sampler_logprobs=tuple(row["logprobs"]),
        reward=reward.value if isinstance(reward, Measured) else None,
        is_truncated=row["is_truncated"],
    )


def _measures(table: pa.Table, rows: Sequence[Row]) -> dict[str, list[float]]:
    """Return the nullable float columns: those that judges have written."""
    names = [
        field.name
        for field in table.schema
        if field.nullable
        and pa.types.is_floating(field.type)
        and not field.name.endswith(MEASURE_SUFFIX_OF_TIME)
    ]
    heard = [row for row in rows if not row.get("judge_errors", "").startswith(NOT_RENDERED)]
    return {name: [row[name] for row in heard if row[name] is not None] for name in names}


def groups_of(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """Return the answers of each prompt, in order."""
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.prompt_id, []).append(rollout)
    return list(groups.values())


def spread(values: Sequence[Tensor], mask_BS: Tensor) -> Tensor:
    """Return value_BS with the values of each answer's tokens at their places, zero elsewhere.

    Args:
        values: one tensor a row, a value a token of the answer.
        mask_BS: true on the answers.
    """
    placed_BS = torch.zeros(mask_BS.shape, device=mask_BS.device)
    placed_BS[mask_BS] = torch.cat(list(values)).to(mask_BS.device)
    return placed_BS


def gathered(values_BS: Tensor, mask_BS: Tensor) -> list[Tensor]:
    """Return the values of each answer's tokens; the inverse of `spread`."""
    return list(torch.split(values_BS[mask_BS], mask_BS.sum(1).tolist()))
