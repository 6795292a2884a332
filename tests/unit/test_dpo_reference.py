import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from speechalign.config.policy import ArConfig
from speechalign.errors import ConfigError, LogprobMismatch
from speechalign.policy.ar import build_ar, save_ar
from speechalign.policy.vocabulary import Vocabulary
from speechalign.training.reference import (
    cached_reference_logprobs,
    mismatched,
    pair_logprobs,
    sampler_difference,
)
from speechalign.training.stored_pairs import split_pairs
from speechalign.types import PairKind, PreferencePair
from tests.builders import a_sample

VOCABULARY = Vocabulary(symbols=" ab", num_codebooks=1, codebook_size=16)
FACTS = {"codec_fingerprint": "f", "policy_version": 0, "prefix_frames": 4}


def a_pair(prompt_id: str, rank: int = 0) -> PreferencePair:
    return PreferencePair(
        pair_id=f"{prompt_id}/{rank}",
        kind=PairKind.RANKED,
        prompt_id=prompt_id,
        policy_version=0,
        codec_fingerprint="f",
        prompt_token_ids=(2, 9, 3, 25, 4),
        chosen_token_ids=(8, 9, 10, 1),
        rejected_token_ids=(11, 12 + rank, 1),
        margin=1.0,
    )


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = build_ar(ArConfig(num_layers=1, hidden_size=32, num_heads=2), VOCABULARY)
    save_ar(tmp_path / "ar", model, VOCABULARY, FACTS)
    return tmp_path / "ar"


def test_the_reference_is_scored_in_the_precision_of_the_training(policy: Path, tmp_path: Path):
    pairs = [a_pair("p0")]
    torch.manual_seed(0)
    model = build_ar(ArConfig(num_layers=1, hidden_size=32, num_heads=2), VOCABULARY).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trained = float(pair_logprobs(model, pairs).chosen_B)
    folder = tmp_path / "reference"
    full = cached_reference_logprobs(policy, pairs, folder, "fp32")["p0/0"][0]
    half = cached_reference_logprobs(policy, pairs, folder, "bf16")["p0/0"][0]
    assert sum(half) == pytest.approx(trained, rel=1e-6)
    assert sum(full) != pytest.approx(trained, rel=1e-6)


def test_the_pairs_of_a_heldout_prompt_are_never_trained_on():
    pairs = [a_pair(f"p{number}", rank) for number in range(3) for rank in range(2)]
    train, heldout = split_pairs(pairs, 0.0001, 0)
    assert {pair.prompt_id for pair in heldout} == {"p2"}
    assert {pair.prompt_id for pair in train} == {"p0", "p1"}


def test_a_mismatched_answer_is_of_the_next_pair_with_another_prompt():
    chosen = {"p0": (8, 1), "p1": (9, 1), "p2": (10, 1)}
    pairs = [
        replace(a_pair(prompt, rank), chosen_token_ids=chosen[prompt])
        for prompt, rank in (("p0", 0), ("p0", 1), ("p1", 0), ("p2", 0))
    ]
    found = mismatched(pairs)
    assert [pair.pair_id for pair in found] == [pair.pair_id for pair in pairs]
    assert [pair.chosen_token_ids for pair in found] == [(9, 1), (9, 1), (10, 1), (8, 1)]


def test_one_prompt_alone_has_no_mismatched_answer():
    with pytest.raises(ConfigError, match="at least two prompts"):
        mismatched([a_pair("p0", 0), a_pair("p0", 1)])


def test_the_entropy_of_pairs_is_a_mean_over_their_tokens_and_only_on_request():
    torch.manual_seed(0)
    model = build_ar(ArConfig(num_layers=1, hidden_size=32, num_heads=2), VOCABULARY).eval()
    pairs = [a_pair("p0"), replace(a_pair("p1"), chosen_token_ids=(8, 1))]
    assert pair_logprobs(model, pairs).drift is None
    known = [([-1.0] * len(p.chosen_token_ids), [-1.0] * len(p.rejected_token_ids)) for p in pairs]
    drift = pair_logprobs(model, pairs, reference=known).drift
    assert drift is not None
    assert not drift.entropy_B.requires_grad
    expected: list[float] = []
    for pair in pairs:
        of_tokens: list[float] = []
        for answer in (pair.chosen_token_ids, pair.rejected_token_ids):
            shares_AV = shares_of(model, pair.prompt_token_ids, answer)
            of_tokens += (-(shares_AV * shares_AV.log()).sum(-1)).tolist()
        expected.append(sum(of_tokens) / len(of_tokens))
    assert drift.entropy_B.tolist() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def shares_of(
    model: torch.nn.Module, prompt: tuple[int, ...], answer: tuple[int, ...]
) -> torch.Tensor:
    """Return the distribution of each token of an answer."""
    said = torch.tensor([[*prompt, *answer]])
    return model(input_ids=said).logits[0, -len(answer) - 1 : -1].softmax(-1)


def test_the_kl_is_a_mean_over_the_tokens_that_a_policy_drew():
    torch.manual_seed(0)
    model = build_ar(ArConfig(num_layers=1, hidden_size=32, num_heads=2), VOCABULARY).eval()
    ranked, golden = a_pair("p0"), replace(a_pair("p1"), kind=PairKind.GOLDEN)
    known = [([-3.0, -2.5, -3.5, -4.0], [-3.0, -2.0, -1.0])] * 2
    drift = pair_logprobs(model, [ranked, golden], reference=known).drift
    assert drift is not None
    own = [
        [
            float(shares_V[token].log())
            for shares_V, token in zip(
                shares_of(model, ranked.prompt_token_ids, answer), answer, strict=True
            )
        ]
        for answer in (ranked.chosen_token_ids, ranked.rejected_token_ids)
    ]
    ratios = [  # log policy - log reference
        [mine - theirs for mine, theirs in zip(*sides, strict=True)]
        for sides in zip(own, known[0], strict=True)
    ]
    drawn = [ratios[0] + ratios[1], ratios[1]]  # nobody drew the recording
    k1 = [-sum(logs) / len(logs) for logs in drawn]
    k3 = [sum(math.exp(log) - 1 - log for log in logs) / len(logs) for logs in drawn]
    assert drift.kl_k1_B.tolist() == pytest.approx(k1, abs=1e-5)
    assert drift.kl_k3_B.tolist() == pytest.approx(k3, abs=1e-5)


def test_a_sampler_that_is_not_a_number_disagrees(policy: Path):
    said = replace(a_sample(num_tokens=2), token_ids=(8, 1))
    with pytest.raises(LogprobMismatch, match="nats on a token of sample p0/0") as caught:
        sampler_difference(policy, [said], 1e-4)
    off = float(str(caught.value).split("log-probs: ")[1].split()[0])
    assert sampler_difference(policy, [said], 1.1 * off) == pytest.approx(off, rel=0.01)
    unknown = replace(said, prompt_id="p1", logprobs=(float("nan"), -0.5))
    with pytest.raises(LogprobMismatch, match=r"nan nats on a token of sample p1/0 \(limit 99"):
        sampler_difference(policy, [said, unknown], 99.0)
