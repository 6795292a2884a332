"""What a batch of pairs says of a policy in training, as means over all ranks."""

from speechalign.training.pair_comparison import Compared
from speechalign.training.running_means import RunningMeans

NAMES = (
    "loss",
    "anchor",
    "accuracy",
    "margin",
    "chosen_reward",
    "rejected_reward",
    "chosen_logprob",
    "rejected_logprob",
    "chosen_drop",
    "entropy",
    "kl_k1",
    "kl_k3",
)


def no_means_yet() -> RunningMeans:
    """Return what `count_in` adds to."""
    return RunningMeans(NAMES)


def count_in(means: RunningMeans, compared: Compared) -> None:
    """Add the pairs of this rank.

    Of labelled answers (types.PairKind) each side's means are over those that have the side, and
    accuracy is the share that moved to where its label wants it.
    """
    output, policy, reference = compared.loss, compared.policy, compared.reference
    means.add("loss", output.loss_B)
    means.add("anchor", output.anchor_B)
    means.add("accuracy", output.margin_B > 0)
    means.add("margin", output.margin_B)
    own, before = policy.normalised(), reference.normalised()
    chosen_drop_B = before.chosen_B - own.chosen_B
    has_chosen_B, has_rejected_B = policy.has_chosen_B, policy.has_rejected_B
    means.add("chosen_reward", output.chosen_reward_B[has_chosen_B])
    means.add("chosen_logprob", own.chosen_B[has_chosen_B])
    means.add("chosen_drop", chosen_drop_B[has_chosen_B])
    means.add("rejected_reward", output.rejected_reward_B[has_rejected_B])
    means.add("rejected_logprob", own.rejected_B[has_rejected_B])
    if policy.drift is not None:
        means.add("entropy", policy.drift.entropy_B)
        means.add("kl_k1", policy.drift.kl_k1_B)
        means.add("kl_k3", policy.drift.kl_k3_B)
