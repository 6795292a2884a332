"""Judged samples to the pairs that an iteration trains on."""

import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq

from speechalign.artifacts import committed_folder, manifest_facts, verify_folder
from speechalign.config.align import AlignConfig
from speechalign.config.judges import TRUNCATED
from speechalign.policy.ar import VOCABULARY
from speechalign.policy.prompt_format import answer_token_ids
from speechalign.policy.vocabulary import Vocabulary
from speechalign.preferences.pairs import make_pairs
from speechalign.rewards.combine import check_budget, rewards_of
from speechalign.rows import Row, pairs_to_table, prompts_from_table, scored_from_row
from speechalign.sampling.pipeline import SCORED
from speechalign.training.reference import sampler_difference
from speechalign.training.stored_pairs import PAIRS, read_pairs
from speechalign.types import Measured, PreferencePair, Score, ScoredSample, Unmeasured

logger = logging.getLogger(__name__)

NUM_PROBED = 16
"""Samples whose log-probs are computed again by the trainer's model."""


def write_pairs(config: AlignConfig, iteration: int, folder: Path) -> None:
    """Check the sampler against the trainer, reward the samples, pair them.

    Raises:
        LogprobMismatch: sampler and trainer disagree about the samples.
        BudgetExceeded: too many samples have no reward.
        DataError: no pair could be made.
    """
    scored_folder = folder.with_name("scored")
    verify_folder(scored_folder)
    groups = _groups(config, pq.read_table(scored_folder / SCORED).to_pylist())
    samples = [scored for group in groups.values() for scored in group]
    rewards = [scored.reward for scored in samples]
    num_missing = check_budget(rewards, config.reward) if config.reward.terms else 0
    difference = _probe(config, iteration, samples)
    golden = _golden_answers(config)
    pairing = make_pairs(groups, golden, config.pairing)
    earlier = _earlier_pairs(config, iteration)
    values = [reward.value for reward in rewards if isinstance(reward, Measured)]
    facts = pairing.counts() | {
        "kind": "pairs",
        "num_samples": len(samples),
        "num_without_reward": num_missing,
        "mean_reward": sum(values) / len(values) if values else None,
        "max_logprob_difference": difference,
        "num_earlier_pairs": len(earlier),
    }
    with committed_folder(folder, facts) as partial:
        pq.write_table(pairs_to_table([*earlier, *pairing.pairs]), partial / PAIRS)
    logger.info("pairs: %s", facts)


def _groups(config: AlignConfig, rows: list[Row]) -> Mapping[str, list[ScoredSample]]:
    rewards: list[Score] = (
        rewards_of(rows, config.reward)
        if config.reward.terms
        else [Unmeasured("nobody was asked")] * len(rows)
    )
    measures = sorted({term.measure for term in config.reward.terms} - {TRUNCATED})
    groups: dict[str, list[ScoredSample]] = defaultdict(list)
    for row, reward in zip(rows, rewards, strict=True):
        groups[row["prompt_id"]].append(scored_from_row(row, measures, reward))
    return groups


def _probe(config: AlignConfig, iteration: int, samples: list[ScoredSample]) -> float | None:
    """Return the largest difference of log-probs, or nothing where they differ by design."""
    sampling = config.sampling
    plain = [s.sample for s in samples if s.sample.temperature == 1.0 and s.sample.token_ids]
    if not plain or (sampling.top_p, sampling.top_k) != (1.0, 0):
        logger.info("sampler and trainer are not compared: the sampling is not the plain softmax")
        return None
    policy = config.policy
    if iteration > 1:
        policy = config.run_dir / f"iteration-{iteration - 1}" / "policy"
    return sampler_difference(policy, plain[:NUM_PROBED], config.training.max_logprob_difference)


def _golden_answers(config: AlignConfig) -> dict[str, tuple[int, ...]]:
    vocabulary = Vocabulary.load(config.policy / VOCABULARY)
    prompts = prompts_from_table(pq.read_table(config.run_dir / "prompts" / "train.parquet"))
    return {
        prompt.prompt_id: answer_token_ids(vocabulary, prompt.golden_codes_KT) for prompt in prompts
    }


def _earlier_pairs(config: AlignConfig, iteration: int) -> list[PreferencePair]:
    """Return the pairs of the iteration before, with those that it had from before it or without.

    A folder of pairs has the earlier ones first.
    """
    if iteration == 1 or config.pipeline.earlier_pairs == "none":
        return []
    before = config.run_dir / f"iteration-{iteration - 1}" / "pairs"
    pairs = read_pairs(before)
    if config.pipeline.earlier_pairs == "all":
        return pairs
    return pairs[manifest_facts(before)["num_earlier_pairs"] :]
