"""Log-probabilities of answers, as the trainer sees them.

Shapes: B rows, S token positions, V vocabulary. Position s holds the token at s; its
log-probability comes from the logits at s - 1, so position 0 never counts.
"""

import torch
from torch import Tensor


def answer_logprobs(logits_BSV: Tensor, input_ids_BS: Tensor, answer_mask_BS: Tensor) -> Tensor:
    """Return logprobs_BS of the answer tokens in float32, zero elsewhere.

    Args:
        logits_BSV: of the model for `input_ids_BS`.
        input_ids_BS: prompt, answer, padding.
        answer_mask_BS: true on the answer, its stop token included.
    """
    logprobs_BSV = torch.log_softmax(logits_BSV[:, :-1].float(), dim=-1)
    next_BS1 = input_ids_BS[:, 1:, None]
    picked_BS = logprobs_BSV.gather(-1, next_BS1).squeeze(-1) * answer_mask_BS[:, 1:]
    return torch.nn.functional.pad(picked_BS, (1, 0))


def token_entropies(logits_BSV: Tensor, answer_mask_BS: Tensor) -> Tensor:
    """Return entropy_BS in nats of the distribution of each answer token, zero elsewhere."""
    logprobs_BSV = torch.log_softmax(logits_BSV[:, :-1].float(), dim=-1)
    entropy_BS = -(logprobs_BSV.exp() * logprobs_BSV).sum(-1) * answer_mask_BS[:, 1:]
    return torch.nn.functional.pad(entropy_BS, (1, 0))
