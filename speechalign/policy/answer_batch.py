"""Prompts with their answers as one padded batch.

Shapes: B rows, S token positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speechalign.policy.vocabulary import PAD_ID


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerBatch:
    """Prompts with their answers, padded on the right."""

    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    answer_mask_BS: Tensor
    """True on the answer, its stop token included; never on the prompt or on padding."""

    def to(self, device: torch.device) -> "AnswerBatch":
        """Return the batch on a device."""
        return AnswerBatch(
            input_ids_BS=self.input_ids_BS.to(device),
            attention_mask_BS=self.attention_mask_BS.to(device),
            answer_mask_BS=self.answer_mask_BS.to(device),
        )


def collate_answers(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> AnswerBatch:
    """Return one batch of (prompt, answer) rows."""
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids_BS = torch.full((len(rows), longest), PAD_ID)
    attention_mask_BS = torch.zeros(len(rows), longest, dtype=torch.bool)
    answer_mask_BS = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        stop = len(prompt) + len(answer)
        input_ids_BS[row, :stop] = torch.tensor([*prompt, *answer])
        attention_mask_BS[row, :stop] = True
        answer_mask_BS[row, len(prompt) : stop] = True
    return AnswerBatch(
        input_ids_BS=input_ids_BS,
        attention_mask_BS=attention_mask_BS,
        answer_mask_BS=answer_mask_BS,
    )
