"""Training of the reward model: the chosen answer of a pair deserves more than the rejected.

Bradley-Terry, Ouyang et al. 2022, eq. 1: -log sigmoid(r(chosen) - r(rejected)).

The rewards are shifted so that the chosen answers of held-out pairs have 0 in the mean (section
3.5 there): differences ignore it, a critic does not.

Left out: margins in the loss (Llama 2): nobody scored golden pairs, and the margins of two judges
are on no common scale.

Shapes: B pairs, N held-out pairs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechalign.config.training import RewardModelConfig
from speechalign.errors import ConfigError, DataError
from speechalign.policy.answer_batch import collate_answers
from speechalign.policy.ar import load_ar
from speechalign.policy.prompt_format import without_feedback
from speechalign.policy.reward_model import RewardModel, save_reward_model
from speechalign.training.batches import BatchPlan
from speechalign.training.stored_pairs import read_both_sides, split_pairs
from speechalign.types import PreferencePair

MARGINS = "heldout_margins.parquet"
"""One row a held-out pair; what the plots are made of."""
REPORT = "report.html"
HELDOUT_BATCH = 16


class RewardTask:
    """What the reward model learns from, batch by batch."""

    unit: Literal["tokens", "codes", "pairs"] = "pairs"
    keeps_best = True

    def __init__(self, config: RewardModelConfig) -> None:
        loaded = load_ar(config.policy)
        pairs = [pair for folder in config.pairs for pair in read_both_sides(folder)]
        self._fingerprint: str = loaded.facts["codec_fingerprint"]
        others = {pair.codec_fingerprint for pair in pairs} - {self._fingerprint}
        if others:
            raise DataError(
                f"pairs of codec {min(others)} meet policy {config.policy} of codec "
                f"{self._fingerprint}; their codes mean different sounds"
            )
        self._train, self._heldout = split_pairs(pairs, config.heldout_share, config.seed)
        if len(self._train) < config.rows_per_step:
            raise ConfigError(
                f"{len(self._train)} training pairs do not fill one step of "
                f"{config.rows_per_step}; make more pairs or lower rows_per_step"
            )
        self._config = config
        self._vocabulary = loaded.vocabulary
        loaded.model.requires_grad_(config.train_policy)
        self.model: nn.Module = RewardModel(loaded.model)
        lengths = [len(p.chosen_token_ids) + len(p.rejected_token_ids) for p in self._train]
        self._plan = BatchPlan(lengths, config.rows_per_step, config.seed)

    def rows(self, step: int) -> list[int]:
        """Return the training pairs of a micro-batch, over all ranks."""
        return self._plan.batch(step)

    def loss(self, model: nn.Module, rows: list[int], step: int) -> tuple[Tensor, Tensor]:
        """Return (summed loss, number of pairs)."""
        del step
        chosen_B, rejected_B = pair_rewards(model, [self._train[row] for row in rows])
        count = torch.tensor(float(len(rows)), device=chosen_B.device)
        return -F.logsigmoid(chosen_B - rejected_B).sum(), count

    def heldout(self, model: nn.Module) -> dict[str, float]:
        """Return loss, accuracy and mean margin of the held-out pairs."""
        chosen_N, rejected_N = batched_rewards(model, self._heldout)
        return _measured(chosen_N - rejected_N)

    def save(self, folder: Path, model: nn.Module, facts: dict[str, Any]) -> None:
        """Commit the reward model with its held-out margins."""
        reward_model = cast("RewardModel", model).eval()
        chosen_N, rejected_N = batched_rewards(model, self._heldout)
        reward_model.offset += chosen_N.mean()
        margins_N = chosen_N - rejected_N
        own = {
            "codec_fingerprint": self._fingerprint,
            "num_train_pairs": len(self._train),
            "num_heldout_pairs": len(self._heldout),
        }
        kinds = [str(pair.kind) for pair in self._heldout]
        table = pa.table({"kind": kinds, "margin": margins_N.tolist()})
        # First: a model that is there is finished, and its report must find them.
        work = folder.with_name(f"{folder.name}-work")
        pq.write_table(table, work / MARGINS)
        (work / REPORT).unlink(missing_ok=True)  # of a model that was here before
        save_reward_model(
            folder, reward_model, self._vocabulary, facts | own | _measured(margins_N)
        )


def _measured(margins_N: Tensor) -> dict[str, float]:
    return {
        "heldout_loss": float(-F.logsigmoid(margins_N).mean()),
        "heldout_accuracy": float((margins_N > 0).float().mean()),
        "heldout_margin": float(margins_N.mean()),
    }


@torch.no_grad()
def batched_rewards(model: nn.Module, pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor]:
    """Return the rewards of any number of pairs, each (N,), a few at a time."""
    parts = [
        pair_rewards(model, pairs[first : first + HELDOUT_BATCH])
        for first in range(0, len(pairs), HELDOUT_BATCH)
    ]
    return torch.cat([chosen for chosen, _ in parts]), torch.cat([other for _, other in parts])


def pair_rewards(model: nn.Module, pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor]:
    """Return the rewards of the chosen answers and of the rejected ones, each (B,)."""
    prompts = [without_feedback(pair.prompt_token_ids) for pair in pairs]
    answers = [pair.chosen_token_ids for pair in pairs]
    answers += [pair.rejected_token_ids for pair in pairs]
    rows = list(zip(prompts * 2, answers, strict=True))
    rewards = model(collate_answers(rows).to(next(model.parameters()).device))
    return rewards[: len(pairs)], rewards[len(pairs) :]
