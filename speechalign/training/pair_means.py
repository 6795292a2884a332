"""What a batch of pairs says of a policy in training, as means."""

import torch

from speechalign.training.engine import global_sum
from speechalign.training.pair_comparison import Compared


def local_means(compared: Compared) -> dict[str, float]:
    """Return means over the pairs of this rank."""
    output, policy, reference = compared.loss, compared.policy, compared.reference
    chosen_B = policy.chosen_B.detach() / policy.chosen_tokens_B
    rejected_B = policy.rejected_B.detach() / policy.rejected_tokens_B
    chosen_drop_B = reference.chosen_B / reference.chosen_tokens_B - chosen_B
    rejected_drop_B = reference.rejected_B / reference.rejected_tokens_B - rejected_B
    values = {
        "loss": output.loss_B.detach(),
        "anchor": output.anchor_B.detach(),
        "accuracy": (output.margin_B > 0).float(),
        "margin": output.margin_B,
        "chosen_reward": output.chosen_reward_B,
        "rejected_reward": output.rejected_reward_B,
        "chosen_logprob": chosen_B,
        "rejected_logprob": rejected_B,
        "chosen_drop": chosen_drop_B,
        # E[log reference - log policy] a token, over answers that the reference drew itself:
        # KL(reference || policy) for ranked pairs; golden answers are not the reference's.
        "kl_k1": (chosen_drop_B + rejected_drop_B) / 2,
    }
    if policy.entropy_B is not None:
        values["entropy"] = policy.entropy_B
    return {name: float(value_B.mean()) for name, value_B in values.items()}


def global_means(compared: Compared) -> dict[str, float]:
    """Return means over the pairs of all ranks."""
    values = local_means(compared)
    losses_B = compared.loss.loss_B
    row = torch.tensor([*values.values(), 1.0], device=losses_B.device)  # NCCL takes no other
    totals = global_sum(row * len(losses_B))
    return {name: float(totals[i] / totals[-1]) for i, name in enumerate(values)}
