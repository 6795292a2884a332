"""A batch of pairs, read by the policy in training and by its reference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from speechalign.config.preference_training import PreferenceTrainingConfig
from speechalign.errors import ConfigError
from speechalign.training.engine import Engine, global_sum
from speechalign.training.losses import PairLogprobs, PairLoss, pair_loss, reference_point
from speechalign.training.reference import (
    AnswerLogprobs,
    answer_sums,
    cached_reference_logprobs,
    mismatched,
    pair_logprobs,
)
from speechalign.types import PairKind, PreferencePair

ReferenceLogprobs = Mapping[str, AnswerLogprobs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What came of a batch."""

    loss: PairLoss
    policy: PairLogprobs
    reference: PairLogprobs


def check_pairs(config: PreferenceTrainingConfig, pairs: Sequence[PreferencePair]) -> None:
    """Refuse answers that the method cannot learn from.

    Raises:
        ConfigError: some are labelled, and the loss compares two answers.
    """
    num_labelled = sum(pair.kind is PairKind.LABELLED for pair in pairs)
    if num_labelled and (config.method, config.loss.variant) != ("dpo", "kto"):
        raise ConfigError(
            f"{num_labelled} of {len(pairs)} answers are labelled and have no other one to be "
            "compared with; set training.method: dpo and training.loss.variant: kto"
        )


def good_share(pairs: Sequence[PreferencePair]) -> float:
    """Return the share of good answers, each pair counting once."""
    shares = {(True, True): 0.5, (True, False): 1.0, (False, True): 0.0}
    sides = ((bool(pair.chosen_token_ids), bool(pair.rejected_token_ids)) for pair in pairs)
    return sum(shares[side] for side in sides) / len(pairs)


def cached_references(
    config: PreferenceTrainingConfig,
    pairs: Sequence[PreferencePair],
    reference: Path,
    cache: Path,
) -> tuple[ReferenceLogprobs, ReferenceLogprobs]:
    """Return the reference's log-probs of the pairs, and of the mismatched ones that KTO asks for.

    The driver calls it before any worker does, so that no two ranks write the same folder.

    Args:
        config: of the training.
        pairs: all that will be compared.
        reference: the folder of the reference policy.
        cache: the folder that its log-probs are kept in, and beside it.
    """
    precision = config.engine.precision
    matched = cached_reference_logprobs(reference, pairs, cache, precision)
    if config.loss.variant != "kto":
        return matched, {}
    beside = cache.with_name(f"{cache.name}-mismatched")
    return matched, cached_reference_logprobs(reference, mismatched(pairs), beside, precision)


class PairComparison:
    """Compares pairs with one model in memory: the reference's log-probs come from a cache.

    Args:
        config: of the training.
        engine: holds the policy.
        pairs: all that will be compared.
        reference: the folder of the reference policy.
        cache: the folder that its log-probs are kept in, and beside it.
    """

    def __init__(
        self,
        config: PreferenceTrainingConfig,
        engine: Engine,
        pairs: Sequence[PreferencePair],
        reference: Path,
        cache: Path,
    ) -> None:
        self._config, self._engine = config, engine
        self._reference, self._mismatched_reference = cached_references(
            config, pairs, reference, cache
        )
        self._mismatched: dict[str, PreferencePair] = {}
        if config.loss.variant == "kto":
            self._mismatched = {pair.pair_id: pair for pair in mismatched(pairs)}

    def compare(self, pairs: Sequence[PreferencePair], *, num_counted: int) -> Compared:
        """Return loss and log-probs of pairs; every rank must call it.

        Args:
            pairs: of this rank.
            num_counted: how many of them are more than company for the other ranks.
        """
        policy = self._policy_logprobs(pairs)
        reference = self._reference_of(pairs, policy)
        kl = self._reference_point(pairs, num_counted)
        loss = pair_loss(policy, reference, self._config, kl)
        return Compared(loss=loss, policy=policy, reference=reference)

    def _policy_logprobs(self, pairs: Sequence[PreferencePair]) -> PairLogprobs:
        known = [self._reference[pair.pair_id] for pair in pairs]
        tells_feedback = self._config.method == "coh"
        with self._engine.autocast():
            return pair_logprobs(
                self._engine.module, pairs, tells_feedback=tells_feedback, reference=known
            )

    @torch.no_grad()
    def _reference_point(self, pairs: Sequence[PreferencePair], num_counted: int) -> float:
        """Return KTO's z0 of the pairs of all ranks; every rank must call it.

        Company is computed too: with ZeRO-3 a rank without a forward pass blocks the others.
        """
        if not self._mismatched:
            return 0.0
        others = [self._mismatched[pair.pair_id] for pair in pairs]
        rows = [(pair.prompt_token_ids, pair.chosen_token_ids) for pair in others]
        with self._engine.autocast():
            policy_B = answer_sums(self._engine.module, rows)
        reference = [sum(self._mismatched_reference[pair.pair_id][0]) for pair in others]
        differences_B = policy_B - policy_B.new_tensor(reference)
        counted_B = differences_B[:num_counted]
        sums = torch.stack([counted_B.sum(), counted_B.new_tensor(float(num_counted))])
        total, count = global_sum(sums)
        return reference_point(total, count)

    def _reference_of(self, pairs: Sequence[PreferencePair], like: PairLogprobs) -> PairLogprobs:
        device = like.chosen_B.device
        known = (self._reference[pair.pair_id] for pair in pairs)
        sums = [[float(sum(chosen)), float(sum(rejected))] for chosen, rejected in known]
        values_B2 = torch.tensor(sums, device=device)
        return PairLogprobs(
            chosen_B=values_B2[:, 0],
            rejected_B=values_B2[:, 1],
            chosen_tokens_B=like.chosen_tokens_B,
            rejected_tokens_B=like.rejected_tokens_B,
        )
