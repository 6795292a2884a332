"""PPO's critic: the expected return just before every token.

The backbone of the policy that is trained, a scalar head, which starts at zero, and an offset that
no gradient reaches: what to expect before anything was learned. Ouyang et al.
2022 (appendix C.4) start from the reward model; ours holds the same policy, and its own head reads
whole answers.

Shapes: B rows, S token positions, D hidden size.
"""

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from speechalign.policy.answer_batch import AnswerBatch
from speechalign.policy.ar import load_ar

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ValueModel(nn.Module):
    """One number for each position."""

    def __init__(self, policy: "PreTrainedModel") -> None:
        super().__init__()
        self.backbone = cast("PreTrainedModel", policy.base_model)
        self.head = nn.Linear(self.backbone.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)
        self.register_buffer("offset", torch.zeros(()))
        self.offset: Tensor

    @classmethod
    def of_policy(cls, folder: Path) -> "ValueModel":
        """Return a critic that starts from a policy."""
        return cls(load_ar(folder).model)

    def forward(self, batch: AnswerBatch) -> Tensor:
        """Return value_BS: at the place of each answer token, what was expected before it."""
        hidden_BSD = self.backbone(
            input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False
        ).last_hidden_state
        before_BS = self.head(hidden_BSD[:, :-1]).squeeze(-1).float() + self.offset
        return torch.nn.functional.pad(before_BS, (1, 0)) * batch.answer_mask_BS
