"""Training of the reward model: the chosen answer of a pair deserves more than the rejected.

Bradley-Terry, Ouyang et al. 2022, eq. 1: -log sigmoid(r(chosen) - r(rejected)).

Left out: margins in the loss (Llama 2) and centring of the rewards, which differences ignore.

Shapes: B pairs.
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
from speechalign.policy.reward_model import RewardModel, save_reward_model
from speechalign.training.batches import BatchPlan
from speechalign.training.preference import read_pairs, split_pairs
from speechalign.types import PreferencePair

MARGINS = "heldout_margins.parquet"
"""One row a held-out pair; what the plots are made of."""
HELDOUT_BATCH = 16


class RewardTask:
    """What the reward model learns from, batch by batch."""

    unit: Literal["tokens", "codes", "pairs"] = "pairs"
    keeps_best = True

    def __init__(self, config: RewardModelConfig) -> None:
        loaded = load_ar(config.policy)
        pairs = [pair for folder in config.pairs for pair in read_pairs(folder)]
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
        self.model: nn.Module = RewardModel.on_policy(loaded.model)
        lengths = [len(p.chosen_token_ids) + len(p.rejected_token_ids) for p in self._train]
        self._plan = BatchPlan(lengths, config.rows_per_step, config.seed)

    def rows(self, step: int) -> list[int]:
        """Return the training pairs of a micro-batch, over all ranks."""
        return self._plan.batch(step)

    def loss(self, model: nn.Module, rows: list[int], step: int) -> tuple[Tensor, Tensor]:
        """Return (summed loss, number of pairs)."""
        del step
        margins_B = pair_margins(model, [self._train[row] for row in rows])
        count = torch.tensor(float(len(rows)), device=margins_B.device)
        return -F.logsigmoid(margins_B).sum(), count

    def heldout(self, model: nn.Module) -> dict[str, float]:
        """Return loss, accuracy and mean margin of the held-out pairs."""
        return _measured(self._heldout_margins(model))

    def save(self, folder: Path, model: nn.Module, facts: dict[str, Any]) -> None:
        """Commit the reward model with its held-out margins."""
        reward_model = cast("RewardModel", model).eval()
        with torch.no_grad():
            margins = self._heldout_margins(model)
        own = {
            "codec_fingerprint": self._fingerprint,
            "num_train_pairs": len(self._train),
            "num_heldout_pairs": len(self._heldout),
        }
        save_reward_model(folder, reward_model, self._vocabulary, facts | own | _measured(margins))
        table = pa.table({"kind": [str(p.kind) for p in self._heldout], "margin": margins})
        pq.write_table(table, folder.with_name(f"{folder.name}-work") / MARGINS)

    def _heldout_margins(self, model: nn.Module) -> list[float]:
        batches = range(0, len(self._heldout), HELDOUT_BATCH)
        return [
            margin
            for first in batches
            for margin in pair_margins(model, self._heldout[first : first + HELDOUT_BATCH]).tolist()
        ]


def _measured(margins: Sequence[float]) -> dict[str, float]:
    margins_B = torch.tensor(margins)
    return {
        "heldout_loss": float(-F.logsigmoid(margins_B).mean()),
        "heldout_accuracy": float((margins_B > 0).float().mean()),
        "heldout_margin": float(margins_B.mean()),
    }


def pair_margins(model: nn.Module, pairs: Sequence[PreferencePair]) -> Tensor:
    """Return margin_B: how much more the chosen answers are worth than the rejected."""
    rows = [(p.prompt_token_ids, p.chosen_token_ids) for p in pairs]
    rows += [(p.prompt_token_ids, p.rejected_token_ids) for p in pairs]
    rewards = model(collate_answers(rows).to(next(model.parameters()).device))
    return rewards[: len(pairs)] - rewards[len(pairs) :]
