"""What a policy makes of answers: one vector each, to compare answers of different policies.

A vector is the mean, over the codes of an answer, of the last layer's hidden states, with the
prompt in front as in training. The stop token is left out: no loss was ever taken at it.

Shapes: N answers, B rows of a batch, S token positions, D hidden size.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speechalign.policy.answer_batch import collate_answers
from speechalign.policy.vocabulary import EOS_ID

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS_PER_FORWARD = 4  # 16 were a fifth slower on a CPU


def spoken_codes(answer: Sequence[int]) -> tuple[int, ...]:
    """Return an answer without its stop token; empty if it says nothing."""
    return tuple(answer[:-1] if answer and answer[-1] == EOS_ID else answer)


@torch.no_grad()
def answer_representations(
    model: "PreTrainedModel", rows: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> NDArray[np.float32]:
    """Return vectors_ND of (prompt, answer) rows, in their order.

    Args:
        model: the one that all answers are shown to; vectors of two models cannot be compared.
        rows: token ids; no answer may be empty.
    """
    codes = [(prompt, spoken_codes(answer)) for prompt, answer in rows]
    by_length = sorted(range(len(codes)), key=lambda i: len(codes[i][0]) + len(codes[i][1]))
    vectors_ND = np.empty((len(codes), model.config.hidden_size), np.float32)
    for first in range(0, len(codes), ROWS_PER_FORWARD):
        indices = by_length[first : first + ROWS_PER_FORWARD]  # alike in length: little padding
        vectors_ND[indices] = _represent(model, [codes[i] for i in indices]).cpu().numpy()
    return vectors_ND


def _represent(
    model: "PreTrainedModel", rows: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Tensor:
    batch = collate_answers(rows).to(model.device)
    backbone = cast("PreTrainedModel", model.base_model)  # the language head is not needed
    hidden_BSD = backbone(
        input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False
    ).last_hidden_state.float()
    answer_BS1 = batch.answer_mask_BS[..., None]
    return (hidden_BSD * answer_BS1).sum(1) / answer_BS1.sum(1)
